"""The recipe: every number of FCOS with a caffe ResNet and FPN, and the presets by name.

The numbers come from the FCOS configs of MMDetection 2.11, which the Ascend port shares, unless a
comment names another source. A flag of the same name (with dashes or underscores) overrides a field
for one run.
"""

import re
from bisect import bisect_right
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from common.errors import UserError
from common.schedule import AUTOMATIC, DECAYS, decays_done, limited_warmup

IMAGES_OF_LR = 16  # the global batch size for which `lr` is given: eight devices of two images

# BGR means in 0..255 of the two kinds of published caffe ResNets; each file needs its own.
DETECTRON_MEAN = (102.9801, 115.9465, 122.7717)
DETECTRON2_MEAN = (103.53, 116.28, 123.675)

GROUPS = 32  # of the group norm in the head, group norm paper

# The fields that have a fixed set of values.
CHOICES = {
    "head_norm": ("gn", "none"),
    "box_loss": ("iou", "giou"),
    "shapes": ("exact", "two", "square"),
    "eval_shapes": ("exact", "two", "square", "auto"),
    "warmup_kind": ("constant", "linear"),
}


def option(default: Any, help_text: str, *flags: str) -> Any:
    """Declare a field that has a command-line flag; `flags` are further names of that flag."""
    return field(default=default, metadata={"help": help_text, "flags": flags})


@dataclass(frozen=True)
class Recipe:
    """All numbers of a run, each with its unit.

    Raise UserError for a value that its field does not allow.
    """

    model: ClassVar[str] = "fcos"  # what checkpoints call the writer
    name: str = option("FCOS", "network name in logs and file names")

    # Network
    backbone: str = option("resnet50", "resnet50, resnet101, or resnet14 for quick tries")
    channels: int = option(256, "channels of FPN and head; with group norm a multiple of 32")
    tower_convs: int = option(4, "convolutions in each of the head's two towers")
    head_norm: str = option("gn", "norm in the head's towers: gn (32 groups) or none")
    conv_bias: bool = option(
        False, "convolutions before group norm have a bias; without norm they always have"
    )
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)  # pixels between the points of P3 to P7
    prior_probability: float = 0.01  # class probability of a new network, focal loss paper 4.1

    # Targets and loss
    # Pixels. Level i learns the boxes whose largest distance is in ranges[i] to ranges[i + 1].
    ranges: tuple[float, ...] = (-1, 64, 128, 256, 512, 1e8)
    center_radius: float = option(
        0.0, "positive points are within this many strides of the box centre (0: anywhere in it)"
    )
    norm_on_bbox: bool = option(
        False, "predict distances in strides by ReLU instead of in pixels by exp"
    )
    centerness_on_reg: bool = option(False, "predict centerness from the regression tower")
    box_loss: str = option("iou", "box loss: iou (-log IoU) or giou (1 - GIoU)")
    focal_alpha: float = 0.25  # weight of the class of a positive point, focal loss paper

    # Input
    mean: tuple[float, float, float] = DETECTRON_MEAN  # BGR in 0..255; the deviation is 1
    img_scale: tuple[str, ...] = option(
        ("800,1333",),
        "largest short and long side in pixels; one of several is drawn for each image",
    )
    shapes: str = option("two", "training canvas: exact (multiples of 32), two or square")
    eval_shapes: str = option(
        "auto", "evaluation canvas: exact, two, square, or auto (depends on the device)"
    )

    # Augmentation
    augment: bool = option(True, "flip, and draw among several scales, while training")
    flip_probability: float = 0.5

    # Optimisation
    batch_size: int = option(2, "images per process", "-b")
    epochs: int = option(12, "epochs of `repeat` passes over the training set", "-e")
    repeat: int = option(1, "passes over the training set in an epoch")
    balance: float = option(
        0.0,
        "images come more often if they have a class that less than this share of the images has "
        "(0: off)",
    )
    lr: float = option(0.01, "learning rate for a global batch of 16 images")
    lr_decay_epochs: tuple[int, ...] = option(
        (8, 11), "epochs (from 0) at whose start the learning rate decays"
    )
    # Fractions of the run after which the rate decays where `lr_decay_epochs` is empty
    lr_decay_at: tuple[float, ...] = ()
    lr_decay_factor: float = option(0.1, "factor on the learning rate at each decay")
    warmup: int = option(500, "iterations of warm-up (0: no warm-up)")
    warmup_kind: str = option("constant", "warm-up: constant, or linear up to the learning rate")
    warmup_ratio: float = option(
        1 / 3, "factor on the learning rate at the first iteration of the warm-up"
    )
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(
        1e-4, "weight decay of all parameters but the biases of convolutions", "--wd"
    )
    bias_lr_factor: float = 2.0  # factor on the learning rate of the biases of convolutions
    clip_norm: float = option(35.0, "largest global norm of the gradient (0: no clipping)")
    amp: str = option("O1", "precision on npu and cuda: O0, O1 or O2")
    loss_scale: str = option("32", "'dynamic' or a number; used in fp16, on a 910A always")

    # Evaluation
    evaluation: tuple[int, ...] = option(
        tuple(range(1, 24)), "epochs after which to evaluate; the last one always counts"
    )
    eval_interval: int = option(
        0,
        "epochs from one evaluation to the next, besides those of --evaluation; 0: none, -1: a "
        "tenth of the run where --evaluation names none",
    )
    threshold: float = option(0.0, "stop as soon as AP reaches this (0: never)", "-t")
    eval_batch_size: int = option(2, "images per process in evaluation")
    candidates: int = option(1000, "points of a level that enter NMS at most ('nms_pre')")
    score_threshold: float = option(0.05, "detections have a class probability above this")
    nms_iou: float = option(0.5, "NMS drops a box with an IoU above this with a better box")
    max_detections: int = option(100, "largest number of detections in an image")

    def __post_init__(self):
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"--{name} {value}: not one of {', '.join(choices)}")
        if self.head_norm == "gn" and self.channels % GROUPS:
            raise UserError(
                f"--channels {self.channels}: not a multiple of {GROUPS}, which the head's group "
                "norm needs"
            )
        if not self.img_scale:
            raise UserError("--img_scale: give at least one scale, such as 800,1333")
        for scale in self.img_scale:
            if not re.fullmatch(r"[1-9]\d*,[1-9]\d*", scale):
                raise UserError(f"--img_scale {scale}: give two sides in pixels, such as 800,1333")

    @property
    def scales(self) -> tuple[tuple[int, int], ...]:
        """The scales of `img_scale` as (short side, long side); a text may have either order."""
        scales = []
        for text in self.img_scale:
            short, long = sorted(int(side) for side in text.split(","))
            scales.append((short, long))
        return tuple(scales)

    @property
    def eval_scale(self) -> tuple[int, int]:
        """The scale of evaluation, which is the largest one."""
        return max(self.scales)

    def listing(self) -> str:
        """Return one line for each field, for the log."""
        lines = []
        for name, value in asdict(self).items():
            lines.append(f"{name} = {value!r}")
        return "\n".join(lines)

    def base_lr(self, world_size: int, batch_size: int) -> float:
        """Return the learning rate before warm-up and decay.

        It is proportional to the global batch, `world_size * batch_size` images.
        """
        return self.lr * (world_size * batch_size) / IMAGES_OF_LR

    def lr_flags(self, rate: float, world_size: int, batch_size: int) -> str:
        """Return the flags of which `base_lr` makes a rate, to two digits."""
        return f"--lr={rate * IMAGES_OF_LR / (world_size * batch_size):.2g}"

    def lr_at(
        self, iteration: int, iters_per_epoch: int, world_size: int, batch_size: int
    ) -> float:
        """Return the learning rate of a 0-based iteration.

        It is lower during the warm-up, and is multiplied by `lr_decay_factor` at the start of each
        epoch of `lr_decay_epochs`. Without these the schedule follows the length of the run: it
        decays after the fractions of `lr_decay_at`, and limits the warm-up. The optimizer
        multiplies the rate by `bias_lr_factor` for the biases of convolutions.
        """
        warmup = self.warmup
        if self.lr_decay_at and not self.lr_decay_epochs:
            total_steps = self.epochs * iters_per_epoch
            warmup = limited_warmup(warmup, total_steps)
            decays = decays_done(self.lr_decay_at, iteration, total_steps)
        else:
            epoch = iteration // iters_per_epoch
            decays = bisect_right(sorted(self.lr_decay_epochs), epoch)
        lr = self.base_lr(world_size, batch_size) * self.lr_decay_factor**decays
        if iteration >= warmup:
            return lr
        progress = 0.0
        if self.warmup_kind == "linear":
            progress = iteration / warmup
        return lr * (self.warmup_ratio + (1 - self.warmup_ratio) * progress)


