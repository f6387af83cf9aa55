"""The recipe: every number of M2Det, and the presets by name.

Source, unless a field says otherwise: the M2Det paper's repository (VDIGPKU/M2Det) and its Ascend
port, which agree in all but the learning rate of the 512 x 512 network. A flag of the same name
(dash or underscore) overrides a field for one run.
"""

from bisect import bisect_left
from dataclasses import asdict, dataclass, field, replace


def _option(default, help_text, *flags):
    return field(default=default, metadata={"help": help_text, "flags": flags})


@dataclass(frozen=True)
class Recipe:
    name: str = _option("M2Det", "network name in logs and file names")

    # Network
    backbone: str = _option("vgg16", "vgg16, resnet50, resnet101, or vgg16_thin for quick tries")
    image_size: int = 512  # side of the square network input, pixels; the priors fit it
    planes: int = 256  # channels of a pyramid map
    num_levels: int = 8  # pyramids (TUMs) behind one another
    sfam: bool = _option(False, "scale-wise feature aggregation: the paper's, off in its code")
    smooth: bool = True  # a 1x1 convolution on each pyramid map
    bn_momentum: float = _option(0.01, "a new batch's part in BN's statistics; short runs need 0.1")

    # Priors: one size of each map, one of the geometric mean with the next, six shapes a cell
    prior_maps: tuple[int, ...] = (64, 32, 16, 8, 4, 2)
    prior_steps: tuple[int, ...] = (8, 16, 32, 64, 128, 256)  # pixels
    prior_sizes: tuple[float, ...] = (0.06, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)  # of image_size
    prior_ratios: tuple[int, ...] = (2, 3)
    center_variance: float = 0.1
    size_variance: float = 0.2

    # Input
    mean: tuple[int, int, int] = (104, 117, 123)  # BGR in 0..255, of ImageNet; also fills canvases

    # Augmentation
    augment: bool = _option(True, "random crop, colour, expansion and mirror while training")
    crop_ious: tuple[float | None, ...] = (None, 0.1, 0.3, 0.5, 0.7, 0.9, float("-inf"))
    crop_trials: int = 50  # per draw of the IoU
    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_ratio: tuple[float, float] = (0.5, 2.0)  # width / height, in parts of the image
    brightness: float = 32.0  # grey levels, +- this
    contrast: tuple[float, float] = (0.5, 1.5)
    hue: int = 18  # of 180 a turn, +- this
    saturation: tuple[float, float] = (0.5, 1.5)
    expand_probability: float = 0.6
    expand_scale: tuple[float, float] = (1.0, 4.0)
    expand_ratio: tuple[float, float] = (0.5, 2.0)
    flip_probability: float = 0.5
    interpolations: tuple[str, ...] = ("linear", "cubic", "area", "nearest", "lanczos")
    min_box: float = 0.01  # a box must exceed this part of the input in width and height

    # Matching and loss
    match_iou: float = 0.5  # a prior is positive from this on
    negative_ratio: int = 3  # hard negatives a positive

    # Optimisation
    batch_size: int = _option(16, "images per process", "-b")
    epochs: int = _option(160, "passes over the training set", "-e")
    lr: float = _option(0.001, "rate after warm-up; 0.004: the original, total batch up to 32")
    lr_factors: tuple[float, ...] = (1, 0.5, 0.1, 0.01, 0.001)
    lr_last_epochs: tuple[int, ...] = _option(
        (90, 110, 130, 150, 160), "the last epoch of each factor of the rate"
    )
    warmup_epochs: int = _option(5, "epochs of linear warm-up; 0: none")
    warmup_lr: float = 1e-6  # where warm-up starts
    momentum: float = _option(0.9, "momentum of SGD")
    weight_decay: float = _option(5e-4, "decay of every parameter, BN and biases too", "--wd")
    clip_norm: float = _option(0.0, "clip the gradient's global norm; 0: not")
    clip_each: float = _option(0.0, "clip the norm of each parameter's gradient; 0: not")
    amp: str = _option("O1", "precision on npu and cuda: O0, O1, O2")
    loss_scale: str = _option("32", "'dynamic' or a number; used with fp16 only")

    # Evaluation
    evaluation: tuple[int, ...] = _option((), "evaluate after these epochs; the last one always")
    threshold: float = _option(0.0, "stop when AP reaches this; 0: never", "-t")
    eval_batch_size: int = _option(16, "images per process in evaluation")
    score_threshold: float = _option(0.1, "a detection scores more than this before NMS")
    nms: str = _option("soft", "soft (linear soft-NMS) or hard (greedy NMS)")
    soft_nms_iou: float = _option(0.3, "overlap above which soft-NMS lowers a score")
    soft_nms_min_score: float = 0.001  # a box whose score falls below goes
    hard_nms_iou: float = _option(0.45, "a box overlapping a better one by more goes (--nms=hard)")
    max_per_class: int = _option(50, "detections per class and image")
    max_detections: int = _option(0, "detections per image; 0: no limit")
    plus_one: bool = _option(True, "COCO rows have width x2 - x1 + 1, as the original's")

    def listing(self) -> str:
        """One line a field, for the log."""
        return "\n".join(f"{key} = {value!r}" for key, value in asdict(self).items())

    def warnings(self, world_size: int) -> list[str]:
        """What is known to go wrong with this recipe on that many devices."""
        batch = world_size * self.batch_size
        if batch <= 32 or self.lr <= 0.001 or self.clip_norm or self.clip_each:
            return []
        return [
            f"total batch {batch} with --lr={self.lr:g}: the original's users lost 11 AP above a "
            "total batch of 32; clip gradients (--clip_each=1 or --clip_norm=10) or take the "
            "port's --lr=0.001"
        ]

    def lr_at(
        self, iteration: int, iters_per_epoch: int, world_size: int, batch_size: int
    ) -> float:
        """Learning rate of a 0-based iteration; it does not depend on the number of devices."""
        warmup = self.warmup_epochs * iters_per_epoch
        if iteration < warmup:
            return self.warmup_lr + (self.lr - self.warmup_lr) * iteration / warmup
        step = bisect_left(sorted(self.lr_last_epochs), iteration // iters_per_epoch + 1)
        return self.lr * self.lr_factors[min(step, len(self.lr_factors) - 1)]


_320 = Recipe(
    image_size=320,
    prior_maps=(40, 20, 10, 5, 3, 1),
    prior_steps=(8, 16, 32, 64, 107, 320),
    prior_sizes=(0.08, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05),
    lr=0.004,
)

RECIPES: dict[str, Recipe] = {
    "512_vgg": Recipe(),  # the port's
    "512_vgg_original": Recipe(lr=0.004),
    "320_vgg": _320,
    "320_resnet101": replace(_320, backbone="resnet101", batch_size=12),
    "704_vgg": Recipe(
        image_size=704,
        prior_maps=(88, 44, 22, 11, 6, 4),
        prior_steps=(8, 16, 32, 64, 117, 176),
        prior_sizes=(0.04, 0.11, 0.23, 0.39, 0.58, 0.80, 1.05),
        batch_size=11,
        lr=0.004,
    ),
    "800_vgg": Recipe(
        image_size=800,
        prior_maps=(100, 50, 25, 13, 7, 5),
        prior_steps=(8, 16, 32, 62, 115, 160),
        prior_sizes=(0.04, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05),
        batch_size=9,
        lr=0.004,
    ),
    # Finetuning from a checkpoint: the port's rule.
    "finetune": Recipe(),
    # Minutes on two CPU cores, for the built-in sample set, from random initialisation: a thin
    # network, small batches, clipped gradients because nothing is pretrained.
    "quickstart": replace(
        _320,
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
