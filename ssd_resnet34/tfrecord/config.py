"""The TFRecord recipe: every number of it, and the presets by name.

Source, unless a field says otherwise: the Ascend port ("port") of Google's MLPerf v0.6 SSD
("mlperf"). Where the two differ, the default says which one it follows.
"""

import math
from dataclasses import asdict, dataclass

from ssd_resnet34.config import Recipe as First

# COCO's 80 of 90 category ids, in order: class k is the k-th.
_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_CATEGORY_IDS = tuple(number for number in range(1, 91) if number not in _UNUSED)


@dataclass(frozen=True)
class Recipe:
    name: str = "SSD-ResNet34-TFRecord"  # in logs, file names and checkpoints

    category_ids: tuple[int, ...] = COCO_CATEGORY_IDS  # of each class in the records

    # Network, default boxes and normalisation: the first recipe's
    backbone: str = First.backbone
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
    augment: bool = True
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
    extra_negatives: int = 0  # mlperf; the port's sort keeps 1 more

    # Optimisation
    train_batch_size: int = 32  # images per process
    num_epochs: float = 115.2
    num_examples_per_epoch: int = 120000  # what defines an epoch, whatever the data set's size
    lr: float = 3e-3  # for 32 images
    lr_warmup_epochs: float = 0.8
    lr_cosine_epochs: float = 106
    lr_floor: float = 0.01  # of the peak, after the cosine
    momentum: float = 0.9
    weight_decay: float = 5e-4  # of every parameter, BN and biases too; part of the printed loss
    amp: str = "O0"  # the port's own mixed precision has no loss scaling
    loss_scale: str = "dynamic"

    # Evaluation
    eval_batch_size: int = 32  # images per process
    score_threshold: float = 0.05  # a detection scores more than this
    nms_iou: float = 0.5  # a box overlapping a better one by this or more is dropped
    max_per_class: int = 200  # candidates per class before NMS
    max_detections: int = 200
    clamp_boxes: bool = True  # port: boxes kept from below 0 and from no extent; mlperf not

    # Log and checkpoints, steps
    log_interval: int = 100
    checkpoint_interval: int = 5000
    keep_checkpoint_max: int = 32

    def listing(self) -> str:
        """One line a field, for the log."""
        return "\n".join(f"{key} = {value!r}" for key, value in asdict(self).items())

    def iters_per_epoch(self, world_size: int) -> int:
        """Steps of an epoch as the schedule counts them: rounded down, 468 for 8 x 32 images."""
        return self.num_examples_per_epoch // (self.train_batch_size * world_size)

    def total_steps(self, world_size: int) -> int:
        """Steps of a whole run."""
        images = self.num_epochs * self.num_examples_per_epoch
        return int(images / self.train_batch_size / world_size)

    def lr_at(
        self, iteration: int, iters_per_epoch: int, world_size: int, batch_size: int
    ) -> float:
        """Learning rate of a 0-based iteration: linear from 0, then a cosine.

        The cosine counts from iteration 0, not from the end of the warm-up.
        """
        peak = self.lr * (world_size * batch_size) / 32
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