GN = Recipe()
GN_2X = replace(GN, epochs=24, lr_decay_epochs=(16, 22))
GN_MSTRAIN_2X = replace(GN_2X, img_scale=("640,1333", "800,1333"))
CENTER = replace(GN, center_radius=1.5)

RECIPES: dict[str, Recipe] = {
    "gn": GN,
    # The recipe of the port: the head has convolutions with bias and no norm.
    "nogn": replace(GN, head_norm="none"),
    "gn_2x": GN_2X,
    "gn_mstrain_2x": GN_MSTRAIN_2X,
    # The same with a deeper backbone, which is all that MMDetection's configs change.
    "r101_gn": replace(GN, backbone="resnet101"),
    "r101_gn_2x": replace(GN_2X, backbone="resnet101"),
    "r101_gn_mstrain_2x": replace(GN_MSTRAIN_2X, backbone="resnet101"),
    "center": CENTER,
    "tricks": replace(
        CENTER,
        conv_bias=True,
        norm_on_bbox=True,
        centerness_on_reg=True,
        box_loss="giou",
        mean=DETECTRON2_MEAN,
        warmup_kind="linear",
        clip_norm=0.0,
        nms_iou=0.6,
    ),
    # From a checkpoint, whose network it takes; the schedule follows --epochs.
    "finetune": replace(
        GN, lr_decay_epochs=(), lr_decay_at=DECAYS, evaluation=(), eval_interval=AUTOMATIC
    ),
    # Learns the built-in sample set from random weights, in minutes on two CPU cores.
    "quickstart": replace(
        GN,
        name="FCOS-ResNet14",
        backbone="resnet14",
        channels=64,
        tower_convs=2,
        img_scale=("192,320",),
        batch_size=4,
        lr=0.04,
        warmup=100,
        warmup_kind="linear",
        clip_norm=10.0,
        evaluation=(),
        eval_batch_size=4,
    ),
}
