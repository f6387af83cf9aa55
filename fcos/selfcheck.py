"""The golden numbers of fcos again, on any device (tests/golden/fcos/README.md)."""

import json

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.coco.images import read_image
from common.coco.resize import resize_as_opencv
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
from fcos.anchors import make_anchors, map_sizes
from fcos.config import RECIPES
from fcos.data import normalise, resized_size
from fcos.loss import DetectionLoss
from fcos.model import Outputs, build_model, param_groups
from fcos.postprocess import detect_resized

RECIPE = RECIPES["gn"]
SIZE = (256, 320)  # height and width of the small golden input
CANVAS = (224, 320)  # of the two photographs resized into it
SMALL_MAPS = map_sizes(RECIPE, *SIZE)
LARGE_MAPS = map_sizes(RECIPE, 800, 1344)
TRUTH_SLOTS = 32
# Weights that the golden networks have smaller: beginning and end of the name, factor.
FACTORS = (
    ("backbone.bn1.weight", "", 0.01),
    ("backbone.layer", ".bn3.weight", 0.2),
    ("neck.lateral_convs.", ".conv.weight", 0.1),
)


def value_of(key: str, shape: tuple[int, ...], golden: Golden) -> np.ndarray:
    """Return the value of a weight that every golden number was computed with."""
    value = golden.fill_value(key, shape)
    for start, end, factor in FACTORS:
        if key.startswith(start) and key.endswith(end):
            value = value * np.float32(factor)
    return value


def filled_model(golden: Golden, device: torch.device) -> nn.Module:
    """Return the network of the golden numbers, frozen in part as pretrained ones are."""
    model = golden.fill(build_model(RECIPE, 80), lambda key, shape: value_of(key, shape, golden))
    model.backbone.freeze()
    return model.to(device)


