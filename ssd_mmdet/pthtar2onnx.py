#!/usr/bin/env python3
"""Export SSD-VGG16 to ONNX, checked with onnxruntime against torch on real images.

    python3 pthtar2onnx.py --checkpoint FILE                     detections, with the NMS inside
    python3 pthtar2onnx.py --checkpoint FILE --outputs=decoded   boxes and scores
    python3 pthtar2onnx.py --checkpoint FILE --outputs=raw       raw outputs

Input: `image` (N, 3, S, S) float32, N free or --batch; S is 300 or 512. Detections, best first:
`boxes` (N, M, 4), `scores` (N, M), 0 where there is no detection any more, and `labels` (N, M)
int64. Decoded: `boxes` (N, P, 4) and `scores` (N, P, classes). Raw: `offsets` (N, P, 4), the deltas
of anchors.py, and `logits` (N, P, classes + 1), the background last. Boxes are in pixels of the
network input. How to prepare it, the class names and the numbers of the NMS are in the file's
metadata.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common.npu.interpreter  # noqa: F401 before torch

# isort: split

import functools
import json
from argparse import Namespace

import torch
from torch import Tensor, nn

from common import flags
from common.coco.detections import Detections
from common.errors import UserError
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
    write_graph,
)
from common.npu import entry
from common.npu.weights import notes_on_class_names
from ssd_mmdet.anchors import make_anchors
from ssd_mmdet.config import RECIPES, Recipe
from ssd_mmdet.data import prepare_image
from ssd_mmdet.detector import Detector
from ssd_mmdet.postprocess import decode_outputs, host_candidates, suppress

# Numbers of the recipe that a deployer needs.
DEPLOYED_FIELDS = (
    "mean",
    "center_variance",
    "size_variance",
    "score_threshold",
    "nms_iou",
    "max_detections",
)
NO_STD = (1.0, 1.0, 1.0)  # the network's input is not divided


class Raw(nn.Module):
    """The network with deltas (N, P, 4) and logits (N, P, classes + 1) as outputs, in fp32."""

    output_names = ("offsets", "logits")

    def __init__(self, network: nn.Module, recipe: Recipe):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        deltas, logits = self.network(images)
        return deltas.float(), logits.float()


class Decoded(nn.Module):
    """The network with boxes (N, P, 4) xyxy in its pixels and scores (N, P, classes) as outputs."""

    output_names = ("boxes", "scores")

    def __init__(self, network: nn.Module, recipe: Recipe):
        super().__init__()
        self.network = network
        self.recipe = recipe
        self.register_buffer("anchors", make_anchors(recipe))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return decode_outputs(self.network(images), self.anchors, self.recipe)


class Candidates(nn.Module):
    """The network with decoded outputs and what the NMS in the graph chooses from: all of them."""

    output_names = ("decoded_boxes", "decoded_scores", "nms_scores")

    def __init__(self, network: nn.Module, recipe: Recipe):
        super().__init__()
        self.decoded = Decoded(network, recipe)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        boxes, scores = self.decoded(images)
        return boxes, scores, scores.transpose(1, 2)


OUTPUTS = {"raw": Raw, "decoded": Decoded, "detections": Candidates}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    require_packages()
    state = flags.checkpoint_to_use(args, Recipe.model)
    detector = Detector.from_checkpoint(state, RECIPES["1p"], torch.device("cpu"))
    recipe = detector.recipe
    print(f"{state['path']}: {detector.report}")
    for line in notes_on_class_names(state, detector.class_names):
        print(line)
    require_input(recipe, args.shape, args.mean, args.std)

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
    print(f"Successfully exported ONNX model: {args.output_file}")


def parse(argv: list[str] | None) -> Namespace:
    parser = flags.make_parser(__doc__, "files")
    add_flags(parser, "ssd300.onnx", outputs="detections")
    flags.add(parser, "--shape", (), "side, or height and width; checked only")
    flags.add(parser, "--mean", RECIPES["1p"].mean, "checked only: `image` has it subtracted")
    flags.add(parser, "--std", NO_STD, "checked only: `image` is not divided")
    flags.add(parser, "--config", "", "no effect: the checkpoint shows its network")
    flags.add(parser, "--show", False, "no effect: no window opens")
    flags.add(parser, "--verify", True, "no effect: what is written has always been verified")
    args = parser.parse_args(argv)
    if args.config:
        print("--config has no effect: the checkpoint shows its network")
    if args.show:
        print("--show has no effect: no window opens")
    return args


def require_input(recipe: Recipe, shape: list[int], mean: list[float], std: list[float]) -> None:
    """Raise UserError where the flags of old commands contradict what the network takes."""
    for side in shape:
        if side != recipe.image_size:
            raise UserError(f"--shape {shape}: this network takes {recipe.image_size} pixels")
    if tuple(mean) != recipe.mean or tuple(std) != NO_STD:
        numbers = " ".join(str(value) for value in recipe.mean)
        raise UserError(
            f"--mean, --std: this network takes --mean {numbers} --std 1 1 1; omit both"
        )


def suppression_of(recipe: Recipe) -> Suppression:
    """Return the numbers of the NMS."""
    return Suppression(
        boxes="decoded_boxes",
        iou_boxes="decoded_boxes",
        iou=recipe.nms_iou,
        score_threshold=recipe.score_threshold,
        max_per_class=recipe.max_detections,
        max_detections=recipe.max_detections,
    )


def expected_detections(boxes: Tensor, scores: Tensor, recipe: Recipe) -> Detections:
    """Return torch's detections among boxes (P, 4) and scores (P, classes) of an image."""
    candidates = host_candidates(boxes, scores, recipe)
    return suppress(candidates, [recipe.image_size, recipe.image_size], recipe)


def deployment_notes(recipe: Recipe, class_names: tuple[str, ...]) -> dict[str, str]:
    """Return what a deployer must know beside the recipe's numbers; lists are JSON."""
    return {
        "classes": json.dumps(class_names),
        "input_size": json.dumps([recipe.image_size, recipe.image_size]),
        "preprocessing": "RGB 0..255, resized without keeping the aspect (bilinear, no antialias), "
        "minus mean",
        "boxes": "left, top, right, bottom, pixels of the network input",
        "offsets": "centre shift / anchor size / variance, log of size ratio / variance",
        "logits": "the classes, then background; softmax over them gives scores",
        "labels": "position in classes",
    }


if __name__ == "__main__":
    entry.run(main)
