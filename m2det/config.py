"""The recipe: every number of M2Det, and the presets by name.

The numbers come from the M2Det paper's repository (VDIGPKU/M2Det) and its Ascend port, which agree
in all but the learning rate of the 512 x 512 network, unless a comment names another source. A flag
of the same name (with dashes or underscores) overrides a field for one run.
"""

from bisect import bisect_left
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from common.errors import UserError
from common.schedule import AUTOMATIC, DECAYS, decays_done, limited_warmup

# Above this total batch and learning rate, users of the original report divergence.
SAFE_TOTAL_BATCH = 32
SAFE_LR = 0.001

NO_CROP = None  # in `crop_ious`: not to crop

# The fields that have a fixed set of values.
CHOICES = {"nms": ("soft", "hard")}


def option(default: Any, help_text: str, *flags: str) -> Any:
    """Declare a field that has a command-line flag; `flags` are further names of that flag."""
    return field(default=default, metadata={"help": help_text, "flags": flags})


@dataclass(frozen=True)
class Recipe:
    """All numbers of a run, each with its unit.

    Raise UserError for a value that its field does not allow.
    """

    model: ClassVar[str] = "m2det"  # what checkpoints call the writer
    name: str = option("M2Det", "network name in logs and file names")

    # Network
    backbone: str = option("vgg16", "vgg16, resnet50, resnet101, or vgg16_thin for quick tries")
    image_size: int = 512  # side of the square network input in pixels; the anchors fit it
    planes: int = 256  # channels of a pyramid map
    num_levels: int = 8  # U-shaped modules (TUMs) in a row, each with a pyramid
    sfam: bool = option(False, "scale-wise feature aggregation: in the paper, off in its code")
    smooth: bool = True  # a 1x1 convolution on each pyramid map
    bn_momentum: float = option(
        0.01, "weight of a new batch in the statistics of BN; short runs need 0.1"
    )

    # Anchors; one entry for each feature map
    anchor_maps: tuple[int, ...] = (64, 32, 16, 8, 4, 2)  # cells along a side of the map
    anchor_steps: tuple[int, ...] = (8, 16, 32, 64, 128, 256)  # pixels between two cells
    # Sides as fractions of image_size, and one entry more
    anchor_sizes: tuple[float, ...] = (0.06, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)
    anchor_ratios: tuple[int, ...] = (2, 3)  # of all maps
    center_variance: float = 0.1
    size_variance: float = 0.2

    # Input
    mean: tuple[int, int, int] = (104, 117, 123)  # BGR in 0..255, of ImageNet; also fills canvases

    # Augmentation
    augment: bool = option(True, "random crop, colour jitter, expansion and flip while training")
    # Smallest IoU of the crop with every box; -inf stands for any IoU
    crop_ious: tuple[float | None, ...] = (NO_CROP, 0.1, 0.3, 0.5, 0.7, 0.9, float("-inf"))
    crop_trials: int = 50  # windows that are tried before another IoU is drawn
    crop_scale: tuple[float, float] = (0.3, 1.0)  # root of the crop's share of the image's area
    crop_ratio: tuple[float, float] = (0.5, 2.0)  # width over height of the crop, over the image's
    brightness: float = 32.0  # grey levels added, from -brightness to +brightness
    contrast: tuple[float, float] = (0.5, 1.5)  # range of the factor
    hue: int = 18  # added to a hue of 0..179, from -hue to +hue
    saturation: tuple[float, float] = (0.5, 1.5)  # range of the factor
    expand_probability: float = 0.6
    expand_scale: tuple[float, float] = (1.0, 4.0)  # root of the canvas's area over the image's
    expand_ratio: tuple[float, float] = (0.5, 2.0)  # width over height of the canvas, likewise
    flip_probability: float = 0.5
    interpolations: tuple[str, ...] = ("linear", "cubic", "area", "nearest", "lanczos")
    min_box: float = 0.01  # a box must exceed this fraction of the input in width and height

    # Matching and loss, SSD paper, section 2.2
    match_iou: float = 0.5  # an anchor with at least this IoU is positive
    negative_ratio: int = 3  # hard negatives for each positive

    # Optimisation
    batch_size: int = option(16, "images per process", "-b")
    epochs: int = option(160, "epochs of `repeat` passes over the training set", "-e")
    repeat: int = option(1, "passes over the training set in an epoch")
    balance: float = option(
        0.0,
        "images come more often if they have a class that less than this share of the images has "
        "(0: off)",
    )
    lr: float = option(
        0.001, "learning rate after warm-up; 0.004: the original's, for a total batch up to 32"
    )
    lr_factors: tuple[float, ...] = (1, 0.5, 0.1, 0.01, 0.001)
    lr_last_epochs: tuple[int, ...] = option(
        (90, 110, 130, 150, 160), "the last epoch of each factor of the learning rate"
    )
    # Fractions of the run after which the rate decays where `lr_last_epochs` is empty
    lr_decay_at: tuple[float, ...] = ()
    warmup_epochs: int = option(5, "epochs of linear warm-up (0: no warm-up)")
    warmup_lr: float = 1e-6  # learning rate at the start of the warm-up
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(5e-4, "weight decay of all parameters, BN and biases too", "--wd")
    clip_norm: float = option(0.0, "largest global norm of the gradient (0: no clipping)")
    clip_each: float = option(0.0, "largest norm of each parameter's gradient (0: no clipping)")
    amp: str = option("O1", "precision on npu and cuda: O0, O1 or O2")
    loss_scale: str = option("32", "'dynamic' or a number; used in fp16, on a 910A always")

    # Evaluation
    evaluation: tuple[int, ...] = option(
        (), "epochs after which to evaluate; the last one always counts"
    )
    eval_interval: int = option(
        0,
        "epochs from one evaluation to the next, besides those of --evaluation; 0: none, -1: a "
        "tenth of the run where --evaluation names none",
    )
    threshold: float = option(0.0, "stop as soon as AP reaches this (0: never)", "-t")
    eval_batch_size: int = option(16, "images per process in evaluation")
    score_threshold: float = option(0.1, "detections have a score above this before NMS")
    nms: str = option("soft", "soft (linear soft-NMS) or hard (greedy NMS)")
    soft_nms_iou: float = option(
        0.3, "soft-NMS lowers the score of a box with an IoU above this with a better box"
    )
    soft_nms_min_score: float = 0.001  # soft-NMS drops a box whose score falls below
    hard_nms_iou: float = option(
        0.45, "hard NMS drops a box with an IoU above this with a better box (--nms=hard)"
    )
    max_per_class: int = option(50, "largest number of detections of a class in an image")
    max_detections: int = option(0, "largest number of detections in an image (0: no limit)")
    plus_one: bool = option(True, "COCO rows have width x2 - x1 + 1, as the original's")

    def __post_init__(self):
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"--{name} {value}: not one of {', '.join(choices)}")

    def listing(self) -> str:
        """Return one line for each field, for the log."""
        lines = []
        for name, value in asdict(self).items():
            lines.append(f"{name} = {value!r}")
        return "\n".join(lines)

    def warnings(self, world_size: int) -> list[str]:
        """Return what is known to go wrong with this recipe on that many devices."""
        batch = world_size * self.batch_size
        is_clipped = self.clip_norm or self.clip_each
        if batch <= SAFE_TOTAL_BATCH or self.lr <= SAFE_LR or is_clipped:
            return []
        return [
            f"total batch {batch} with --lr={self.lr:g}: the original's users lost 11 AP above a "
            f"total batch of {SAFE_TOTAL_BATCH}; clip gradients (--clip_each=1 or --clip_norm=10) "
            f"or take the port's --lr={SAFE_LR:g}"
        ]

    def base_lr(self, world_size: int, batch_size: int) -> float:
        """Return the learning rate after warm-up, before decay: the same for any global batch."""
        return self.lr

    def lr_flags(self, rate: float, world_size: int, batch_size: int) -> str:
        """Return the flags of which `base_lr` makes a rate, to two digits."""
        return f"--lr={rate:.2g}"

    def lr_at(
        self, iteration: int, iters_per_epoch: int, world_size: int, batch_size: int
    ) -> float:
        """Return the learning rate of a 0-based iteration, the same for any number of devices.

        It rises linearly during the warm-up. After that it is `lr` times the factor of the first
        of `lr_last_epochs` that is not over yet; the last factor stays. Without these the schedule
        follows the length of the run: the next factor comes after each fraction of `lr_decay_at`,
        and the warm-up is limited.
        """
        follows_length = self.lr_decay_at and not self.lr_last_epochs
        total_steps = self.epochs * iters_per_epoch
        warmup = self.warmup_epochs * iters_per_epoch
        if follows_length:
            warmup = limited_warmup(warmup, total_steps)
        if iteration < warmup:
            return self.warmup_lr + (self.lr - self.warmup_lr) * iteration / warmup
        if follows_length:
            stage = decays_done(self.lr_decay_at, iteration, total_steps)
        else:
            epoch = iteration // iters_per_epoch + 1
            stage = bisect_left(sorted(self.lr_last_epochs), epoch)
        stage = min(stage, len(self.lr_factors) - 1)
        return self.lr * self.lr_factors[stage]


