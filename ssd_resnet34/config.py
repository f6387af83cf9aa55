"""The recipe: every number of SSD300-ResNet34, and the presets by name.

Source, unless a field says otherwise: MLPerf training v0.7, NVIDIA's SSD submission, as its Ascend
port runs it. A flag of the same name (dash or underscore) overrides a field for one run.
"""

from bisect import bisect_right
from dataclasses import asdict, dataclass, field, replace


def option(default, help_text, *flags):
    return field(default=default, metadata={"help": help_text, "flags": flags})


@dataclass(frozen=True)
class Recipe:
    name: str = option("SSD-ResNet34", "network name in logs and file names")

    # Network
    backbone: str = option("resnet34", "resnet18, resnet34, resnet50, or resnet10 for quick tries")
    image_size: int = 300  # side of the square network input, pixels; the priors fit no other

    # Default boxes ("priors"), SSD paper section 2.2, sizes of the SSD300 COCO model
    anchor_sizes: tuple[float, ...] = (21, 45, 99, 153, 207, 261, 315)  # pixels, one more than maps
    anchor_maps: tuple[int, ...] = (38, 19, 10, 5, 3, 1)
    anchor_steps: tuple[int, ...] = (8, 16, 32, 64, 100, 300)  # pixels
    anchor_ratios: tuple[tuple[int, ...], ...] = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
    center_variance: float = 0.1
    size_variance: float = 0.2

    # Input
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # RGB in 0..1, ImageNet
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    # Augmentation
    augment: bool = option(True, "random crop, flip and colour while training")
    crop_ious: tuple[float | None, ...] = (None, 0.1, 0.3, 0.5, 0.7, 0.9, float("-inf"))
    crop_scale: tuple[float, float] = (0.3, 1.0)  # side of the crop, part of the image's
    crop_ratio: tuple[float, float] = (0.5, 2.0)  # width / height, both in parts of the image
    flip_probability: float = 0.5
    brightness: float = 0.125  # factor 1 +- this
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.05  # turns, +- this

    # Matching and loss, SSD paper section 2.2
    match_iou: float = 0.5  # a prior is positive above this
    negative_ratio: int = 3  # hard negatives a positive

    # Optimisation
    batch_size: int = option(32, "images per process", "-b")
    epochs: int = option(90, "passes over the training set", "-e")
    lr: float = option(2.68e-3, "learning rate for 32 images, before rounding to lr_step")
    lr_step: float = option(2.5e-3, "the scaled rate is rounded to a multiple of this; 0: not")
    lr_decay_epochs: tuple[int, ...] = option((45, 58, 84), "epochs that start with a decay")
    lr_decay_factor: float = option(0.1, "factor of a decay")
    warmup: int = option(0, "warm-up iterations; 0: none")
    warmup_factor: int = option(1, "warm-up starts at 1 - 2**-factor of the rate")
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(5e-4, "decay of every parameter, BN and biases too", "--wd")
    clip_norm: float = option(0.0, "clip the gradient's global norm; 0: not")
    amp: str = option("O2", "precision on npu and cuda: O0, O1, O2")
    loss_scale: str = option("32", "'dynamic' or a number; used with fp16 only")

    # Evaluation
    evaluation: tuple[int, ...] = option(
        (60, 65, 70, 75, 80, 85), "evaluate after these epochs; the last one always"
    )
    threshold: float = option(0.23, "stop when AP reaches this; 0: never", "-t")
    eval_batch_size: int = option(32, "images per process in evaluation")
    score_threshold: float = option(0.05, "a detection scores more than this")
    nms_iou: float = option(0.5, "a box overlapping a better one by more is dropped")
    max_per_class: int = option(200, "candidates per class before NMS")
    max_detections: int = option(200, "detections per image")

    def listing(self) -> str:
        """One line a field, for the log."""
        return "\n".join(f"{key} = {value!r}" for key, value in asdict(self).items())

    def base_lr(self, world_size: int, batch_size: int) -> float:
        """The rate before warm-up and decay, for the global batch (`world_size * batch_size`)."""
        scaled = self.lr * (world_size * batch_size) / 32
        if not self.lr_step:
            return scaled
        return self.lr_step * max(1, round(scaled / self.lr_step))

    def lr_at(
        self, iteration: int, iters_per_epoch: int, world_size: int, batch_size: int
    ) -> float:
        """Learning rate of a 0-based iteration.

        As in the original, the last warm-up value, a little below the base rate, stays until the
        first decay.
        """
        decays = bisect_right(sorted(self.lr_decay_epochs), iteration // iters_per_epoch)
        lr = self.base_lr(world_size, batch_size)
        lr *= self.lr_decay_factor**decays
        warming = min(iteration, self.warmup - 1)
        if iteration < self.warmup or (self.warmup and decays == 0):
            lr -= (self.warmup - warming) * lr / (self.warmup * 2**self.warmup_factor)
        return lr


_1P = Recipe(loss_scale="128", lr_decay_epochs=(44, 55), evaluation=(40, 50, *range(55, 86, 5)))

RECIPES: dict[str, Recipe] = {
    "1p": _1P,
    "8p": Recipe(lr=3.2e-3, weight_decay=7.5e-4),
    # Finetuning from a checkpoint: the rule of one device, no target to stop at.
    "finetune": replace(_1P, threshold=0.0),
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
        evaluation=(),
        threshold=0.0,
        eval_batch_size=8,
    ),
}
