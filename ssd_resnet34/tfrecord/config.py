"""The TFRecord recipe: every number of it, and the presets by name.

Source, unless a field says otherwise: the Ascend port ("port") of Google's MLPerf v0.6 SSD
("mlperf"). Where the two differ, the default says which one it follows.
"""

import math
from dataclasses import asdict, dataclass

from ssd_resnet34.config import Recipe as First
from ssd_resnet34.config import option

# COCO's 80 of 90 category ids, in order: class k is the k-th.
_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_CATEGORY_IDS = tuple(number for number in range(1, 91) if number not in _UNUSED)


@dataclass(frozen=True)
class Recipe:
    name: str = option("SSD-ResNet34-TFRecord", "network name in logs and checkpoints")

    category_ids: tuple[int, ...] = option(COCO_CATEGORY_IDS, "of each class in the records")

    # Network, default boxes and normalisation: the first recipe's
    backbone: str = option(First.backbone, "resnet18, resnet34, or resnet10 for quick tries")
    image_size: int = First.image_size
    prior_sizes: tuple[float, ...] = First.prior_sizes
    prior_maps: tuple[int, ...] = First.prior_maps
    prior_steps: tuple[int, ...] = First.prior_steps
    prior_ratios: tuple[tuple[int, ...], ...] = First.prior_ratios
    center_variance: float = First.center_variance
    size_variance: float = First.size_variance
    mean: tuple[float, float, float] = First.mean
    std: tuple[float, float, float] = First.std

    # Augmentation
    augment: bool = option(True, "random crop, flip and colour while training")
    whole_probability: float = 1 / 7  # no crop
    crop_ious: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # every box overlaps by more
    crop_scale: tuple[float, float] = First.crop_scale
    crop_ratio: tuple[float, float] = First.crop_ratio
    crop_windows: int = 50  # a try: the last of them that is valid
    flip_probability: float = 0.5
    brightness: float = 0.125  # added, of 0..1, +- this
    contrast: float = 0.5  # factor 1 +- this
    saturation: float = 0.5
    hue: float = 0.05  # turns, +- this

    # Matching and loss
    match_iou: float = 0.5  # a default box is positive from this on
    negative_ratio: int = 3  # hard negatives a positive
    extra_negatives: int = option(0, "further negatives: mlperf 0, the port's sort keeps 1")

    # Optimisation
    batch_size: int = option(32, "images per process", "--train-batch-size")
    epochs: float = option(115.2, "length of a run", "--num-epochs")
    num_examples_per_epoch: int = option(120000, "images that the schedule calls an epoch")
    lr: float = option(3e-3, "learning rate for 32 images")
    lr_warmup_epochs: float = option(0.8, "linear warm-up from 0")
    lr_cosine_epochs: float = option(106.0, "cosine, from the first step on")
    lr_floor: float = option(0.01, "part of the rate that is left after the cosine")
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(5e-4, "decay of every parameter; part of the printed loss", "--wd")
    clip_norm: float = option(0.0, "clip the gradient's global norm; 0: not")
    # The port's own mixed precision has no loss scaling.
    amp: str = option("O0", "precision on npu and cuda: O0, O1, O2")
    loss_scale: str = option("dynamic", "'dynamic' or a number; used with fp16 only")

    # Evaluation
    evaluation: tuple[int, ...] = option((), "evaluate after these epochs too, not only at the end")
    threshold: float = option(0.0, "stop when AP reaches this; 0: never")
    eval_batch_size: int = option(32, "images per process in evaluation")
    score_threshold: float = option(0.05, "a detection scores more than this")
    nms_iou: float = 0.5  # a box overlapping a better one by this or more is dropped
    max_per_class: int = option(200, "candidates per class before NMS")
    max_detections: int = option(200, "detections per image")
    # port: boxes kept from below 0 and from no extent; mlperf not
    clamp_boxes: bool = option(True, "repair boxes as the port does")

    def listing(self) -> str:
        """One line a field, for the log."""
        return "\n".join(f"{key} = {value!r}" for key, value in asdict(self).items())

    def iters_per_epoch(self, world_size: int) -> int:
        """Steps of an epoch as the schedule counts them: rounded down, 468 for 8 x 32 images."""
        return self.num_examples_per_epoch // (self.batch_size * world_size)

    def total_steps(self, world_size: int) -> int:
        """Steps of a whole run."""
        images = self.epochs * self.num_examples_per_epoch
        return int(images / self.batch_size / world_size)

    def base_lr(self, world_size: int, batch_size: int) -> float:
        """The peak of the schedule, for the global batch (`world_size * batch_size`)."""
        return self.lr * (world_size * batch_size) / 32

    def lr_at(
        self, iteration: int, iters_per_epoch: int, world_size: int, batch_size: int
    ) -> float:
        """Learning rate of a 0-based iteration: linear from 0, then a cosine.

        The cosine counts from iteration 0, not from the end of the warm-up.
        """
        peak = self.base_lr(world_size, batch_size)
        warmup = int(self.lr_warmup_epochs * iters_per_epoch)
        if iteration < warmup:
            return peak * iteration / warmup
        cosine = int(self.lr_cosine_epochs * iters_per_epoch)
        progress = min(iteration, cosine) / max(cosine, 1)
        fall = (1 + math.cos(math.pi * progress)) / 2
        return peak * (self.lr_floor + (1 - self.lr_floor) * fall)


RECIPES: dict[str, Recipe] = {
    "port": Recipe(),
    # For quick tries on two CPU cores.
    "small": Recipe(name="SSD-ResNet10-TFRecord", backbone="resnet10"),
}
