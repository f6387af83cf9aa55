#!/usr/bin/env python3
"""Export the TFRecord recipe's SSD300-ResNet34 to ONNX, checked with onnxruntime against torch.

    python3 pthtar2onnx.py --checkpoint FILE                        raw outputs
    python3 pthtar2onnx.py --checkpoint FILE --outputs=decoded      boxes and scores
    python3 pthtar2onnx.py --checkpoint FILE --outputs=detections   with the NMS inside

Input: `image` (N, 3, 300, 300) float32, N free or --batch. Raw outputs: `offsets` (N, 4, 8732), the
deltas of anchors.py, and `logits` (N, 1 + classes, 8732), whose channel 0 is the background.
Decoded: `boxes` (N, 8732, 4) and `scores` (N, classes, 8732), without the background. Detections,
best first: `boxes` (N, M, 4), `scores` (N, M), 0 where there is no detection any more, and `labels`
(N, M) int64. How to prepare the input, the class names and the numbers of the NMS are in the file's
metadata.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common.npu.interpreter  # noqa: F401 before torch

# isort: split

import functools
import json
from argparse import Namespace

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
from ssd_resnet34.postprocess import start_candidates
from ssd_resnet34.tfrecord.anchors import make_anchors
from ssd_resnet34.tfrecord.config import RECIPES, Recipe
from ssd_resnet34.tfrecord.data import prepare_image
from ssd_resnet34.tfrecord.detector import Detector
from ssd_resnet34.tfrecord.postprocess import (
    CLAMPED_VALUE,
    clamp_boxes,
    decode_outputs,
    finish_detect,
    suppressing_iou,
)
from ssd_resnet34.tfrecord.weights import recipe_of_checkpoint

# Numbers of the recipe that a deployer needs.
DEPLOYED_FIELDS = (
    "mean",
    "std",
    "center_variance",
    "size_variance",
    "score_threshold",
    "nms_iou",
    "max_per_class",
    "max_detections",
    "clamp_boxes",
)


class Raw(nn.Module):
    """The network with deltas (N, 4, P) and logits (N, 1 + classes, P) as outputs, in fp32."""

    output_names = ("offsets", "logits")

    def __init__(self, network: nn.Module, recipe: Recipe):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        deltas, logits = self.network(images)
        return deltas.float(), logits.float()


class Decoded(nn.Module):
    """The network with boxes (N, P, 4) normalised xyxy and scores (N, classes, P) as outputs."""

    output_names = ("boxes", "scores")

    def __init__(self, network: nn.Module, recipe: Recipe):
        super().__init__()
        self.network = network
        self.recipe = recipe
        self.register_buffer("anchors", make_anchors(recipe))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        boxes, scores = decode_outputs(self.network(images), self.anchors, self.recipe)
        if self.recipe.clamp_boxes:
            boxes = clamp_boxes(boxes)
        return boxes, scores


class Candidates(nn.Module):
    """The network with decoded outputs and what the NMS in the graph chooses from.

    Of each class that is the `max_per_class` highest scores; all others are set to 0.
    """

    output_names = ("decoded_boxes", "decoded_scores", "nms_scores")

    def __init__(self, network: nn.Module, recipe: Recipe):
        super().__init__()
        self.decoded = Decoded(network, recipe)
        self.max_per_class = recipe.max_per_class

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        boxes, scores = self.decoded(images)
        count = min(self.max_per_class, scores.shape[2])
        best_scores, position = scores.topk(count, dim=2)
        nms_scores = torch.zeros_like(scores).scatter(2, position, best_scores)
        return boxes, scores, without_boundless(nms_scores, boxes)


OUTPUTS = {"raw": Raw, "decoded": Decoded, "detections": Candidates}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    require_packages()
    state = flags.checkpoint_to_use(args, Recipe.model)
    recipe = recipe_of_checkpoint(flags.chosen_recipe(args, RECIPES), state)
    recipe = flags.require_agreement(args, recipe, state)
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
        suppression = suppression_of(recipe)
        expected = functools.partial(expected_detections, recipe=recipe)
        graph = with_checked_nms(graph, suppression, images, args.batch, expected)
    describe(graph, deployment_notes(recipe, detector.class_names), recipe, DEPLOYED_FIELDS)
    write_graph(graph, args.output_file, args.opset)


def parse(argv: list[str] | None) -> Namespace:
    parser = flags.make_parser(__doc__, "files", recipes=RECIPES)
    parser.set_defaults(output_dir=Path("result_npu"))
    add_flags(parser, "ssd300_resnet34_tfrecord.onnx", outputs="raw")
    return parser.parse_args(argv)


def suppression_of(recipe: Recipe) -> Suppression:
    """Return the numbers of the NMS."""
    return Suppression(
        boxes="decoded_boxes",
        iou_boxes="decoded_boxes",
        iou=suppressing_iou(recipe),
        score_threshold=recipe.score_threshold,
        max_per_class=recipe.max_detections,
        max_detections=recipe.max_detections,
    )


def expected_detections(boxes: Tensor, scores: Tensor, recipe: Recipe) -> Detections:
    """Return torch's detections among boxes (P, 4) and scores (classes, P), normalised."""
    started = start_candidates(boxes.unsqueeze(0), scores.unsqueeze(0), recipe)
    return finish_detect(started, torch.tensor([[1, 1]]), recipe)[0]


def deployment_notes(recipe: Recipe, class_names: tuple[str, ...]) -> dict[str, str]:
    """Return what a deployer must know beside the recipe's numbers; lists are JSON."""
    size = recipe.image_size
    return {
        "classes": json.dumps(class_names),
        "input_size": json.dumps([size, size]),
        "preprocessing": "RGB, resized without keeping the aspect (bilinear, no antialias, output "
        f"pixel i at input position i * size / {size}), divided by 255, minus mean, divided by std",
        "boxes": "left, top, right, bottom, 0..1 of the image; the output `boxes` is clamped",
        "clamp": f"if clamp_boxes: a coordinate below 0 becomes {CLAMPED_VALUE}; then, where right "
        f"<= left, right becomes left + {CLAMPED_VALUE}, and likewise bottom and top",
        "offsets": "y and x of the centre shift / anchor size / variance, log of height and width "
        "ratio / variance",
        "logits": "background, then the classes; softmax over them gives scores",
        "labels": "position in classes",
        "nms": "per class; a box is dropped if its IoU with a better one is at least nms_iou",
    }


if __name__ == "__main__":
    entry.run(main)