def real_truth(golden: Golden, device: torch.device, scale: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the boxes of the golden's two photographs at a scale, such as "256x320"."""
    expected = golden("targets")
    boxes = [expected[f"{scale}.gt_bboxes.{i}"] for i in (0, 1)]
    labels = [expected[f"{scale}.gt_labels.{i}"].astype(np.int64) for i in (0, 1)]
    return pad_truth(boxes, labels, TRUTH_SLOTS, device)


def real_images(golden: Golden, device: torch.device) -> Tensor:
    """Return the golden's two photographs as network input."""
    canvases = torch.zeros(2, *CANVAS, 3, dtype=torch.uint8)
    sizes = []
    for i, name in enumerate(golden("train")["files"].reshape(-1).tolist()):
        image = read_image(golden.photographs / "train2017" / name)
        height, width = resized_size(*image.shape[:2], SIZE)
        canvases[i, :height, :width] = torch.from_numpy(resize_as_opencv(image, height, width))
        sizes.append((height, width))
    return normalise(canvases.to(device), torch.tensor(sizes).to(device), RECIPE)


def random_outputs(
    seed: int, logit_mean: float, logit_deviation: float, centerness_deviation: float
) -> Outputs:
    """Return raw outputs for the small input, drawn as the golden README says."""
    rng = np.random.default_rng(seed)
    logits = []
    distances = []
    centerness = []
    for (rows, columns), stride in zip(SMALL_MAPS, RECIPE.strides, strict=True):
        logits.append(rng.normal(logit_mean, logit_deviation, (2, 80, rows, columns)))
        distances.append(stride * np.exp(rng.normal(1, 0.5, (2, 4, rows, columns))))
        centerness.append(rng.normal(0, centerness_deviation, (2, 1, rows, columns)))
    maps = []
    for kind in (logits, distances, centerness):
        maps.append(tuple(torch.from_numpy(level.astype(np.float32)) for level in kind))
    return Outputs(*maps)


def on_device(outputs: Outputs, device: torch.device) -> Outputs:
    moved = []
    for maps in outputs:
        moved.append(tuple(level.to(device) for level in maps))
    return Outputs(*moved)


def anchors(golden: Golden, device: torch.device) -> float:
    levels = [golden("anchors")[f"800x1344.level{level}"] for level in range(5)]
    return relative(make_anchors(RECIPE, LARGE_MAPS, device), np.concatenate(levels))


@torch.no_grad()
def forward(golden: Golden, device: torch.device) -> float:
    draws = np.random.default_rng(0).uniform(-120, 140, (2, 3, *SIZE))
    images = torch.from_numpy(draws.astype(np.float32)).to(device)
    outputs = filled_model(golden, device)(images)
    expected = golden("forward")
    deviation = 0.0
    for level in range(5):
        for name, maps in (
            ("cls", outputs.logits),
            ("bbox", outputs.distances),
            ("ctr", outputs.centerness),
        ):
            of_level = relative_of_probe(maps[level], expected, f"gn.{name}.level{level}")
            deviation = max(deviation, of_level)
    return deviation


def targets(golden: Golden, device: torch.device) -> float:
    expected = golden("targets")
    scale = "800x1344"
    criterion = DetectionLoss(RECIPE, 80).to(device)
    found = criterion.targets(LARGE_MAPS, *real_truth(golden, device, scale))
    positive, label, distances = (part.cpu() for part in found)
    label = torch.where(positive, label, 80)  # the original's label of the background
    return max(
        equal_or_wrong(label, expected[f"{scale}.base.labels"]),
        equal_or_wrong(positive.nonzero(), expected[f"{scale}.base.pos"]),
        relative(distances[positive], expected[f"{scale}.base.bbox_targets"]),
    )


def loss_and_gradients(golden: Golden, device: torch.device) -> float:
    expected = golden("loss")
    outputs = on_device(random_outputs(1, -3, 1, 1), device)
    for maps in outputs:
        for level in maps:
            level.requires_grad_()
    losses = DetectionLoss(RECIPE, 80).to(device)(outputs, *real_truth(golden, device, "256x320"))
    losses["loss"].backward()
    gradients = []
    for maps in outputs:
        gradients.append(torch.cat([level.grad.flatten() for level in maps]))
    deviation = max(
        relative_of_probe(gradients[0], expected, "base.grad_cls"),
        relative(gradients[1], expected["base.grad_bbox"]),
        relative(gradients[2], expected["base.grad_ctr"]),
    )
    for name in ("loss_cls", "loss_bbox", "loss_centerness"):
        deviation = max(deviation, relative(losses[name], expected[f"base.{name}"]))
    return deviation


def five_steps(golden: Golden, device: torch.device) -> float:
    expected = golden("train")
    settings = json.loads(str(expected["gn.optimizer"]))
    rates = {name: settings[name] for name in ("lr", "momentum", "weight_decay")}
    model = filled_model(golden, device)
    criterion = DetectionLoss(RECIPE, 80).to(device)
    images = real_images(golden, device)
    truth = real_truth(golden, device, "256x320")

    def clip_and_set_rates(optimizer: Optimizer) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), RECIPE.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = rates["lr"] * group["lr_factor"]

    history = train(
        model,
        param_groups(model, RECIPE),
        device,
        rates,
        lambda: criterion(model(images), *truth),
        steps=5,
        before_update=clip_and_set_rates,
    )
    return relative(history["loss"], expected["gn.loss"])


def detections(golden: Golden, device: torch.device) -> float:
    expected = golden("detect")
    outputs = on_device(random_outputs(2, -6, 1.5, 1.5), device)
    resized = torch.tensor([[240, 320], [213, 320]])
    factors = resized / torch.tensor([[480, 640], [427, 640]])
    deviation = 0.0
    for i, found in enumerate(detect_resized(outputs, resized, factors, RECIPE)):
        kept = f"base.rescaled.{i}"
        of_image = deviation_of_detections(
            found, expected[f"{kept}.boxes"], expected[f"{kept}.scores"], expected[f"{kept}.labels"]
        )
        deviation = max(deviation, of_image)
    return deviation


# In the order of their size. Half precision: an Ascend 910A, which convolves so whatever the type.
PHASES = (
    Phase("anchors", anchors, tolerance=1e-6, tolerance_in_half=1e-6),
    Phase("targets", targets, tolerance=1e-5, tolerance_in_half=1e-5),
    Phase("loss and gradients", loss_and_gradients, tolerance=1e-5, tolerance_in_half=1e-5),
    Phase("detections", detections, tolerance=1e-4, tolerance_in_half=1e-4),
    Phase("forward", forward, tolerance=1e-4, tolerance_in_half=2e-2),
    Phase("five training steps", five_steps, tolerance=1e-3, tolerance_in_half=5e-2),
)
