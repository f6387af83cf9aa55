"""The recipe: every number of SSD300-ResNet34, and the presets by name.

Unless a field says otherwise, its number is that of MLPerf training v0.7: NVIDIA's SSD submission,
as its Ascend port runs it. A field with a help text is also a flag, which overrides it for one run.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from common.schedule import AUTOMATIC, DECAYS, decays_done, limited_warmup

IMAGES_OF_LR = 32  # the global batch size for which `lr` is given
NO_CROP = None  # in `crop_ious`: not to crop


def option(default: Any, help_text: str, *flags: str) -> Any:
    """Declare a field that has a command-line flag; `flags` are further names of that flag."""
    return field(default=default, metadata={"help": help_text, "flags": flags})


@dataclass(frozen=True)
class Recipe:
    """All numbers of a run, each with its unit."""

    model: ClassVar[str] = "ssd_resnet34"  # what checkpoints call the writer
    name: str = option("SSD-ResNet34", "network name in logs and file names")

    # Network
    backbone: str = option("resnet34", "resnet18, resnet34, resnet50, or resnet10 for quick tries")
    image_size: int = 300  # side of the square network input, pixels; the anchors fit no other

    # Anchors, one entry a feature map (SSD paper section 2.2; the numbers of its COCO model)
    anchor_maps: tuple[int, ...] = (38, 19, 10, 5, 3, 1)  # cells along a side of the map
    anchor_steps: tuple[int, ...] = (8, 16, 32, 64, 100, 300)  # pixels from cell to cell
    # Pixels. One entry more than maps: the second square of a map also depends on the next size.
    anchor_sizes: tuple[float, ...] = (21, 45, 99, 153, 207, 261, 315)
    anchor_ratios: tuple[tuple[int, ...], ...] = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
    center_variance: float = 0.1
    size_variance: float = 0.2

    # Input
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # RGB in 0..1, ImageNet
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    # Augmentation
    augment: bool = option(True, "random crop, flip and colour while training")
    # A crop overlaps every box by more than an IoU drawn from these.
    crop_ious: tuple[float | None, ...] = (NO_CROP, 0.1, 0.3, 0.5, 0.7, 0.9, float("-inf"))
    crop_scale: tuple[float, float] = (0.3, 1.0)  # side of the crop / side of the image
    crop_ratio: tuple[float, float] = (0.5, 2.0)  # width / height, each relative to the image's
    flip_probability: float = 0.5
    brightness: float = 0.125  # the factor is drawn from 1 - this to 1 + this
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.05  # the shift is drawn from -this to this, in turns of the colour circle

    # Matching and loss, SSD paper section 2.2
    match_iou: float = 0.5  # an anchor is positive above this
    negative_ratio: int = 3  # hard negatives for each positive

    # Optimisation
    batch_size: int = option(32, "images per process", "-b")
    epochs: int = option(90, "epochs of `repeat` passes over the training set", "-e")
    repeat: int = option(1, "passes over the training set in an epoch")
    balance: float = option(
        0.0,
        "images come more often if they have a class that less than this share of the images has "
        "(0: off)",
    )
    lr: float = option(2.68e-3, "learning rate for 32 images, before rounding to lr_step")
    lr_step: float = option(
        2.5e-3, "the scaled rate is rounded to a multiple of this (0: no rounding)"
    )
    lr_decay_epochs: tuple[int, ...] = option((45, 58, 84), "epochs that start with a decay")
    # Fractions of the run after which the rate decays where `lr_decay_epochs` is empty
    lr_decay_at: tuple[float, ...] = ()
    lr_decay_factor: float = option(0.1, "factor of a decay")
    warmup: int = option(0, "iterations of warm-up (0: no warm-up)")
    warmup_factor: int = option(1, "warm-up starts at 1 - 2**-factor of the rate")
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(5e-4, "decay of every parameter, BN and biases too", "--wd")
    clip_norm: float = option(0.0, "largest global norm of the gradient (0: no clipping)")
    amp: str = option("O2", "precision on npu and cuda: O0, O1, O2")
    loss_scale: str = option("32", "'dynamic' or a number; used in fp16, on a 910A always")

    # Evaluation
    evaluation: tuple[int, ...] = option(
        (60, 65, 70, 75, 80, 85), "evaluate after these epochs; the last one always"
    )
    eval_interval: int = option(
        0,
        "epochs from one evaluation to the next, besides those of --evaluation; 0: none, -1: a "
        "tenth of the run where --evaluation names none",
    )
    threshold: float = option(0.23, "stop as soon as AP reaches this (0: never)", "-t")
    eval_batch_size: int = option(32, "images per process in evaluation")
    score_threshold: float = option(0.05, "a detection scores more than this")
    nms_iou: float = option(0.5, "a box overlapping a better one by more is dropped")
    max_per_class: int = option(200, "candidates per class before NMS")
    max_detections: int = option(200, "detections per image")

    def listing(self) -> str:
        """Return the fields for the log, one a line."""
        return "\n".join(f"{name} = {value!r}" for name, value in asdict(self).items())

    def base_lr(self, world_size: int, batch_size: int) -> float:
        """Return the learning rate before warm-up and decay.

        It is proportional to the global batch of `world_size * batch_size` images, then rounded to
        a multiple of `lr_step`, but never to 0.
        """
        scaled = self.lr * (world_size * batch_size) / IMAGES_OF_LR
        if not self.lr_step:
            return scaled
        steps = max(1, round(scaled / self.lr_step))
        return self.lr_step * steps

    def lr_flags(self, rate: float, world_size: int, batch_size: int) -> str:
        """Return the flags of which `base_lr` makes a rate, to two digits."""
        text = f"--lr={rate * IMAGES_OF_LR / (world_size * batch_size):.2g}"
        if self.lr_step:
            text += " --lr_step=0"  # which does not round it
        return text

    def lr_at(
        self, iteration: int, iters_per_epoch: int, world_size: int, batch_size: int
    ) -> float:
        """Return the learning rate of an iteration, counted from 0 over all epochs.

        The warm-up rises linearly. Its last value is a little below the base rate and stays until
        the first decay, as in the port. Without `lr_decay_epochs` the schedule follows the length
        of the run: it decays after the fractions of `lr_decay_at`, and limits the warm-up.
        """
        warmup = self.warmup
        if self.lr_decay_at and not self.lr_decay_epochs:
            total_steps = self.epochs * iters_per_epoch
            warmup = limited_warmup(warmup, total_steps)
            decays = decays_done(self.lr_decay_at, iteration, total_steps)
        else:
            epoch = iteration // iters_per_epoch
            decays = sum(epoch >= decay_epoch for decay_epoch in self.lr_decay_epochs)
        lr = self.base_lr(world_size, batch_size) * self.lr_decay_factor**decays
        if warmup and (iteration < warmup or decays == 0):
            remaining = warmup - min(iteration, warmup - 1)
            lr -= remaining * lr / (warmup * 2**self.warmup_factor)
        return lr


ONE_DEVICE = Recipe(
    loss_scale="128",
    lr_decay_epochs=(44, 55),
    evaluation=(40, 50, 55, 60, 65, 70, 75, 80, 85),
)

RECIPES: dict[str, Recipe] = {
    "1p": ONE_DEVICE,
    "8p": Recipe(lr=3.2e-3, weight_decay=7.5e-4),
    # From a checkpoint, whose network it takes: the recipe of one device without rounding and
    # without a target to stop at. The schedule follows --epochs.
    "finetune": replace(
        ONE_DEVICE,
        lr_step=0.0,
        lr_decay_epochs=(),
        lr_decay_at=DECAYS,
        evaluation=(),
        eval_interval=AUTOMATIC,
        threshold=0.0,
    ),
    # Minutes on two CPU cores, for the built-in sample set, from random initialisation: a smaller
    # network and batch, and a warm-up because nothing is pretrained.
    "quickstart": Recipe(
        name="SSD-ResNet10",
        backbone="resnet10",
        augment=False,
        batch_size=8,
        epochs=8,
        lr=8e-2,
        lr_step=0,
        lr_decay_epochs=(7,),
        warmup=60,
        warmup_factor=0,
        clip_norm=10.0,
        evaluation=(2, 4, 6),
        threshold=0.0,
        eval_batch_size=8,
    ),
}
