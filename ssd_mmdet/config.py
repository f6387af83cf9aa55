"""The recipe: every number of SSD300-VGG16 and SSD512-VGG16, and the presets by name.

The numbers come from the configs ssd300_coco and ssd512_coco of MMDetection 2.x, as its Ascend port
runs them, unless a comment names another source. A flag of the same name (with dashes or
underscores) overrides a field for one run.
"""

from bisect import bisect_right
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from common.schedule import AUTOMATIC, DECAYS, decays_done, limited_warmup

IMAGES_OF_LR = 64  # the global batch size for which `lr` is given: eight devices of eight images
NO_CROP = 1  # in `crop_ious`: not to crop


def option(default: Any, help_text: str, *flags: str) -> Any:
    """Declare a field that has a command-line flag; `flags` are further names of that flag."""
    return field(default=default, metadata={"help": help_text, "flags": flags})


@dataclass(frozen=True)
class Recipe:
    """All numbers of a run, each with its unit."""

    model: ClassVar[str] = "ssd_mmdet"  # what checkpoints call the writer
    name: str = option("SSD", "network name in logs and file names")

    # Network
    image_size: int = 300  # side of the square network input in pixels: 300 or 512
    width: float = option(
        1.0, "factor on the channels of VGG16 and of the extra layers, for quick tries"
    )

    # Anchors, in pixels of the network input; one entry for each feature map
    anchor_sizes: tuple[int, ...] = (21, 45, 99, 153, 207, 261, 315)  # and one entry more
    anchor_maps: tuple[int, ...] = (38, 19, 10, 5, 3, 1)  # cells along a side of the map
    anchor_strides: tuple[int, ...] = (8, 16, 32, 64, 100, 300)
    anchor_ratios: tuple[tuple[int, ...], ...] = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
    center_variance: float = 0.1
    size_variance: float = 0.2
    # The sides of a decoded box are at most this times the anchor's, and at least its inverse.
    size_ratio_limit: float = 1000 / 16

    # Input
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # RGB in 0..255, of ImageNet

    # Augmentation
    augment: bool = option(True, "colour jitter, expansion, random crop and flip while training")
    brightness: float = 32.0  # grey levels added, from -brightness to +brightness
    contrast: tuple[float, float] = (0.5, 1.5)  # range of the factor
    saturation: tuple[float, float] = (0.5, 1.5)  # range of the factor
    hue: float = 18.0  # degrees added, from -hue to +hue
    expand_probability: float = 0.5
    expand_ratio: tuple[float, float] = (1.0, 4.0)  # side of the canvas over side of the image
    crop_ious: tuple[float, ...] = (NO_CROP, 0.1, 0.3, 0.5, 0.7, 0.9, 0)  # smallest IoU of a crop
    crop_trials: int = 50  # windows that are tried before another IoU is drawn
    crop_scale: float = 0.3  # smallest side of the crop over side of the image
    crop_ratio: tuple[float, float] = (0.5, 2.0)  # height over width of the crop, both in pixels
    flip_probability: float = 0.5

    # Matching and loss, SSD paper, section 2.2
    match_iou: float = 0.5  # an anchor with at least this IoU is positive
    negative_ratio: int = 3  # hard negatives for each positive

    # Optimisation
    batch_size: int = option(8, "images per process", "-b")
    epochs: int = option(
        24, "epochs of `repeat` passes over the training set", "-e", "--train-epochs"
    )
    repeat: int = option(5, "passes over the training set in an epoch")
    balance: float = option(
        0.0,
        "images come more often if they have a class that less than this share of the images has "
        "(0: off)",
    )
    lr: float = option(2e-3, "learning rate for a global batch of 64 images")
    lr_decay_epochs: tuple[int, ...] = option(
        (16, 22), "epochs (from 0) at whose start the learning rate decays"
    )
    # Fractions of the run after which the rate decays where `lr_decay_epochs` is empty
    lr_decay_at: tuple[float, ...] = ()
    lr_decay_factor: float = option(0.1, "factor on the learning rate at each decay")
    warmup: int = option(500, "iterations of warm-up (0: no warm-up)")
    warmup_ratio: float = option(
        0.001, "factor on the learning rate at the first iteration of the warm-up"
    )
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(5e-4, "weight decay of all parameters, biases included", "--wd")
    clip_norm: float = option(0.0, "largest global norm of the gradient (0: no clipping)")
    amp: str = option("O1", "precision on npu and cuda: O0, O1 or O2")
    loss_scale: str = option("128", "'dynamic' or a number; used in fp16, on a 910A always")

    # Evaluation
    evaluation: tuple[int, ...] = option(
        tuple(range(1, 25)), "epochs after which to evaluate; the last one always counts"
    )
    eval_interval: int = option(
        0,
        "epochs from one evaluation to the next, besides those of --evaluation; 0: none, -1: a "
        "tenth of the run where --evaluation names none",
    )
    threshold: float = option(0.0, "stop as soon as AP reaches this (0: never)", "-t")
    eval_batch_size: int = option(8, "images per process in evaluation")
    score_threshold: float = option(0.02, "detections have a score above this")
    nms_iou: float = option(0.45, "NMS drops a box with an IoU above this with a better box")
    max_detections: int = option(200, "largest number of detections in an image")

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

        It rises linearly during the warm-up and is multiplied by `lr_decay_factor` at the start of
        each epoch of `lr_decay_epochs`. Without these the schedule follows the length of the run:
        it decays after the fractions of `lr_decay_at`, and limits the warm-up.
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
        if iteration < warmup:
            progress = iteration / warmup
            lr *= 1 - (1 - progress) * (1 - self.warmup_ratio)
        return lr


SSD300 = Recipe()
SSD512 = replace(
    SSD300,
    name="SSD512",
    image_size=512,
    anchor_sizes=(20, 51, 133, 215, 296, 378, 460, 542),
    anchor_maps=(64, 32, 16, 8, 4, 2, 1),
    anchor_strides=(8, 16, 32, 64, 128, 256, 512),
    anchor_ratios=((2,), (2, 3), (2, 3), (2, 3), (2, 3), (2,), (2,)),
)

RECIPES: dict[str, Recipe] = {
    # One device and eight devices share a recipe, because the learning rate follows the global
    # batch. The names are those of the launch scripts.
    "1p": SSD300,
    "8p": SSD300,
    "ssd512": SSD512,
    # From a checkpoint, whose network it takes; the schedule follows --epochs. An epoch is one pass
    # over the images, as in the other models; by default there are as many passes as in the rest.
    "finetune": replace(
        SSD300,
        epochs=120,
        repeat=1,
        lr_decay_epochs=(),
        lr_decay_at=DECAYS,
        evaluation=(),
        eval_interval=AUTOMATIC,
    ),
}
