"""A trained detector: images in, detections out.

    from fcos.detector import Detector

    detector = Detector.load("best.pt")
    found = detector("street.jpg")  # found.boxes, .scores, .labels, .names, .draw()

evaluate.py, demo.py and the export start from it, as a user's own program does.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common.coco.detections import Detections
from common.coco.images import to_array
from common.coco.metrics import BEST, lowest_scores
from common.npu import checkpoint
from common.npu.device import memory_format, setup_device
from common.npu.precision import Precision, inference_precision
from common.npu.weights import LoadReport, name_of
from fcos.config import RECIPES, Recipe
from fcos.data import evaluation_canvas, evaluation_recipe, kernel_choice, normalise
from fcos.model import Outputs, build_model
from fcos.postprocess import detect
from fcos.weights import (
    as_evaluated,
    class_names_of,
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
        """Load a checkpoint, ours or MMDetection's, onto a device ("auto", "npu", "cuda", "cpu").

        `recipe`, by default `RECIPES["gn"]`, gives what the file does not say, such as the
        network of another project's file. `precision` is "fp32", "fp16" or "bf16"; a
        `score_threshold` replaces the recipe's; "best" is for each class the score with the best
        F1, from the evaluation beside the file. Raise UserError for a file that lacks weights of
        the detector, for a device or a precision that does not work, and for scores that are not
        there.
        """
        chosen_device, _ = setup_device(device)
        recipe = recipe or RECIPES["gn"]
        detector = Detector.from_checkpoint(checkpoint.load(path), recipe, chosen_device)
        detector.precision = inference_precision(chosen_device, precision)
        if score_threshold == BEST:
            scores = lowest_scores(BEST, path, detector.class_names)
            detector.min_scores = torch.tensor(scores)
        elif score_threshold is not None:
            detector.recipe = replace(detector.recipe, score_threshold=score_threshold)
        return detector

    @staticmethod
    def from_checkpoint(
        state: Mapping, recipe: Recipe, device: torch.device, user_fields: Collection[str] = ()
    ) -> "Detector":
        """Build the detector of a loaded checkpoint; `recipe` gives what the file does not say.

        One of our checkpoints also says the scale at which its run evaluated it. `user_fields` are
        the names of the fields that the user has set by flags, which stay.
        """
        recipe = recipe_of_checkpoint(recipe, state, user_fields)
        recipe = as_evaluated(recipe, state, user_fields)
        recipe = evaluation_recipe(recipe, device)
        model = build_model(recipe, num_classes_of(state))
        report = load_weights(model, state).require_complete(name_of(state))
        model.to(device, memory_format=memory_format(device)).eval()
        return Detector(model, recipe, class_names_of(state), device, report)

    def __call__(self, images: ImageLike | list[ImageLike]) -> Detections | list[Detections]:
        """Detect on an image, or on a list of them, which gives a list of Detections.

        An image is a path, a PIL image or an array (H, W, 3) uint8 RGB.
        """
        if not isinstance(images, list):
            return self.detect_image(to_array(images))
        return self.detect_batch([to_array(image) for image in images])

    def detect_batch(self, images: list[np.ndarray]) -> list[Detections]:
        """Return the detections of images (H, W, 3) uint8 RGB."""
        return [self.detect_image(image) for image in images]

    def detect_image(self, image: np.ndarray) -> Detections:
        """Return the detections of an image (H, W, 3) uint8 RGB.

        It goes through the network by itself, since each image has a shape of its own.
        """
        (detections,) = self.finish(self.run_network(self.prepare([image])), [image])
        return detections

    def prepare(self, images: list[np.ndarray]) -> Tensor:
        """Return the network's input (N, 3, height, width) on the device, of images of one size."""
        canvases = []
        resized_sizes = []
        for image in images:
            canvas, resized_size = evaluation_canvas(image, self.recipe)
            canvases.append(canvas)
            resized_sizes.append(resized_size)
        batch = torch.stack(canvases).to(self.device)
        return normalise(batch, torch.tensor(resized_sizes).to(self.device), self.recipe)

    @torch.no_grad()
    def run_network(self, inputs: Tensor) -> Outputs:
        """Return the raw outputs, in the detector's precision."""
        with kernel_choice(self.recipe.eval_shapes), self.precision.autocast():
            return self.model(inputs)

    def finish(self, outputs: Outputs, images: list[np.ndarray]) -> list[Detections]:
        """Return the detections of images from the network's raw outputs."""
        sizes = torch.tensor([image.shape[:2] for image in images])
        detections = []
        for image, of_image in zip(images, detect(outputs, sizes, self.recipe), strict=True):
            if self.min_scores is not None:
                of_image = of_image.from_scores(self.min_scores)
            detections.append(replace(of_image, class_names=self.class_names, image=image))
        return detections
