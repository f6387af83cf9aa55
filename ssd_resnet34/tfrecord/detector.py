"""A trained detector of the TFRecord recipe: images in, detections out.

from ssd_resnet34.tfrecord.detector import Detector

detector = Detector.load("result_npu/best.pt")
detections = detector("street.jpg")
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common.coco.detections import Detections
from common.coco.images import to_array
from common.coco.metrics import BEST, lowest_scores
from common.errors import UserError
from common.npu import checkpoint
from common.npu.device import memory_format, setup_device
from common.npu.precision import Precision, inference_precision
from common.npu.weights import LoadReport, name_of, named_classes
from ssd_resnet34.data import normalise
from ssd_resnet34.tfrecord.config import EVALUATION_FOLDER, RECIPES, Recipe
from ssd_resnet34.tfrecord.data import resize
from ssd_resnet34.tfrecord.index import names_of_categories
from ssd_resnet34.tfrecord.model import build_model
from ssd_resnet34.tfrecord.postprocess import detect
from ssd_resnet34.tfrecord.weights import (
    load_weights,
    num_classes_of,
    recipe_of_checkpoint,
)

ImageLike = str | Path | Image.Image | np.ndarray  # an array is (H, W, 3) uint8 RGB


class Detector:
    """A network with trained weights, in evaluation mode on a device.

    `recipe` holds the numbers of its post-processing, `class_names` the names of the labels,
    `report` what became of each tensor of the checkpoint, `precision` that of the network. Several
    threads may call it at the same time.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        class_names: tuple[str, ...],
        device: torch.device,
        report: LoadReport,
        precision: Precision | None = None,
    ):
        self.model = model
        self.recipe = recipe
        self.class_names = class_names
        self.device = device
        self.report = report
        self.precision = precision or Precision(device)
        self.min_scores: Tensor | None = None  # (C,) of each class, besides the recipe's

    @staticmethod
    def load(
        path: str | Path,
        device: str = "auto",
        recipe: Recipe | None = None,
        precision: str = "fp32",
        score_threshold: float | str | None = None,
    ) -> "Detector":
        """Load a checkpoint of this recipe onto a device ("auto", "npu", "cuda", "cpu").

        `recipe`, by default `RECIPES["port"]`, gives what the file does not say, such as the
        network of another project's file. `precision` is "fp32", "fp16" or "bf16"; a
        `score_threshold` replaces the recipe's; "best" is for each class the score with the best
        F1, from the evaluation beside the file. Raise UserError for a file that lacks weights of
        the detector, for a device or a precision that does not work, and for scores that are not
        there.
        """
        chosen_device, _ = setup_device(device)
        recipe = recipe or RECIPES["port"]
        detector = Detector.from_checkpoint(checkpoint.load(path), recipe, chosen_device)
        detector.precision = inference_precision(chosen_device, precision)
        if score_threshold == BEST:
            scores = lowest_scores(BEST, path, detector.class_names, EVALUATION_FOLDER)
            detector.min_scores = torch.tensor(scores)
        elif score_threshold is not None:
            detector.recipe = replace(detector.recipe, score_threshold=score_threshold)
        return detector

    @staticmethod
    def from_checkpoint(state: Mapping, recipe: Recipe, device: torch.device) -> "Detector":
        """Build the detector of a loaded checkpoint; `recipe` gives what the file does not say."""
        recipe = recipe_of_checkpoint(recipe, state)
        model = build_model(recipe, num_classes_of(state))
        report = load_weights(model, state).require_complete(name_of(state))
        model.to(device, memory_format=memory_format(device)).eval()
        names = named_classes(state)
        if names is None:
            num_ids = len(recipe.category_ids)
            if num_ids != num_classes_of(state):
                raise UserError(
                    f"{name_of(state)}: does not name its {num_classes_of(state)} classes, and "
                    f"--category_ids are {num_ids}",
                    "give --category_ids, as many as it has classes",
                )
            names = names_of_categories(recipe.category_ids, categories=())
        return Detector(model, recipe, tuple(names), device, report)

    def __call__(self, images: ImageLike | list[ImageLike]) -> Detections | list[Detections]:
        """Detect on an image, or on a list of them, which gives a list of Detections.

        An image is a path, a PIL image or an array (H, W, 3) uint8 RGB.
        """
        if not isinstance(images, list):
            return self.detect_batch([to_array(images)])[0]
        return self.detect_batch([to_array(image) for image in images])

    def detect_batch(self, images: list[np.ndarray]) -> list[Detections]:
        """Return the detections of images (H, W, 3) uint8 RGB.

        At most `eval_batch_size` of them go through the network at once.
        """
        batch_size = self.recipe.eval_batch_size
        detections = []
        for first in range(0, len(images), batch_size):
            batch = images[first : first + batch_size]
            detections += self.finish(self.run_network(self.prepare(batch)), batch)
        return detections

    def prepare(self, images: list[np.ndarray]) -> Tensor:
        """Return the network's input (N, 3, side, side) on the device."""
        resized = [resize(image, self.recipe.image_size) for image in images]
        return normalise(torch.stack(resized).to(self.device), self.recipe)

    @torch.no_grad()
    def run_network(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the raw outputs, in the detector's precision."""
        with self.precision.autocast():
            return self.model(inputs)

    def finish(self, outputs: tuple[Tensor, Tensor], images: list[np.ndarray]) -> list[Detections]:
        """Return the detections of images from the network's raw outputs."""
        sizes = torch.tensor([image.shape[:2] for image in images])
        detections = []
        for image, of_image in zip(images, detect(outputs, sizes, self.recipe), strict=True):
            if self.min_scores is not None:
                of_image = of_image.from_scores(self.min_scores)
            detections.append(replace(of_image, class_names=self.class_names, image=image))
        return detections