M2DET_512 = Recipe()  # the port's
M2DET_320 = Recipe(
    image_size=320,
    anchor_maps=(40, 20, 10, 5, 3, 1),
    anchor_steps=(8, 16, 32, 64, 107, 320),
    anchor_sizes=(0.08, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05),
    lr=0.004,
)

RECIPES: dict[str, Recipe] = {
    "512_vgg": M2DET_512,
    "512_vgg_original": replace(M2DET_512, lr=0.004),
    "320_vgg": M2DET_320,
    "320_resnet101": replace(M2DET_320, backbone="resnet101", batch_size=12),
    "704_vgg": Recipe(
        image_size=704,
        anchor_maps=(88, 44, 22, 11, 6, 4),
        anchor_steps=(8, 16, 32, 64, 117, 176),
        anchor_sizes=(0.04, 0.11, 0.23, 0.39, 0.58, 0.80, 1.05),
        batch_size=11,
        lr=0.004,
    ),
    "800_vgg": Recipe(
        image_size=800,
        anchor_maps=(100, 50, 25, 13, 7, 5),
        anchor_steps=(8, 16, 32, 62, 115, 160),
        anchor_sizes=(0.04, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05),
        batch_size=9,
        lr=0.004,
    ),
    # From a checkpoint, whose network it takes: the port's numbers. The schedule follows --epochs.
    "finetune": replace(
        M2DET_512,
        lr_factors=(1, 0.1, 0.01),
        lr_last_epochs=(),
        lr_decay_at=DECAYS,
        eval_interval=AUTOMATIC,
    ),
    # For the built-in sample set, from random initialisation, in minutes on two CPU cores: a thin
    # network, small batches, and clipped gradients because nothing is pretrained.
    "quickstart": replace(
        M2DET_320,
        name="M2Det-thin",
        backbone="vgg16_thin",
        planes=32,
        num_levels=2,
        augment=False,
        batch_size=8,
        epochs=8,
        lr=0.02,
        lr_factors=(1, 0.1),
        lr_last_epochs=(7, 8),
        warmup_epochs=1,
        clip_norm=10.0,
        eval_batch_size=8,
    ),
}
