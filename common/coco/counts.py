"""What a training set holds: its images, its boxes, and how many of each class."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.coco.index import CocoIndex

FEW_BOXES = 10  # a class with fewer is named: that is too few to learn it and to measure it
CLASSES_NAMED = 12  # of those; the rest is a number


@dataclass(frozen=True, eq=False)
class TrainingBoxes:
    """The B boxes of I images that are trained on."""

    image_sizes: np.ndarray  # (I, 2) int64 height and width, pixels
    image_of_box: np.ndarray  # (B,) int64 row of image_sizes
    boxes_xyxy: np.ndarray  # (B, 4) float64, pixels of the image, cut at its edge
    labels: np.ndarray  # (B,) int64 positions in class_names
    class_names: tuple[str, ...]
    num_crowds: int | None  # annotations of crowds; None where the files do not say

    @property
    def sizes_of_boxes(self) -> np.ndarray:
        """The (height, width) of each box's image, (B, 2) int64 pixels."""
        return self.image_sizes[self.image_of_box]

    def boxes_an_image(self) -> np.ndarray:
        """Return the number of boxes of each image, (I,) int64."""
        return np.bincount(self.image_of_box, minlength=len(self.image_sizes))

    def boxes_a_class(self) -> np.ndarray:
        """Return the number of boxes of each class, (classes,) int64."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    def rare_classes(self) -> list[int]:
        """Return the classes with fewer than FEW_BOXES boxes, the fewest first."""
        counts = self.boxes_a_class()
        by_count = np.argsort(counts, kind="stable")
        return [label for label in by_count.tolist() if counts[label] < FEW_BOXES]


def training_boxes(
    index: CocoIndex, untrained: dict[str, np.ndarray], class_names: Sequence[str]
) -> TrainingBoxes:
    """Return the boxes of an index that are trained on.

    `index` has the usable annotations, `untrained` says by reason which of them (A,) are left out,
    and `class_names`, which has all classes that boxes use, decides the labels.
    """
    is_used = np.ones(len(index.table), dtype=bool)
    for is_untrained in untrained.values():
        is_used &= ~is_untrained
    position_of = {name: position for position, name in enumerate(class_names)}
    new_labels = np.array([position_of.get(name, -1) for name in index.class_names], np.int64)
    table = index.table[is_used]
    image_of_box = np.repeat(np.arange(len(index)), np.diff(index.offsets))[is_used]
    image_sizes = index.sizes.astype(np.int64)
    return TrainingBoxes(
        image_sizes=image_sizes,
        image_of_box=image_of_box,
        boxes_xyxy=_cut_boxes(table.box_xywh, image_sizes[image_of_box]),
        labels=new_labels[table.label],
        class_names=tuple(class_names),
        num_crowds=int(np.count_nonzero(index.table.crowd)),
    )


def join_boxes(sets: Sequence[TrainingBoxes]) -> TrainingBoxes:
    """Return the boxes of several files, which have the same classes, as those of one."""
    image_of_box = []
    num_images = 0
    num_crowds = 0
    for boxes in sets:
        image_of_box.append(boxes.image_of_box + num_images)
        num_images += len(boxes.image_sizes)
        num_crowds += boxes.num_crowds
    return TrainingBoxes(
        image_sizes=np.concatenate([boxes.image_sizes for boxes in sets]),
        image_of_box=np.concatenate(image_of_box),
        boxes_xyxy=np.concatenate([boxes.boxes_xyxy for boxes in sets]),
        labels=np.concatenate([boxes.labels for boxes in sets]),
        class_names=sets[0].class_names,
        num_crowds=num_crowds,
    )


def _cut_boxes(boxes_xywh: np.ndarray, image_sizes: np.ndarray) -> np.ndarray:
    """Return boxes (B, 4) as corners, without what lies outside of their images (B, 2)."""
    top_left = boxes_xywh[:, :2]
    bottom_right = top_left + boxes_xywh[:, 2:]
    width_and_height = image_sizes[:, ::-1]
    top_left = np.clip(top_left, 0, width_and_height)
    bottom_right = np.clip(bottom_right, 0, width_and_height)
    return np.concatenate([top_left, bottom_right], axis=1)


def count_lines(boxes: TrainingBoxes) -> list[str]:
    """Return the lines that say how many images, boxes and classes there are."""
    an_image = boxes.boxes_an_image()
    a_class = boxes.boxes_a_class()
    num_empty = np.count_nonzero(an_image == 0)
    num_used = np.count_nonzero(a_class)
    crowds = "" if boxes.num_crowds is None else f", annotations of crowds: {boxes.num_crowds}"
    lines = [
        f"images: {len(an_image)}, of which {num_empty} are without a box",
        f"boxes: {len(boxes.labels)}{crowds}",
        f"boxes an image: {an_image.min()} to {an_image.max()}, median {np.median(an_image):g}",
        f"classes: {len(a_class)}, of which {num_used} have boxes",
    ]
    few = [label for label in boxes.rare_classes() if a_class[label] > 0]
    if few:
        named = [f"{boxes.class_names[label]} ({a_class[label]})" for label in few]
        lines.append(f"classes with fewer than {FEW_BOXES} boxes: {len(few)}: {_listed(named)}")
    none = np.flatnonzero(a_class == 0)
    if len(none):
        named = [boxes.class_names[label] for label in none]
        lines.append(f"classes without a box: {len(none)}: {_listed(named)}")
    return lines


def _listed(names: list[str]) -> str:
    """Return the first names in a line, and the number of the others."""
    text = ", ".join(names[:CLASSES_NAMED])
    if len(names) > CLASSES_NAMED:
        text += f" and {len(names) - CLASSES_NAMED} more"
    return text
