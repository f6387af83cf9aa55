"""What a detector has found in an image."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image
from torch import Tensor

from common.coco.draw import draw_boxes


@dataclass(frozen=True)
class Detections:
    """The n detections of one image on the host, best first.

    `boxes, scores, labels = detections` takes them apart. A detector also gives the names of its
    classes and the image, (H, W, 3) uint8 RGB.
    """

    boxes: Tensor  # (n, 4) float32 xyxy, pixels of the original image
    scores: Tensor  # (n,) float32
    labels: Tensor  # (n,) int64 0-based classes
    class_names: tuple[str, ...] = field(default=(), repr=False)
    image: np.ndarray | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.boxes, self.scores, self.labels))

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """The class name of each detection."""
        return [self.class_names[label] for label in self.labels.tolist()]

    def from_scores(self, min_scores: Tensor) -> "Detections":
        """Return the detections with at least the lowest score of their class, of (C,) on a CPU."""
        kept = self.scores >= min_scores[self.labels]
        return replace(
            self, boxes=self.boxes[kept], scores=self.scores[kept], labels=self.labels[kept]
        )

    def draw(self, min_score: float = 0.3) -> Image.Image:
        """Return a copy of the image with the boxes of the detections from `min_score` on."""
        shown = self.scores >= min_score
        return draw_boxes(
            self.image,
            self.boxes[shown],
            self.labels[shown],
            self.class_names,
            self.scores[shown].tolist(),
        )
