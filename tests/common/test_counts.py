"""What a training set holds is counted right."""

import json

import numpy as np

from common.coco.counts import TrainingBoxes, count_lines, join_boxes, training_boxes
from common.coco.index import read_index


def boxes_of(labels, image_of_box=None, num_images=3, names=("dog", "cat", "owl")):
    """Boxes of these labels, all of the same size."""
    count = len(labels)
    if image_of_box is None:
        image_of_box = np.zeros(count, np.int64)
    return TrainingBoxes(
        image_sizes=np.full((num_images, 2), 100),
        image_of_box=np.array(image_of_box, np.int64),
        boxes_xyxy=np.tile([10.0, 10, 50, 50], (count, 1)),
        labels=np.array(labels, np.int64),
        class_names=names,
        num_crowds=2,
    )


def test_images_boxes_and_classes_are_counted():
    boxes = boxes_of([0] * 12 + [1] * 3, [0] * 12 + [2] * 3)
    assert count_lines(boxes) == [
        "images: 3, of which 1 are without a box",
        "boxes: 15, annotations of crowds: 2",
        "boxes an image: 0 to 12, median 3",
        "classes: 3, of which 2 have boxes",
        "classes with fewer than 10 boxes: 1: cat (3)",
        "classes without a box: 1: owl",
    ]
    assert boxes.rare_classes() == [2, 1]


def test_ten_boxes_are_not_few():
    assert boxes_of([0] * 10 + [1] * 9 + [2] * 10).rare_classes() == [1]


def test_of_many_rare_classes_the_last_are_a_number():
    names = tuple(f"class {number}" for number in range(20))
    *_, line = count_lines(boxes_of(list(range(20)), names=names))
    assert line.startswith("classes with fewer than 10 boxes: 20: class 0 (1), class 1 (1), ")
    assert line.endswith("class 11 (1) and 8 more")


def test_files_are_joined():
    joined = join_boxes([boxes_of([0], [1]), boxes_of([1, 2], [0, 2])])
    assert joined.boxes_an_image().tolist() == [0, 1, 0, 1, 0, 1]
    assert joined.boxes_a_class().tolist() == [1, 1, 1]
    assert joined.num_crowds == 4


def test_boxes_of_an_index_are_those_that_are_trained_on(tmp_path):
    """They are cut at the edge of the image, and labelled as in the first file."""
    boxes = {1: [-5, 10, 25, 20], 2: [30, 25, 20, 20], 3: [1, 1, 2, 2]}
    annotations = [
        {"id": i, "image_id": 7, "category_id": 3, "bbox": box, "iscrowd": int(i == 3)}
        for i, box in boxes.items()
    ]
    content = {
        "images": [{"id": 7, "file_name": "7.jpg", "height": 30, "width": 40}],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "dog"}],
    }
    (tmp_path / "7.jpg").touch()
    (tmp_path / "a.json").write_text(json.dumps(content))
    index = read_index(str(tmp_path / "a.json"), str(tmp_path))
    found = training_boxes(index, {"iscrowd": index.table.crowd}, ("cat", "dog"))
    assert found.boxes_xyxy.tolist() == [[0, 10, 20, 30], [30, 25, 40, 30]]
    assert found.labels.tolist() == [1, 1]
    assert found.sizes_of_boxes.tolist() == [[30, 40], [30, 40]]
    assert found.num_crowds == 1
