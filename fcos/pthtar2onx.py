#!/usr/bin/env python3
"""Export FCOS to ONNX, checked with onnxruntime against torch on real images.

    python3 pthtar2onx.py FILE.pth                        logits, distances, centerness
    python3 pthtar2onx.py FILE.pth --outputs=decoded      boxes and scores
    python3 pthtar2onx.py FILE.pth --outputs=detections   with the NMS inside
    python3 pthtar2onx.py FILE.pth --dynamic              height and width free as well

Input: `input` (N, 3, H, W) float32, normalised BGR, N free or --batch. Raw outputs: `logits`,
`distances` and `centerness` (N, P, C | 4 | 1). Decoded: `boxes` (N, P, 4) and `scores` (N, P, C).
Detections, best first: `boxes` (N, M, 4), `scores` (N, M), 0 where there is no detection any more,
and `labels` (N, M) int64. Boxes are in pixels of the input. How to prepare it, the class names and
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
from fcos.anchors import clear_caches, map_sizes
from fcos.config import RECIPES, Recipe
from fcos.data import CANVAS_MULTIPLE, normalise, resize
from fcos.detector import Detector
from fcos.old_flags import OLD_FLAGS
from fcos.postprocess import (
    best_points,
    decode_outputs,
    gather_points,
    select,
)
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


class Raw(nn.Module):
    """The network with its levels joined, for all P points, in fp32.

    Outputs are logits (N, P, classes), distances (N, P, 4) in pixels, or in strides with
    norm_on_bbox, and centerness logits (N, P, 1).
    """

    output_names = ("logits", "distances", "centerness")

    def __init__(self, network: nn.Module, recipe: Recipe):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self.network(images).flat())


class Decoded(nn.Module):
    """The network with boxes (N, P, 4) xyxy in its pixels and scores (N, P, classes) as outputs.

    A score is the class probability times the centerness.
    """

    output_names = ("boxes", "scores")

    def __init__(self, network: nn.Module, recipe: Recipe):
        super().__init__()
        self.network = network
        self.recipe = recipe

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        boxes, logits, centerness = decode_outputs(self.network(images), self.recipe)
        return boxes, logits.sigmoid() * centerness.sigmoid()


class Candidates(nn.Module):
    """The network with decoded outputs and what the NMS in the graph chooses from.

    Decoded are boxes (N, P, 4), class probabilities (N, P, classes) and centerness (N, P, 1). The
    candidates are the best points of each level, their boxes clipped to the network input, which
    may be larger than the image in it. The score of a class whose probability does not pass the
    threshold is 0.
    """

    output_names = ("decoded_boxes", "probabilities", "centerness", "nms_boxes", "nms_scores")

    def __init__(self, network: nn.Module, recipe: Recipe):
        super().__init__()
        self.network = network
        self.recipe = recipe

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.network(images)
        boxes, logits, centerness = decode_outputs(outputs, self.recipe)
        probabilities = logits.sigmoid()
        centerness = centerness.sigmoid()
        scores = probabilities.amax(dim=2) * centerness.squeeze(2)
        best = best_points(scores, outputs.map_sizes(), self.recipe.candidates)
        nms_boxes = clip(gather_points(boxes, best), images.shape[2:])
        of_best = gather_points(probabilities, best)
        passes = of_best > self.recipe.score_threshold
        nms_scores = torch.where(passes, of_best * gather_points(centerness, best), 0.0)
        nms_scores = nms_scores.transpose(1, 2)
        return boxes, probabilities, centerness, nms_boxes, nms_scores


OUTPUTS = {"raw": Raw, "decoded": Decoded, "detections": Candidates}


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
    model = HalfPrecision(detector.model) if args.half else detector.model
    network = OUTPUTS[args.outputs](model, recipe).eval()
    reference = OUTPUTS[args.outputs](detector.model, recipe).eval()

    image_size = tuple(args.shape)
    free_axes = free_height_and_width() if args.dynamic else {}
    traced_size = TRACED_SIZE if args.dynamic else image_size
    graph = export_graph(
        network, traced_size, "input", network.output_names, args.opset, args.batch, free_axes
    )
    clear_caches()  # of the export's symbols
    checked_sizes = [image_size]
    if args.dynamic:
        checked_sizes.append(image_size[::-1])
    for size in checked_sizes:
        prepare = functools.partial(fit, size=size, recipe=recipe)
        images = inputs_to_check(args.images, prepare, at_least=args.batch or 2)
        check_outputs(graph, reference, images, args.batch, args.half)
    if args.outputs == "detections":
        suppression = suppression_of(recipe)
        expected = functools.partial(expected_detections, size=image_size, recipe=recipe)
        graph = with_checked_nms(graph, suppression, images, args.batch, expected)
    notes = deployment_notes(recipe, detector.class_names, image_size)
    describe(graph, notes, recipe, DEPLOYED_FIELDS)
    write_graph(graph, args.output_file, args.opset)


def parse(argv: list[str] | None) -> Namespace:
    parser = flags.make_parser(__doc__, "files", recipes=RECIPES, old_flags=OLD_FLAGS)
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE.pth",
        help="the same as --checkpoint; the port's CONFIG may stand before it, without effect",
    )
    add_flags(parser, "fcos_r50.onnx", outputs="raw")
    flags.add(
        parser, "--dynamic", False, "height and width free: multiples of 32 from 128 to 16384"
    )
    parser.add_argument("--shape", nargs=2, type=int, default=[800, 1344], metavar=("H", "W"))
    flags.add(parser, "--verify", True, "no effect: what is written has always been verified")
    args = parser.parse_args(argv)
    config_first = len(args.files) == 2 and args.files[0].endswith(".py")
    if len(args.files) > 1 and not config_first:
        raise UserError(f"{' '.join(args.files)}: give one checkpoint")
    if args.files:
        args.checkpoint = args.files[-1]
    if args.dynamic and args.outputs == "detections":
        raise UserError("--dynamic: the NMS needs a fixed size; give --outputs=decoded")
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


def clip(boxes_xyxy: Tensor, size: tuple[int, int]) -> Tensor:
    """Return boxes (..., 4) in pixels, clipped to an image of `size` (height, width)."""
    height, width = size
    x = boxes_xyxy[..., 0::2].clamp(0, width)
    y = boxes_xyxy[..., 1::2].clamp(0, height)
    return torch.stack([x, y], dim=-1).flatten(-2)


def suppression_of(recipe: Recipe) -> Suppression:
    """Return the numbers of the NMS; the candidates have passed the threshold before."""
    return Suppression(
        boxes="nms_boxes",
        iou_boxes="nms_boxes",
        iou=recipe.nms_iou,
        score_threshold=0.0,
        max_per_class=recipe.max_detections,
        max_detections=recipe.max_detections,
    )


def expected_detections(
    boxes: Tensor, probabilities: Tensor, centerness: Tensor, size: tuple[int, int], recipe: Recipe
) -> Detections:
    """Return torch's detections in an image that fills a network input of `size` (height, width).

    Of its points are given boxes (P, 4), probabilities (P, classes) and centerness (P, 1).
    """
    scores = probabilities.amax(dim=1) * centerness.squeeze(1)
    best = best_points(scores.unsqueeze(0), map_sizes(recipe, *size), recipe.candidates).squeeze(0)
    clipped = clip(boxes[best], size)
    return select(clipped.numpy(), probabilities[best].numpy(), centerness[best].numpy(), recipe)


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
        "labels": "position in classes",
        "scores": "sigmoid(logits) * sigmoid(centerness); the threshold is for sigmoid(logits)",
    }


if __name__ == "__main__":
    entry.run(main)
