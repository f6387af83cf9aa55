"""The golden numbers of m2det again, on any device (tests/golden/m2det/README.md)."""

import re
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from common.coco.images import read_image
from common.npu.selfcheck import (
    WRONG,
    Golden,
    Phase,
    equal_or_wrong,
    pad_truth,
    relative,
    relative_of_probe,
    train,
)
from m2det.anchors import make_anchors
from m2det.config import RECIPES, Recipe
from m2det.data import prepare_image
from m2det.loss import DetectionLoss
from m2det.model import build_model
from m2det.postprocess import detect

RECIPE = RECIPES["512_vgg"]
SMALL = replace(RECIPES["320_vgg"], sfam=True)  # of the golden forward pass
NUM_ANCHORS = 32760
TRUTH_SLOTS = 48
# Under one name for all: the module is the same for every level, or scale.
ALIASES = re.compile(r"^(leach|sfam_module\.fc[12])\.\d+")
SMOOTH = re.compile(r"^unet.*\.smooth\..*\.bn\.weight$")
LAST_NORM = re.compile(r"^base\.layer.*bn3\.weight$")


def value_of(key: str, shape: tuple[int, ...], golden: Golden) -> np.ndarray:
    """Return the value of a weight that every golden number was computed with."""
    key = ALIASES.sub(r"\1.0", key)
    value = golden.fill_value(key, shape)
    if SMOOTH.match(key):
        value = value * np.float32(0.1)
    if LAST_NORM.match(key):
        value = value * np.float32(0.25)
    return value


def filled_model(golden: Golden, device: torch.device, recipe: Recipe) -> nn.Module:
    """Return the network of the golden numbers."""
    model = golden.fill(build_model(recipe, 80), lambda key, shape: value_of(key, shape, golden))
    return model.to(device)


def truth_of(
    rows_of_images: list[np.ndarray], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ground truth of golden rows x1, y1, x2, y2, label.

    Label 0 marks the row that the original makes up for an image without objects: left out here.
    """
    boxes = []
    labels = []
    for rows in rows_of_images:
        real = rows[rows[:, 4] > 0]
        boxes.append(real[:, :4])
        labels.append(real[:, 4].astype(np.int64) - 1)
    return pad_truth(boxes, labels, TRUTH_SLOTS, device)


def anchors(golden: Golden, device: torch.device) -> float:
    return relative(make_anchors(RECIPE).to(device), golden("anchors")["m2det512_vgg"])


@torch.no_grad()
def forward(golden: Golden, device: torch.device) -> float:
    draws = np.random.default_rng(2).standard_normal((1, 3, SMALL.image_size, SMALL.image_size))
    images = torch.from_numpy(draws.astype(np.float32)).to(device)
    deltas, logits = filled_model(golden, device, SMALL)(images)
    expected = golden("forward")
    return max(
        relative_of_probe(deltas, expected, "m2det320_vgg_sfam/loc", "/"),
        relative_of_probe(logits, expected, "m2det320_vgg_sfam/conf", "/"),
    )


def targets(golden: Golden, device: torch.device) -> float:
    expected = golden("targets")
    criterion = DetectionLoss(RECIPE, 80).to(device)
    truth = truth_of([expected["0/gt"], expected["1/gt"]], device)
    positive, deltas, channels = (part.cpu() for part in criterion.targets(*truth))
    deviation = 0.0
    for i in (0, 1):
        index = expected[f"{i}/pos_index"]
        deviation = max(
            deviation,
            equal_or_wrong(positive[i].nonzero().squeeze(1), index),
            equal_or_wrong(channels[i, index], expected[f"{i}/pos_label"]),
            relative(deltas[i, index], expected[f"{i}/pos_loc"]),
        )
    return deviation


def loss_and_gradients(golden: Golden, device: torch.device) -> float:
    expected = golden("loss")
    rng = np.random.default_rng(5)
    outputs = []
    for channels in (4, 81):
        draws = rng.standard_normal((2, NUM_ANCHORS, channels)).astype(np.float32)
        outputs.append(torch.from_numpy(draws).to(device).requires_grad_())
    rows = [golden("targets")["0/gt"], golden("targets")["1/gt"]]
    losses = DetectionLoss(RECIPE, 80).to(device)(outputs, *truth_of(rows, device))
    losses["loss"].backward()
    return max(
        relative(losses["loss_bbox"], expected["real/loss_l"]),
        relative(losses["loss_cls"], expected["real/loss_c"]),
        relative_of_probe(outputs[0].grad, expected, "real/grad_loc", "/"),
        relative_of_probe(outputs[1].grad, expected, "real/grad_conf", "/"),
    )


def five_steps(golden: Golden, device: torch.device) -> float:
    expected = golden("train")
    rates = {name: float(expected[name]) for name in ("lr", "momentum", "weight_decay")}
    name = f"{int(expected['image_id']):012d}.jpg"
    pixels = read_image(golden.photographs / "train2017" / name)
    image = prepare_image(pixels, RECIPE).unsqueeze(0).to(device)
    truth = truth_of([expected["gt"]], device)
    model = filled_model(golden, device, RECIPE)
    criterion = DetectionLoss(RECIPE, 80).to(device)
    history = train(
        model,
        list(model.parameters()),
        device,
        rates,
        lambda: criterion(model(image), *truth),
        steps=5,
    )
    return max(
        relative(history["loss_bbox"], expected["loss_l"]),
        relative(history["loss_cls"], expected["loss_c"]),
    )


def detections(golden: Golden, device: torch.device) -> float:
    expected = golden("detect")
    rng = np.random.default_rng(8)
    deltas = (0.5 * rng.standard_normal((NUM_ANCHORS, 4))).astype(np.float32)
    logits = rng.standard_normal((NUM_ANCHORS, 81)).astype(np.float32)
    logits[:, 0] += 8
    anchor_numbers = rng.integers(64, NUM_ANCHORS - 64, 24)
    classes = rng.integers(1, 13, 24)
    for number, label in zip(anchor_numbers, classes, strict=True):
        logits[number - 60 : number + 60, label] += 9
    outputs = []
    for part in (deltas, logits):
        outputs.append(torch.from_numpy(part).unsqueeze(0).to(device))
    width, height = expected["soft/size_wh"].tolist()
    (found,) = detect(tuple(outputs), torch.tensor([[height, width]]), RECIPE)
    boxes, scores, labels = (part.numpy() for part in found)
    if len(labels) != len(expected["soft/label"]):
        return WRONG
    # The golden's are by class, as they were taken.
    order = np.argsort(labels, kind="stable")
    limits = np.array([width, height, width, height])
    return max(
        equal_or_wrong(labels[order] + 1, expected["soft/label"]),
        relative(scores[order], expected["soft/score"]),
        relative(boxes[order], np.clip(expected["soft/box"], 0, limits)),
    )


# In the order of their size. Half precision: an Ascend 910A, which convolves so whatever the type.
# The rounding of a network of this depth grows from step to step.
PHASES = (
    Phase("anchors", anchors, tolerance=1e-6, tolerance_in_half=1e-6),
    Phase("targets", targets, tolerance=1e-5, tolerance_in_half=1e-5),
    Phase("loss and gradients", loss_and_gradients, tolerance=1e-5, tolerance_in_half=1e-5),
    Phase("detections", detections, tolerance=1e-4, tolerance_in_half=1e-4),
    Phase("forward", forward, tolerance=1e-4, tolerance_in_half=2e-2),
    Phase("five training steps", five_steps, tolerance=5e-3, tolerance_in_half=1e-1),
)
