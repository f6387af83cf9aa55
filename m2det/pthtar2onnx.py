#!/usr/bin/env python3
"""Export M2Det to ONNX, checked with onnxruntime against torch on real images.

    python3 pthtar2onnx.py --checkpoint FILE                        raw outputs
    python3 pthtar2onnx.py --checkpoint FILE --outputs=decoded      boxes and scores
    python3 pthtar2onnx.py --checkpoint FILE --outputs=detections   with the hard NMS inside

Input: `image` (N, 3, S, S) float32, N free or --batch. Raw outputs: `offsets` (N, P, 4), the deltas
of anchors.py, and `logits` (N, P, 1 + classes); P is the number of anchors. Decoded: `boxes` (N, P,
4) and `scores` (N, P, 1 + classes). Channel 0 of logits and scores is the background. Detections,
best first: `boxes` (N, M, 4), `scores` (N, M), 0 where there is no detection any more, and `labels`
(N, M) int64, the first class 0. How to prepare the input, the class names and the numbers of the
NMS are in the file's metadata.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common.npu.interpreter  # noqa: F401 before torch

# isort: split

import dataclasses
import functools
import json
from argparse import Namespace

import numpy as np
import torch
from torch import Tensor, nn

from common import flags
from common.coco.detections import Detections
from common.export import (
    HalfPrecision,
    Suppression,
    add_flags,
    check_outputs,
    describe,
    export_graph,
    inputs_to_check,
    require_packages,
    with_checked_nms,
    without_boundless,
    write_graph,
)
from common.npu import entry
from common.npu.weights import notes_on_class_names
from m2det.anchors import make_anchors
from m2det.config import RECIPES, Recipe
from m2det.data import prepare_image
from m2det.detector import Detector
from m2det.old_flags import OLD_FLAGS
from m2det.postprocess import decode_outputs, suppress
from m2det.weights import note_on_image_size, recipe_of_checkpoint

# Numbers of the recipe that a deployer needs.
DEPLOYED_FIELDS = (
    "mean",
    "center_variance",
    "size_variance",
    "score_threshold",
    "nms",
    "soft_nms_iou",
    "hard_nms_iou",
    "soft_nms_min_score",
    "max_per_class",
    "max_detections",
)


class Raw(nn.Module):
    """The network with deltas (N, P, 4) and logits (N, P, 1 + classes) as outputs, in fp32."""

    output_names = ("offsets", "logits")

    def __init__(self, network: nn.Module, recipe: Recipe):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        deltas, logits = self.network(images)
        return deltas.float(), logits.float()


class Decoded(nn.Module):
    """The network with boxes (N, P, 4) normalised xyxy and scores (N, P, 1 + classes).

    Channel 0 of the scores is the background.
    """

    output_names = ("boxes", "scores")

    def __init__(self, network: nn.Module, recipe: Recipe):
        super().__init__()
        self.network = network
        self.recipe = recipe
        self.register_buffer("anchors", make_anchors(recipe))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return decode_outputs(self.network(images), self.anchors, self.recipe)


class Candidates(nn.Module):
    """The network with decoded outputs and what the NMS in the graph chooses from.

    That is all of them. The IoU counts the last pixel of a box as inside, in pixels of the network
    input, where the detector counts those of the original image. Detections are clipped to 0..1.
    """

    output_names = ("decoded_boxes", "decoded_scores", "nms_clipped", "nms_boxes", "nms_scores")

    def __init__(self, network: nn.Module, recipe: Recipe):
        super().__init__()
        self.decoded = Decoded(network, recipe)
        self.image_size = recipe.image_size
        self.register_buffer("last_pixel", torch.tensor([0.0, 0.0, 1.0, 1.0]))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        boxes, scores = self.decoded(images)
        nms_boxes = boxes * self.image_size + self.last_pixel
        nms_scores = without_boundless(scores[:, :, 1:].transpose(1, 2), boxes)
        return boxes, scores, boxes.clamp(0, 1), nms_boxes, nms_scores


OUTPUTS = {"raw": Raw, "decoded": Decoded, "detections": Candidates}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    require_packages()
    state = flags.checkpoint_to_use(args, Recipe.model)
    recipe = recipe_of_checkpoint(flags.chosen_recipe(args, RECIPES), state)
    recipe = flags.require_agreement(args, recipe, state)
    note = note_on_image_size(args.recipe, recipe, state)
    if note is not None:
        print(note)
    detector = Detector.from_checkpoint(state, recipe, torch.device("cpu"))
    recipe = detector.recipe
    print(f"{state['path']}: {detector.report}")
    for line in notes_on_class_names(state, detector.class_names):
        print(line)
    model = HalfPrecision(detector.model) if args.half else detector.model
    network = OUTPUTS[args.outputs](model, recipe).eval()
    reference = OUTPUTS[args.outputs](detector.model, recipe).eval()

    image_size = (recipe.image_size, recipe.image_size)
    graph = export_graph(network, image_size, "image", network.output_names, args.opset, args.batch)
    prepare = functools.partial(prepare_image, recipe=recipe)
    images = inputs_to_check(args.images, prepare, at_least=args.batch or 3)
    check_outputs(graph, reference, images, args.batch, args.half)
    if args.outputs == "detections":
        print("the NMS inside is that of --nms=hard: ONNX has no operator for soft-NMS")
        suppression = suppression_of(recipe, len(detector.class_names))
        expected = functools.partial(expected_detections, recipe=recipe)
        graph = with_checked_nms(graph, suppression, images, args.batch, expected)
    describe(graph, deployment_notes(recipe, detector.class_names), recipe, DEPLOYED_FIELDS)
    write_graph(graph, args.output_file, args.opset)


def parse(argv: list[str] | None) -> Namespace:
    parser = flags.make_parser(__doc__, "files", recipes=RECIPES, old_flags=OLD_FLAGS)
    add_flags(parser, "m2det.onnx", outputs="raw")
    return parser.parse_args(argv)


def suppression_of(recipe: Recipe, num_classes: int) -> Suppression:
    """Return the numbers of the hard NMS."""
    return Suppression(
        boxes="nms_clipped",
        iou_boxes="nms_boxes",
        iou=recipe.hard_nms_iou,
        score_threshold=recipe.score_threshold,
        max_per_class=recipe.max_per_class,
        max_detections=recipe.max_detections or recipe.max_per_class * num_classes,
    )


def expected_detections(boxes: Tensor, scores: Tensor, recipe: Recipe) -> Detections:
    """Return torch's detections by hard NMS, in an image of the network input's size.

    All boxes, those among which it chooses (P, 4) as well, are normalised; scores are (P, 1 +
    classes).
    """
    recipe = dataclasses.replace(recipe, nms="hard")
    corner = np.full(4, recipe.image_size, np.float32)
    detections = suppress(boxes.numpy(), scores[:, 1:].numpy(), corner, recipe)
    return dataclasses.replace(detections, boxes=detections.boxes / recipe.image_size)


def deployment_notes(recipe: Recipe, class_names: tuple[str, ...]) -> dict[str, str]:
    """Return what a deployer must know beside the recipe's numbers; lists are JSON."""
    return {
        "classes": json.dumps(class_names),
        "input_size": json.dumps([recipe.image_size, recipe.image_size]),
        "preprocessing": "BGR in 0..255, resized without keeping the aspect (bilinear, no "
        "antialias), minus mean",
        "boxes": "left, top, right, bottom, 0..1 of the image",
        "offsets": "centre shift / anchor size / variance, log of size ratio / variance",
        "logits": "background, then the classes; softmax over them gives scores",
        "scores": "probabilities: background, then the classes",
        "labels": "position in classes",
    }


if __name__ == "__main__":
    entry.run(main)
