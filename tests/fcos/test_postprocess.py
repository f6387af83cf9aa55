from dataclasses import replace

import numpy as np
import pytest
import torch

from common.coco.nms import class_nms
from fcos.anchors import map_sizes
from fcos.config import RECIPES
from fcos.model import Outputs
from fcos.postprocess import detect

HEIGHT, WIDTH = 96, 128


def outputs(seed=0, mean=-3.0, images=2, classes=5, **fill):
    random = torch.Generator().manual_seed(seed)
    sizes = map_sizes(RECIPES["gn"], HEIGHT, WIDTH)
    maps = []
    for (rows, columns), stride in zip(sizes, RECIPES["gn"].strides, strict=True):
        shape = (images, 1, rows, columns)
        logits = torch.randn(images, classes, *shape[2:], generator=random) * 2 + mean
        distances = stride * torch.randn(images, 4, *shape[2:], generator=random).exp()
        maps.append((logits, distances, torch.randn(shape, generator=random)))
    return Outputs(*zip(*maps, strict=True))


def by_the_book(outputs, image, network, original, recipe):
    """The steps as MMDetection takes them, one image in numpy."""
    parts = []
    for logits, distances, centerness, stride in zip(*outputs, recipe.strides, strict=True):
        _, count, rows, columns = logits.shape
        scores = logits[image].sigmoid().permute(1, 2, 0).reshape(-1, count).numpy()
        center = centerness[image].sigmoid().reshape(-1).numpy()
        left, top, right, bottom = distances[image].reshape(4, -1).numpy()
        y, x = np.divmod(np.arange(rows * columns), columns)
        x, y = x * stride + stride // 2, y * stride + stride // 2
        boxes = np.stack([x - left, y - top, x + right, y + bottom], axis=1)
        order = np.argsort(-(scores * center[:, None]).max(1), kind="stable")[: recipe.candidates]
        parts.append((boxes[order], scores[order], center[order]))
    boxes, scores, center = (np.concatenate(part) for part in zip(*parts, strict=True))
    height, width = network
    boxes = boxes.clip(0, (width, height, width, height)).astype(np.float32)
    boxes /= np.float32([width / original[1], height / original[0]] * 2)
    point, label = np.nonzero(scores > recipe.score_threshold)
    boxes, scores = boxes[point], (scores[point, label] * center[point]).astype(np.float32)
    keep = class_nms(boxes, scores, label, recipe.nms_iou, recipe.max_detections)
    return boxes[keep], scores[keep], label[keep]


@pytest.mark.parametrize("candidates", [1000, 20])
def test_equal_to_the_steps_of_the_original(candidates):
    recipe = replace(RECIPES["gn"], img_scale=("96,128",), candidates=candidates)
    made = outputs()
    sizes = [(192, 256), (150, 300)]  # in the input 96 x 128 and 64 x 128
    found = detect(made, torch.tensor(sizes), recipe)
    for image, network in enumerate([(96, 128), (64, 128)]):
        expected = by_the_book(made, image, network, sizes[image], recipe)
        boxes, scores, labels = (part.numpy() for part in found[image])
        assert len(scores) > 20
        np.testing.assert_array_equal(labels, expected[2])
        np.testing.assert_allclose(scores, expected[1], atol=1e-6)
        np.testing.assert_allclose(boxes, expected[0], atol=2e-3)
        height, width = sizes[image]
        assert (boxes >= 0).all()
        assert (boxes <= np.array([width, height, width, height]) + 1e-3).all()
        assert (np.diff(scores) <= 0).all()


def test_nothing_above_the_threshold():
    recipe = replace(RECIPES["gn"], img_scale=("96,128",))
    for found in detect(outputs(mean=-50.0), torch.tensor([[96, 128]] * 2), recipe):
        assert [tuple(part.shape) for part in found] == [(0, 4), (0,), (0,)]


def test_strides_are_the_unit_with_norm_on_bbox():
    recipe = replace(RECIPES["gn"], img_scale=("96,128",))
    made = outputs()
    in_strides = made._replace(
        distances=tuple(x / s for x, s in zip(made.distances, recipe.strides, strict=True))
    )
    sizes = torch.tensor([[96, 128]] * 2)
    expected = detect(made, sizes, recipe)
    found = detect(in_strides, sizes, replace(recipe, norm_on_bbox=True))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.boxes, other.boxes)


def test_a_score_may_fall_below_the_threshold_by_its_centerness():
    recipe = replace(RECIPES["gn"], img_scale=("96,128",))
    made = outputs(mean=-6.0)
    low = made._replace(centerness=tuple(x - 5 for x in made.centerness))
    found = detect(low, torch.tensor([[96, 128]] * 2), recipe)
    assert any((image.scores < 0.05).any() for image in found)
