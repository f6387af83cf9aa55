"""The TFRecord recipe: every number of it, and the presets by name.

Unless a field says otherwise, its number is that of the TensorFlow port and of what it was ported
from, Google's SSD in MLPerf v0.6. Where the two differ, the field says which one it follows.
"""

import math
from dataclasses import asdict, dataclass
from typing import ClassVar

from ssd_resnet34.config import IMAGES_OF_LR, option
from ssd_resnet34.config import Recipe as CocoRecipe

EVALUATION_FOLDER = "eval"  # in the folder of a run
# COCO uses 80 of the category ids 1 to 90. The class with label k has the k-th of them.
UNUSED_CATEGORY_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_CATEGORY_IDS = tuple(
    category_id for category_id in range(1, 91) if category_id not in UNUSED_CATEGORY_IDS
)


@dataclass(frozen=True)
class Recipe:
    """All numbers of a run, each with its unit."""

    model: ClassVar[str] = "ssd_resnet34/tfrecord"  # what checkpoints call the writer
    name: str = option("SSD-ResNet34-TFRecord", "network name in logs and checkpoints")

    category_ids: tuple[int, ...] = option(
        COCO_CATEGORY_IDS,
        "category id of each class; if not given, those of --val_json_file or of the records",
    )

    # Network, anchors and normalisation: those of the COCO recipe
    backbone: str = option(CocoRecipe.backbone, "resnet18, resnet34, or resnet10 for quick tries")
    image_size: int = CocoRecipe.image_size
    anchor_sizes: tuple[float, ...] = CocoRecipe.anchor_sizes
    anchor_maps: tuple[int, ...] = CocoRecipe.anchor_maps
    anchor_steps: tuple[int, ...] = CocoRecipe.anchor_steps
    anchor_ratios: tuple[tuple[int, ...], ...] = CocoRecipe.anchor_ratios
    center_variance: float = CocoRecipe.center_variance
    size_variance: float = CocoRecipe.size_variance
    mean: tuple[float, float, float] = CocoRecipe.mean
    std: tuple[float, float, float] = CocoRecipe.std

    # Augmentation
    augment: bool = option(True, "random crop, flip and colour jitter in training")
    uncropped_probability: float = 1 / 7  # that an attempt takes the whole image
    crop_ious: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # exceeded by every box's IoU
    crop_scale: tuple[float, float] = CocoRecipe.crop_scale
    crop_ratio: tuple[float, float] = CocoRecipe.crop_ratio
    crop_windows: int = 50  # drawn in an attempt; the last usable one is taken
    flip_probability: float = 0.5
    brightness: float = 0.125  # largest shift of values in 0..1
    contrast: float = 0.5  # the factor is 1 plus or minus at most this
    saturation: float = 0.5  # likewise
    hue: float = 0.05  # largest shift in turns

    # Matching and loss
    match_iou: float = 0.5  # an anchor is positive from this IoU on
    negative_ratio: int = 3  # hard negatives for each positive
    extra_negatives: int = option(
        0, "further hard negatives for each image: 0 in MLPerf, 1 by the TensorFlow port's sort"
    )

    # Optimisation
    batch_size: int = option(32, "images per process", "--train-batch-size")
    epochs: float = option(115.2, "length of a run", "--num-epochs")
    num_examples_per_epoch: int = option(120000, "images that the schedule counts as an epoch")
    lr: float = option(3e-3, "learning rate for 32 images")
    lr_warmup_epochs: float = option(0.8, "length of the linear warm-up from 0")
    lr_cosine_epochs: float = option(106.0, "length of the cosine, from the first step on")
    lr_floor: float = option(0.01, "fraction of the rate that remains after the cosine")
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(
        5e-4, "weight decay of every parameter; the printed loss includes it", "--wd"
    )
    clip_norm: float = option(0.0, "largest global norm of the gradient (0: no clipping)")
    # The mixed precision of the TensorFlow port has no loss scaling.
    amp: str = option("O0", "precision on npu and cuda: O0, O1, O2")
    loss_scale: str = option("dynamic", "'dynamic' or a number; used in fp16, on a 910A always")

    # Evaluation
    evaluation: tuple[int, ...] = option(
        (), "epochs after which to evaluate, besides the evaluation at the end"
    )
    eval_interval: int = option(
        0,
        "epochs from one evaluation to the next, besides those of --evaluation; 0: none, -1: a "
        "tenth of the run where --evaluation names none",
    )
    threshold: float = option(0.0, "stop as soon as AP reaches this (0: never)")
    eval_batch_size: int = option(32, "images per process in evaluation")
    score_threshold: float = option(0.05, "a detection scores more than this")
    nms_iou: float = 0.5  # a box is dropped if its IoU with a better one is at least this
    max_per_class: int = option(200, "candidates per class before NMS")
    max_detections: int = option(200, "detections per image")
    # The TensorFlow port does: it lifts coordinates below 0 and gives empty boxes a small extent.
    # MLPerf does not.
    clamp_boxes: bool = option(True, "repair boxes as the TensorFlow port does")

    def listing(self) -> str:
        """Return one line for each field, for the log."""
        return "\n".join(f"{key} = {value!r}" for key, value in asdict(self).items())

    def iters_per_epoch(self, world_size: int) -> int:
        """Return the steps that the schedule counts as an epoch: rounded down, 468 for 8 x 32."""
        return self.num_examples_per_epoch // (self.batch_size * world_size)

    def total_steps(self, world_size: int) -> int:
        """Return the number of steps of a complete run."""
        images = self.epochs * self.num_examples_per_epoch
        return int(images / self.batch_size / world_size)

    def base_lr(self, world_size: int, batch_size: int) -> float:
        """Return the peak of the schedule for the global batch, `world_size * batch_size`."""
        return self.lr * (world_size * batch_size) / IMAGES_OF_LR

    def lr_flags(self, rate: float, world_size: int, batch_size: int) -> str:
        """Return the flags of which `base_lr` makes a rate, to two digits."""
        return f"--lr={rate * IMAGES_OF_LR / (world_size * batch_size):.2g}"

    def lr_at(
        self, iteration: int, iters_per_epoch: int, world_size: int, batch_size: int
    ) -> float:
        """Return the learning rate of a 0-based iteration: linear from 0, then a cosine.

        The cosine counts from iteration 0, not from the end of the warm-up.
        """
        peak = self.base_lr(world_size, batch_size)
        warmup_steps = int(self.lr_warmup_epochs * iters_per_epoch)
        if iteration < warmup_steps:
            return peak * iteration / warmup_steps
        cosine_steps = int(self.lr_cosine_epochs * iters_per_epoch)
        progress = min(iteration, cosine_steps) / max(cosine_steps, 1)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return peak * (self.lr_floor + (1 - self.lr_floor) * cosine)


RECIPES: dict[str, Recipe] = {
    "port": Recipe(),
    # For quick tries on two CPU cores.
    "small": Recipe(name="SSD-ResNet10-TFRecord", backbone="resnet10"),
}
