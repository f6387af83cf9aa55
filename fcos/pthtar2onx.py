#!/usr/bin/env python3
"""Export FCOS to ONNX, checked with onnxruntime against torch on real images.

    python3 pthtar2onx.py FILE.pth                 logits, distances, centerness (N, P, C | 4 | 1)
    python3 pthtar2onx.py FILE.pth --decoded       boxes (N, P, 4), scores (N, P, C)
    python3 pthtar2onx.py FILE.pth --dynamic       height and width free as well, multiples of 32

Input: `input` (N, 3, H, W) float32, normalised BGR, N free. How to prepare it, the class names and
the numbers of the NMS are in the file's metadata.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common.npu.interpreter  # noqa: F401 before torch

# isort: split

import functools
import json
from argparse import Namespace

import numpy as np
import torch
from torch import Tensor, nn

from common import flags
from common.errors import UserError
from common.export import compare, describe, export_graph, inputs_to_check, require_packages
from common.files import write_atomically
from common.npu import entry
from common.npu.weights import notes_on_class_names
from fcos.anchors import clear_caches
from fcos.config import RECIPES, Recipe
from fcos.data import CANVAS_MULTIPLE, normalise, resize
from fcos.detector import Detector
from fcos.old_flags import OLD_FLAGS
from fcos.postprocess import decode_outputs
from fcos.weights import note_on_preset, recipe_of_checkpoint

# Numbers of the recipe that a deployer needs.
DEPLOYED_FIELDS = (
    "mean",
    "strides",
    "score_threshold",
    "nms_iou",
    "candidates",
    "max_detections",
)
# What a free size is traced at: a map with a side of 1 would stay so in the graph.
TRACED_SIZE = (384, 512)
SIDE_LIMITS = (4, 512)  # of a free height or width, in canvas multiples of 32 pixels


class Flat(nn.Module):
    """The network with its levels joined, for all P points.

    Outputs are logits (N, P, classes), distances (N, P, 4) in pixels, or in strides with
    norm_on_bbox, and centerness logits (N, P, 1).
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self.network(images).flat())


class Decoded(nn.Module):
    """The network with boxes (N, P, 4) xyxy in its pixels and scores (N, P, classes) as outputs.

    A score is the class probability times the centerness.
    """

    def __init__(self, network: nn.Module, recipe: Recipe):
        super().__init__()
        self.network = network
        self.recipe = recipe

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        boxes, logits, centerness = decode_outputs(self.network(images), self.recipe)
        return boxes, logits.sigmoid() * centerness.sigmoid()


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    require_packages()
    state = flags.checkpoint_to_use(args, Recipe.model)
    requested = flags.chosen_recipe(args, RECIPES)
    recipe = recipe_of_checkpoint(requested, state, user_fields=vars(args))
    recipe = flags.require_agreement(args, recipe, state)
    detector = Detector.from_checkpoint(state, recipe, torch.device("cpu"), user_fields=vars(args))
    recipe = detector.recipe
    note = note_on_preset(requested, state)
    if note is not None:
        print(note)
    print(f"{state['path']}: {detector.report}")
    for line in notes_on_class_names(state, detector.class_names):
        print(line)
    if args.decoded:
        network = Decoded(detector.model, recipe).eval()
        output_names = ["boxes", "scores"]
    else:
        network = Flat(detector.model).eval()
        output_names = ["logits", "distances", "centerness"]

    image_size = tuple(args.shape)
    free_axes = free_height_and_width() if args.dynamic else {}
    traced_size = TRACED_SIZE if args.dynamic else image_size
    graph = export_graph(network, traced_size, "input", output_names, args.opset, free_axes)
    clear_caches()  # of the export's symbols
    checked_sizes = [image_size]
    if args.dynamic:
        checked_sizes.append(image_size[::-1])
    for size in checked_sizes:
        fit_to_size = functools.partial(fit, size=size, recipe=recipe)
        images = inputs_to_check(args.images, fit_to_size, at_least=2)
        for batch in (images[:1], images):
            difference = compare(graph, network, batch)
            print(f"onnxruntime against torch, {tuple(batch.shape)}: {difference}")
    notes = deployment_notes(recipe, detector.class_names, image_size)
    describe(graph, notes, recipe, DEPLOYED_FIELDS)
    write_atomically(args.output_file, graph.SerializeToString())
    mebibytes = graph.ByteSize() / 2**20
    print(f"{args.output_file}: {mebibytes:.1f} MiB, opset {args.opset}")


