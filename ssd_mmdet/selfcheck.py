"""The golden numbers of ssd_mmdet again, on any device (tests/golden/ssd_mmdet/README.md)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.coco.images import read_image
from common.npu.selfcheck import (
    Golden,
    Phase,
    deviation_of_detections,
    equal_or_wrong,
    pad_truth,
    relative,
    relative_of_probe,
    train,
)
from ssd_mmdet.anchors import make_anchors
from ssd_mmdet.config import RECIPES
from ssd_mmdet.data import normalise
from ssd_mmdet.loss import DetectionLoss
from ssd_mmdet.model import build_model
from ssd_mmdet.postprocess import detect

RECIPE = RECIPES["1p"]
NUM_ANCHORS = 8732
TRUTH_SLOTS = 32
PHOTOGRAPHS = ("000000184613.jpg", "000000391895.jpg")  # of train2017
SIZE_OF_DETECTIONS = (427, 640)  # height and width of the image in detect.npz


def value_of(key: str, shape: tuple[int, ...], golden: Golden) -> np.ndarray:
    """Return the value of a weight that every golden number was computed with."""
    value = golden.fill_value(key, shape)
    is_first_head = key.startswith(("bbox_head.cls_convs.0.", "bbox_head.reg_convs.0."))
    is_later_head = key.startswith("bbox_head.") and key.endswith("weight") and not is_first_head
    if key == "backbone.features.0.weight" or is_later_head:
        value = value * np.float32(0.1)
    if key == "backbone.l2_norm.weight":
        value = value * np.float32(20)
    return value


def filled_model(golden: Golden, device: torch.device) -> nn.Module:
    """Return the network of the golden numbers."""
    model = golden.fill(build_model(RECIPE, 80), lambda key, shape: value_of(key, shape, golden))
    return model.to(device)


def real_truth(golden: Golden, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the boxes of the golden's two photographs."""
    expected = golden("targets")
    boxes = [expected["gt_boxes0"], expected["gt_boxes1"]]
    labels = [expected["gt_labels0"], expected["gt_labels1"]]
    return pad_truth(boxes, labels, TRUTH_SLOTS, device)


def real_images(golden: Golden, device: torch.device) -> Tensor:
    """Return the golden's two photographs as network input, resized in floating point."""
    size = (RECIPE.image_size, RECIPE.image_size)
    resized = []
    for name in PHOTOGRAPHS:
        pixels = torch.from_numpy(read_image(golden.photographs / "train2017" / name))
        image = pixels.permute(2, 0, 1).unsqueeze(0).float()
        resized.append(F.interpolate(image, size, mode="bilinear", align_corners=False))
    return normalise(torch.cat(resized).permute(0, 2, 3, 1).to(device), RECIPE)


def anchors(golden: Golden, device: torch.device) -> float:
    return relative(make_anchors(RECIPE).to(device), golden("anchors")["anchors"])


@torch.no_grad()
def forward(golden: Golden, device: torch.device) -> float:
    draws = np.random.default_rng(0).uniform(-120, 150, (2, 3, 300, 300))
    images = torch.from_numpy(draws.astype(np.float32)).to(device)
    deltas, logits = filled_model(golden, device)(images)
    expected = golden("forward")
    return max(
        relative_of_probe(deltas, expected, "reg"), relative_of_probe(logits, expected, "cls")
    )


def targets(golden: Golden, device: torch.device) -> float:
    expected = golden("targets")
    criterion = DetectionLoss(RECIPE, 80).to(device)
    truth = real_truth(golden, device)
    positive, deltas, channels = (part.cpu() for part in criterion.targets(*truth))
    deviation = 0.0
    for i in (0, 1):
        index = expected[f"pos_index{i}"]
        deviation = max(
            deviation,
            equal_or_wrong(positive[i].nonzero().squeeze(1), index),
            equal_or_wrong(channels[i, index], expected[f"pos_label{i}"]),
            relative(deltas[i, index], expected[f"pos_target{i}"]),
        )
    return deviation


def loss_and_gradients(golden: Golden, device: torch.device) -> float:
    expected = golden("loss")
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((2, NUM_ANCHORS, 81))
    deltas = 0.5 * rng.standard_normal((2, NUM_ANCHORS, 4))
    outputs = []
    for draws in (deltas, logits):
        on_device = torch.from_numpy(draws.astype(np.float32)).to(device)
        outputs.append(on_device.requires_grad_())
    losses = DetectionLoss(RECIPE, 80).to(device)(outputs, *real_truth(golden, device))
    losses["loss"].backward()
    return max(
        relative(losses["loss_cls"], expected["a_cls"].sum()),
        relative(losses["loss_bbox"], expected["a_reg"].sum()),
        relative_of_probe(outputs[0].grad, expected, "a_grad_reg"),
        relative_of_probe(outputs[1].grad, expected, "a_grad_cls"),
    )


def five_steps(golden: Golden, device: torch.device) -> float:
    expected = golden("train")
    rates = {name: float(expected[name]) for name in ("lr", "momentum", "weight_decay")}
    model = filled_model(golden, device)
    criterion = DetectionLoss(RECIPE, 80).to(device)
    images = real_images(golden, device)
    truth = real_truth(golden, device)
    history = train(
        model,
        list(model.parameters()),
        device,
        rates,
        lambda: criterion(model(images), *truth),
        steps=5,
    )
    return relative(history["loss"], expected["losses"][:, 2])


def detections(golden: Golden, device: torch.device) -> float:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((1, NUM_ANCHORS, 81)).astype(np.float32)
    logits[..., 80] += 8
    places = rng.choice(8700, 60, replace=False)
    labels = rng.integers(0, 80, 60)
    values = rng.uniform(6, 12, 60).astype(np.float32)
    for place, label, value in zip(places, labels, values, strict=True):
        logits[0, place : place + 6, label] += value
    deltas = rng.standard_normal((1, NUM_ANCHORS, 4)).astype(np.float32)
    deltas[0, :50, 2:] *= 30
    outputs = (torch.from_numpy(deltas).to(device), torch.from_numpy(logits).to(device))
    (found,) = detect(outputs, torch.tensor([SIZE_OF_DETECTIONS]), RECIPE)
    expected = golden("detect")
    return deviation_of_detections(
        found, expected["sparse_boxes"], expected["sparse_scores"], expected["sparse_labels"]
    )


# In the order of their size. Half precision: an Ascend 910A, which convolves so whatever the type.
PHASES = (
    Phase("anchors", anchors, tolerance=1e-6, tolerance_in_half=1e-6),
    Phase("targets", targets, tolerance=1e-5, tolerance_in_half=1e-5),
    Phase("loss and gradients", loss_and_gradients, tolerance=1e-5, tolerance_in_half=1e-5),
    Phase("detections", detections, tolerance=1e-4, tolerance_in_half=1e-4),
    Phase("forward", forward, tolerance=1e-4, tolerance_in_half=2e-2),
    Phase("five training steps", five_steps, tolerance=1e-3, tolerance_in_half=5e-2),
)
