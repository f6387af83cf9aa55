"""The recipe: every number of SSD300-VGG16 and SSD512-VGG16, and the presets by name.

Source, unless a field says otherwise: MMDetection 2.x, configs ssd300_coco and ssd512_coco, as its
Ascend port runs them. A flag of the same name (dash or underscore) overrides a field for one run.
"""

from bisect import bisect_right
from dataclasses import asdict, dataclass, field, replace


def _option(default, help_text, *flags):
    return field(default=default, metadata={"help": help_text, "flags": flags})


@dataclass(frozen=True)
class Recipe:
    name: str = _option("SSD", "network name in logs and file names")

    # Network
    image_size: int = 300  # side of the square network input, pixels: 300 or 512
    width: float = _option(1.0, "part of the channels of VGG16 and extra layers, for quick tries")

    # Anchors, all in pixels of the network input
    anchor_sizes: tuple[int, ...] = (21, 45, 99, 153, 207, 261, 315)  # one more than maps
    anchor_maps: tuple[int, ...] = (38, 19, 10, 5, 3, 1)
    anchor_strides: tuple[int, ...] = (8, 16, 32, 64, 100, 300)
    anchor_ratios: tuple[tuple[int, ...], ...] = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
    center_variance: float = 0.1
    size_variance: float = 0.2
    size_ratio_limit: float = 1000 / 16  # decoded sides are at most this times the anchor's

    # Input
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # RGB in 0..255, ImageNet

    # Augmentation
    augment: bool = _option(True, "colour, expansion, random crop and flip while training")
    brightness: float = 32.0  # grey levels, +- this
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: float = 18.0  # degrees, +- this
    expand_probability: float = 0.5
    expand_ratio: tuple[float, float] = (1.0, 4.0)  # side of the canvas, times the image's
    crop_ious: tuple[float, ...] = (1, 0.1, 0.3, 0.5, 0.7, 0.9, 0)  # 1: no crop
    crop_trials: int = 50  # windows tried before the limit is drawn anew
    crop_scale: float = 0.3  # smallest side of the crop, part of the image's
    crop_ratio: tuple[float, float] = (0.5, 2.0)  # height / width in pixels
    flip_probability: float = 0.5

    # Matching and loss, SSD paper section 2.2
    match_iou: float = 0.5  # an anchor is positive from this on
    negative_ratio: int = 3  # hard negatives a positive

    # Optimisation
    batch_size: int = _option(8, "images per process", "-b")
    epochs: int = _option(
        24, "epochs of `repeat` passes over the training set", "-e", "--train-epochs"
    )
    repeat: int = _option(5, "passes over the training set in an epoch")
    lr: float = _option(2e-3, "learning rate for 64 images")
    lr_decay_epochs: tuple[int, ...] = _option((16, 22), "epochs that start with a decay")
    lr_decay_factor: float = _option(0.1, "factor of a decay")
    warmup: int = _option(500, "warm-up iterations; 0: none")
    warmup_ratio: float = _option(0.001, "warm-up starts at this part of the rate")
    momentum: float = _option(0.9, "momentum of SGD")
    weight_decay: float = _option(5e-4, "decay of every parameter, biases too", "--wd")
    clip_norm: float = _option(0.0, "clip the gradient's global norm; 0: not")
    amp: str = _option("O1", "precision on npu and cuda: O0, O1, O2")
    loss_scale: str = _option("128", "'dynamic' or a number; used with fp16 only")

    # Evaluation
    evaluation: tuple[int, ...] = _option(
        tuple(range(1, 25)), "evaluate after these epochs; the last one always"
    )
    threshold: float = _option(0.0, "stop when AP reaches this; 0: never", "-t")
    eval_batch_size: int = _option(8, "images per process in evaluation")
    score_threshold: float = _option(0.02, "a detection scores more than this")
    nms_iou: float = _option(0.45, "a box overlapping a better one by more is dropped")
    max_detections: int = _option(200, "detections per image")

    def listing(self) -> str:
        """One line a field, for the log."""
        return "\n".join(f"{key} = {value!r}" for key, value in asdict(self).items())

    def base_lr(self, world_size: int, batch_size: int) -> float:
        """The rate before warm-up and decay, for the global batch (`world_size * batch_size`)."""
        return self.lr * (world_size * batch_size) / 64

    def lr_at(
        self, iteration: int, iters_per_epoch: int, world_size: int, batch_size: int
    ) -> float:
        """Learning rate of a 0-based iteration."""
        decays = bisect_right(sorted(self.lr_decay_epochs), iteration // iters_per_epoch)
        lr = self.base_lr(world_size, batch_size) * self.lr_decay_factor**decays
        if iteration < self.warmup:
            lr *= 1 - (1 - iteration / self.warmup) * (1 - self.warmup_ratio)
        return lr


_SSD300 = Recipe()
_SSD512 = replace(
    _SSD300,
    name="SSD512",
    image_size=512,
    anchor_sizes=(20, 51, 133, 215, 296, 378, 460, 542),
    anchor_maps=(64, 32, 16, 8, 4, 2, 1),
    anchor_strides=(8, 16, 32, 64, 128, 256, 512),
    anchor_ratios=((2,), (2, 3), (2, 3), (2, 3), (2, 3), (2,), (2,)),
)

RECIPES: dict[str, Recipe] = {
    # One device or eight: the rate follows the number of images, nothing else differs.
    "1p": _SSD300,
    "8p": _SSD300,
    "ssd512": _SSD512,
}