def parse(argv: list[str] | None) -> Namespace:
    parser = flags.make_parser(
        __doc__.split("\n")[0], "files", recipes=RECIPES, old_flags=OLD_FLAGS
    )
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE.pth",
        help="the same as --checkpoint; the port's CONFIG may stand before it, without effect",
    )
    flags.add(parser, "--output-file", Path("fcos_r50.onnx"), "file to write")
    flags.add(parser, "--decoded", False, "boxes and scores instead of raw outputs")
    flags.add(
        parser, "--dynamic", False, "height and width free: multiples of 32 from 128 to 16384"
    )
    parser.add_argument("--shape", nargs=2, type=int, default=[800, 1344], metavar=("H", "W"))
    flags.add(parser, "--opset --opset-version", 17, "version of ONNX's operator set")
    parser.add_argument(
        "--images", "--input-img", "--test-img", nargs="+", help="to check with; default: sample"
    )
    flags.add(parser, "--verify", True, "no effect: what is written has always been verified")
    args = parser.parse_args(argv)
    config_first = len(args.files) == 2 and args.files[0].endswith(".py")
    if len(args.files) > 1 and not config_first:
        raise UserError(f"{' '.join(args.files)}: give one checkpoint")
    if args.files:
        args.checkpoint = args.files[-1]
    for side in args.shape:
        if side < CANVAS_MULTIPLE or side % CANVAS_MULTIPLE:
            height, width = args.shape
            raise UserError(f"--shape {height} {width}: give multiples of {CANVAS_MULTIPLE}")
    return args


def free_height_and_width() -> dict:
    """Return the axes of height and width as free multiples of `CANVAS_MULTIPLE`."""
    least, most = SIDE_LIMITS
    height = torch.export.Dim("height_in_multiples", min=least, max=most)
    width = torch.export.Dim("width_in_multiples", min=least, max=most)
    return {2: CANVAS_MULTIPLE * height, 3: CANVAS_MULTIPLE * width}


def fit(image: np.ndarray, size: tuple[int, int], recipe: Recipe) -> Tensor:
    """Return the network input (3, *size) of an image (H, W, 3): the largest that fits, padded."""
    factor = min(size[0] / image.shape[0], size[1] / image.shape[1])
    height = int(image.shape[0] * factor)
    width = int(image.shape[1] * factor)
    canvas = torch.zeros(1, *size, 3, dtype=torch.uint8)
    canvas[0, :height, :width] = resize(image, (height, width))
    return normalise(canvas, torch.tensor([[height, width]]), recipe).squeeze(0)


def deployment_notes(
    recipe: Recipe, class_names: tuple[str, ...], image_size: tuple[int, int]
) -> dict[str, str]:
    """Return what a deployer must know beside the recipe's numbers; lists are JSON."""
    unit = "strides" if recipe.norm_on_bbox else "pixels"
    return {
        "classes": json.dumps(class_names),
        "input_size": json.dumps(image_size),
        "preprocessing": "BGR, resized with its aspect kept (bilinear, no antialias), minus mean, "
        "then padded right and bottom with 0",
        "points": "by level, row, column: column * stride + stride // 2, the same of the row",
        "boxes": "left, top, right, bottom in pixels of the input, not clipped",
        "distances": f"from the point to left, top, right, bottom, in {unit}",
        "scores": "sigmoid(logits) * sigmoid(centerness); the threshold is for sigmoid(logits)",
    }


if __name__ == "__main__":
    entry.run(main)
