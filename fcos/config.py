"""The recipe: every number of FCOS R50-caffe-FPN, and the presets by name.

Source, unless a field says otherwise: MMDetection 2.11's FCOS configurations, which the Ascend
port shares. A flag of the same name (dash or underscore) overrides a field for one run.
"""

import re
from bisect import bisect_right
from dataclasses import asdict, dataclass, field, replace

from common.errors import UserError


def _option(default, help_text, *flags):
    return field(default=default, metadata={"help": help_text, "flags": flags})


# BGR means that belong to the two caffe ResNet-50 files, 0..255.
DETECTRON_MEAN = (102.9801, 115.9465, 122.7717)
DETECTRON2_MEAN = (103.53, 116.28, 123.675)

# The fields that a network's weights belong to.
NETWORK = (
    "name",
    "backbone",
    "channels",
    "tower_convs",
    "head_norm",
    "conv_bias",
    "norm_on_bbox",
    "centerness_on_reg",
    "mean",
)

CHOICES = {
    "head_norm": ("gn", "none"),
    "box_loss": ("iou", "giou"),
    "shapes": ("exact", "two", "square"),
    "eval_shapes": ("exact", "two", "square", "auto"),
    "warmup_kind": ("constant", "linear"),
}


@dataclass(frozen=True)
class Recipe:
    name: str = _option("FCOS", "network name in logs and file names")

    # Network
    backbone: str = _option("resnet50", "resnet50, or resnet14 for quick tries")
    channels: int = _option(256, "channels of FPN and head, a multiple of 64")
    tower_convs: int = _option(4, "convolutions of each of the head's two towers")
    head_norm: str = _option("gn", "gn (32 groups) or none, in the head's towers")
    conv_bias: bool = _option(False, "a bias beside GN; without GN there always is one")
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)  # pixels, of P3..P7
    prior_probability: float = 0.01  # what conv_cls starts from

    # Targets and loss
    ranges: tuple[float, ...] = (-1, 64, 128, 256, 512, 1e8)  # pixels, bounds of the five levels
    center_radius: float = _option(0.0, "positives within this many strides of a centre; 0: box")
    norm_on_bbox: bool = _option(False, "distances in strides by ReLU, not in pixels by exp")
    centerness_on_reg: bool = _option(False, "centerness reads the regression tower")
    box_loss: str = _option("iou", "iou (-log) or giou")
    focal_alpha: float = 0.25

    # Input
    mean: tuple[float, float, float] = DETECTRON_MEAN  # BGR in 0..255, std 1
    img_scale: tuple[str, ...] = _option(
        ("800,1333",), "largest short and long side, pixels; of several, one is drawn per image"
    )
    shapes: str = _option("two", "training canvas: exact (multiples of 32), two, square")
    eval_shapes: str = _option("auto", "evaluation canvas: exact, two, square; auto: by device")

    # Augmentation
    augment: bool = _option(True, "flip, and draw among several scales, while training")
    flip_probability: float = 0.5

    # Optimisation
    batch_size: int = _option(2, "images per process", "-b")
    epochs: int = _option(12, "passes over the training set", "-e")
    lr: float = _option(0.01, "learning rate for 16 images a step, scaled to the real number")
    lr_decay_epochs: tuple[int, ...] = _option((8, 11), "epochs (from 0) that start with a decay")
    lr_decay_factor: float = _option(0.1, "factor of a decay")
    warmup: int = _option(500, "warm-up iterations; 0: none")
    warmup_kind: str = _option("constant", "constant, or linear up to the rate")
    warmup_ratio: float = _option(1 / 3, "part of the rate that warm-up starts with")
    momentum: float = _option(0.9, "momentum of SGD")
    weight_decay: float = _option(1e-4, "decay of everything but biases of convolutions", "--wd")
    bias_lr_factor: float = 2.0  # biases of convolutions; they have no decay
    clip_norm: float = _option(35.0, "clip the gradient's global norm; 0: not")
    amp: str = _option("O1", "precision on npu and cuda: O0, O1, O2")
    loss_scale: str = _option("32", "'dynamic' or a number; used with fp16 only")

    # Evaluation
    evaluation: tuple[int, ...] = _option(
        tuple(range(1, 24)), "evaluate after these epochs; the last one always"
    )
    threshold: float = _option(0.0, "stop when AP reaches this; 0: never", "-t")
    eval_batch_size: int = _option(2, "images per process in evaluation")
    candidates: int = _option(1000, "points kept per level before NMS ('nms_pre')")
    score_threshold: float = _option(0.05, "class probability of a candidate is above this")
    nms_iou: float = _option(0.5, "a box overlapping a better one by more is dropped")
    max_detections: int = _option(100, "detections per image")

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"--{name} {getattr(self, name)}: not one of {', '.join(choices)}")
        if not all(re.fullmatch(r"[1-9]\d*,[1-9]\d*", scale) for scale in self.img_scale or [""]):
            raise UserError(f"--img_scale {' '.join(self.img_scale)}: give sides as 800,1333")

    @property
    def scales(self) -> tuple[tuple[int, int], ...]:
        """The (short, long) sides of `img_scale`, which has them in either order."""
        return tuple(tuple(sorted(map(int, scale.split(",")))) for scale in self.img_scale)

    @property
    def eval_scale(self) -> tuple[int, int]:
        """The scale of evaluation: the largest."""
        return max(self.scales)

    def listing(self) -> str:
        """One line a field, for the log."""
        return "\n".join(f"{key} = {value!r}" for key, value in asdict(self).items())

    def base_lr(self, world_size: int, batch_size: int) -> float:
        """The rate before warm-up and decay, for the global batch (`world_size * batch_size`)."""
        return self.lr * (world_size * batch_size) / 16

    def lr_at(
        self, iteration: int, iters_per_epoch: int, world_size: int, batch_size: int
    ) -> float:
        """Learning rate of a 0-based iteration; biases of convolutions have twice as much."""
        decays = bisect_right(sorted(self.lr_decay_epochs), iteration // iters_per_epoch)
        lr = self.base_lr(world_size, batch_size) * self.lr_decay_factor**decays
        if iteration >= self.warmup:
            return lr
        rising = iteration / self.warmup if self.warmup_kind == "linear" else 0.0
        return lr * (self.warmup_ratio + (1 - self.warmup_ratio) * rising)


_GN = Recipe()
_TWO_X = replace(_GN, epochs=24, lr_decay_epochs=(16, 22))
_CENTER = replace(_GN, center_radius=1.5)

RECIPES: dict[str, Recipe] = {
    "gn": _GN,
    # What the port trains: convolutions with bias and no norm in the head.
    "nogn": replace(_GN, head_norm="none"),
    "gn_2x": _TWO_X,
    "gn_mstrain_2x": replace(_TWO_X, img_scale=("640,1333", "800,1333")),
    "center": _CENTER,
    "tricks": replace(
        _CENTER,
        conv_bias=True,
        norm_on_bbox=True,
        centerness_on_reg=True,
        box_loss="giou",
        mean=DETECTRON2_MEAN,
        warmup_kind="linear",
        clip_norm=0.0,
        nms_iou=0.6,
    ),
    # Finetuning from a checkpoint: the same.
    "finetune": _GN,
    # Minutes on two CPU cores, for the built-in sample set, from random initialisation.
    "quickstart": replace(
        _GN,
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
