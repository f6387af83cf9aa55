#!/usr/bin/env python3
"""Export SSD300-ResNet34 to ONNX, checked with onnxruntime against torch on real images.

    python3 pthtar2onnx.py --checkpoint FILE             raw outputs
    python3 pthtar2onnx.py --checkpoint FILE --decoded   boxes and scores

Input: `image` (N, 3, 300, 300) float32, N free. Raw outputs: `offsets` (N, 4, 8732), the deltas of
anchors.py, and `logits` (N, 1 + classes, 8732), whose channel 0 is the background. Decoded: `boxes`
(N, 8732, 4) and `scores` (N, classes, 8732), without the background. How to prepare the input, the
class names and the numbers of the NMS are in the file's metadata.
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
from common.export import compare, describe, export_graph, inputs_to_check, require_packages
from common.files import write_atomically
from common.npu import entry
from common.npu.weights import notes_on_class_names
from ssd_resnet34.anchors import make_anchors
from ssd_resnet34.config import RECIPES, Recipe
from ssd_resnet34.data import prepare_image
from ssd_resnet34.detector import Detector
from ssd_resnet34.old_flags import OLD_FLAGS
from ssd_resnet34.postprocess import decode_outputs
from ssd_resnet34.weights import recipe_of_checkpoint

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
)


class Decoded(nn.Module):
    """The network with boxes (N, P, 4) normalised xyxy and scores (N, classes, P) as outputs."""

    def __init__(self, network: nn.Module, recipe: Recipe):
        super().__init__()
        self.network = network
        self.recipe = recipe
        self.register_buffer("anchors", make_anchors(recipe))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return decode_outputs(self.network(images), self.anchors, self.recipe)


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
    if args.decoded:
        network = Decoded(detector.model, recipe).eval()
        output_names = ["boxes", "scores"]
    else:
        network = detector.model
        output_names = ["offsets", "logits"]

    image_size = (recipe.image_size, recipe.image_size)
    graph = export_graph(network, image_size, "image", output_names, args.opset)
    images = inputs_to_check(args.images, functools.partial(prepare_image, recipe=recipe))
    for batch in (images[:1], images):
        difference = compare(graph, network, batch)
        print(f"onnxruntime against torch, batch {len(batch)}: {difference}")
    describe(graph, deployment_notes(recipe, detector.class_names), recipe, DEPLOYED_FIELDS)
    write_atomically(args.output_file, graph.SerializeToString())
    mebibytes = graph.ByteSize() / 2**20
    print(f"{args.output_file}: {mebibytes:.1f} MiB, opset {args.opset}")


def parse(argv: list[str] | None) -> Namespace:
    parser = flags.make_parser(
        __doc__.split("\n")[0], "files", recipes=RECIPES, old_flags=OLD_FLAGS
    )
    flags.add(parser, "--output-file", Path("ssd300_resnet34.onnx"), "file to write")
    flags.add(parser, "--decoded", False, "boxes and scores instead of raw outputs")
    flags.add(parser, "--opset", 17, "version of ONNX's operator set")
    parser.add_argument("--images", nargs="+", help="to check with; default: sample images")
    return parser.parse_args(argv)


def deployment_notes(recipe: Recipe, class_names: tuple[str, ...]) -> dict[str, str]:
    """Return what a deployer must know beside the recipe's numbers; lists are JSON."""
    return {
        "classes": json.dumps(class_names),
        "input_size": json.dumps([recipe.image_size, recipe.image_size]),
        "preprocessing": "RGB, resized without keeping the aspect (bilinear, antialias), "
        "divided by 255, minus mean, divided by std",
        "boxes": "left, top, right, bottom, 0..1 of the image",
        "offsets": "centre shift / anchor size / variance, log of size ratio / variance",
        "logits": "background, then the classes; softmax over them gives scores",
    }


if __name__ == "__main__":
    entry.run(main)
