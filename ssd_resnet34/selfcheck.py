"""The golden numbers of ssd_resnet34 again, on any device (tests/golden/ssd_resnet34/README.md)."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

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
from ssd_resnet34.anchors import make_anchors
from ssd_resnet34.config import RECIPES
from ssd_resnet34.data import normalise
from ssd_resnet34.loss import DetectionLoss
from ssd_resnet34.model import build_model
from ssd_resnet34.postprocess import detect

RECIPE = RECIPES["1p"]
NUM_ANCHORS = 8732
TRUTH_SLOTS = 32


def value_of(key: str, shape: tuple[int, ...], golden: Golden) -> np.ndarray:
    """Return the value of a weight that every golden number was computed with."""
    value = golden.fill_value(key, shape)
    is_head = key.startswith("mbox.") and key.endswith(".weight")
    if is_head or key.endswith("bn2.weight"):
        value = value * np.float32(0.1)
    return value


def filled_model(golden: Golden, device: torch.device) -> nn.Module:
    """Return the network of the golden numbers."""
    model = golden.fill(build_model(RECIPE, 80), lambda key, shape: value_of(key, shape, golden))
    return model.to(device)


def random_images() -> Tensor:
    """Return the random images (2, 3, 300, 300) of the golden forward pass."""
    draws = np.random.default_rng(0).standard_normal((2, 3, 300, 300))
    return torch.from_numpy(draws.astype(np.float32))


def real_truth(golden: Golden, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the boxes of the golden's two real images, and of a third one without any."""
    expected = golden("targets")
    boxes = [expected["0.boxes_ltrb"], expected["1.boxes_ltrb"], np.zeros((0, 4), np.float32)]
    labels = [expected["0.labels"] - 1, expected["1.labels"] - 1, np.zeros(0, np.int64)]
    return pad_truth(boxes, labels, TRUTH_SLOTS, device)


def anchors(golden: Golden, device: torch.device) -> float:
    return relative(make_anchors(RECIPE).to(device), golden("anchors")["xywh"])


@torch.no_grad()
def forward(golden: Golden, device: torch.device) -> float:
    deltas, logits = filled_model(golden, device)(random_images().to(device))
    expected = golden("forward")
    return max(
        relative_of_probe(deltas, expected, "random.ploc"),
        relative_of_probe(logits, expected, "random.plabel"),
    )


def targets(golden: Golden, device: torch.device) -> float:
    expected = golden("targets")
    truth = real_truth(golden, device)
    criterion = DetectionLoss(RECIPE, 80).to(device)
    positive, deltas, channels = (part.cpu() for part in criterion.targets(*truth))
    deviation = 0.0
    for i in (0, 1):
        index = expected[f"{i}.positive_index"]
        deviation = max(
            deviation,
            equal_or_wrong(positive[i].nonzero().squeeze(1), index),
            equal_or_wrong(channels[i, index], expected[f"{i}.positive_label"]),
            relative(deltas[i][:, index].T, expected[f"{i}.positive_target"]),
        )
    return deviation


def loss_and_gradients(golden: Golden, device: torch.device) -> float:
    expected = golden("loss")
    deltas = np.random.default_rng(1).standard_normal((3, 4, NUM_ANCHORS)).astype(np.float32)
    logits = 2 * np.random.default_rng(2).standard_normal((3, 81, NUM_ANCHORS))
    outputs = []
    for draws in (deltas, logits.astype(np.float32)):
        outputs.append(torch.from_numpy(draws).to(device).requires_grad_())
    losses = DetectionLoss(RECIPE, 80).to(device)(outputs, *real_truth(golden, device))
    losses["loss"].backward()
    return max(
        relative(losses["loss"], expected["total"]),
        relative(losses["loss_cls"], expected["confidence"]),
        relative(losses["loss_bbox"], expected["location"]),
        relative_of_probe(outputs[0].grad, expected, "grad_ploc"),
        relative_of_probe(outputs[1].grad, expected, "grad_plabel"),
    )


def real_images(golden: Golden, device: torch.device) -> Tensor:
    """Return the golden's two photographs as network input, resized by Pillow."""
    size = (RECIPE.image_size, RECIPE.image_size)
    pixels = []
    for image_id in golden("preprocess")["image_id"]:
        image = Image.open(golden.photographs / f"val2017/{image_id:012d}.jpg").convert("RGB")
        pixels.append(np.array(image.resize(size, Image.Resampling.BILINEAR)))
    return normalise(torch.from_numpy(np.stack(pixels)).to(device), RECIPE)


def five_steps(golden: Golden, device: torch.device) -> float:
    expected = golden("train")
    rates = {name: float(expected[name]) for name in ("lr", "momentum", "weight_decay")}
    model = filled_model(golden, device)
    criterion = DetectionLoss(RECIPE, 80).to(device)
    images = real_images(golden, device)
    truth = [part[:2] for part in real_truth(golden, device)]
    history = train(
        model,
        list(model.parameters()),
        device,
        rates,
        lambda: criterion(model(images), *truth),
        steps=5,
    )
    return relative(history["loss"], expected["loss"])


def detections(golden: Golden, device: torch.device) -> float:
    draws = np.random.default_rng(3)
    outputs = []
    for shape in ((2, 4, NUM_ANCHORS), (2, 81, NUM_ANCHORS)):
        outputs.append(torch.from_numpy(draws.standard_normal(shape).astype(np.float32)))
    on_device = tuple(part.to(device) for part in outputs)
    found = detect(on_device, torch.ones(2, 2, dtype=torch.int64), RECIPE)
    expected = golden("detect")
    deviation = 0.0
    for i, of_image in enumerate(found):
        # The golden's worst comes first, and its classes begin with 1.
        boxes = expected[f"random.{i}.boxes_ltrb"][::-1]
        scores = expected[f"random.{i}.scores"][::-1]
        labels = expected[f"random.{i}.labels"][::-1] - 1
        deviation = max(deviation, deviation_of_detections(of_image, boxes, scores, labels))
    return deviation


# In the order of their size. Half precision: an Ascend 910A, which convolves so whatever the type.
PHASES = (
    Phase("anchors", anchors, tolerance=1e-6, tolerance_in_half=1e-6),
    Phase("targets", targets, tolerance=1e-5, tolerance_in_half=1e-5),
    Phase("loss and gradients", loss_and_gradients, tolerance=1e-5, tolerance_in_half=1e-5),
    Phase("detections", detections, tolerance=1e-5, tolerance_in_half=1e-5),
    Phase("forward", forward, tolerance=1e-4, tolerance_in_half=2e-2),
    Phase("five training steps", five_steps, tolerance=1e-3, tolerance_in_half=5e-2),
)
