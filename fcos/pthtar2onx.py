#!/usr/bin/env python3
"""Export FCOS R50-caffe-FPN to ONNX, checked with onnxruntime against torch on real images.

    python3 pthtar2onx.py FILE.pth                 logits, distances, centerness (N, P, C | 4 | 1)
    python3 pthtar2onx.py FILE.pth --decoded       boxes (N, P, 4), scores (N, P, C)
    python3 pthtar2onx.py FILE.pth --dynamic       height and width free as well, multiples of 32

Input: `input` (N, 3, H, W) float32, normalised BGR, N free. How to prepare it, the class names and
the numbers of the NMS are in the file's metadata.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: F401 before torch

# isort: split

import importlib.util
import json
import logging
import tempfile
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from common.coco.images import read_image
from common.coco.sample import write_sample
from common.errors import UserError
from common.files import write_atomically
from common.npu import cli, entry
from fcos.anchors import make_anchors, make_levels, point_strides
from fcos.config import RECIPES, Recipe
from fcos.data import normalise, resize
from fcos.evaluate import own_network
from fcos.model import build_model
from fcos.postprocess import decode_outputs
from fcos.weights import class_names_of, load_weights, num_classes_of

TOLERANCE = 1e-4  # of an output's largest value; fp32 rounding makes about 1e-6


class Flat(nn.Module):
    """The network with its levels joined: logits, distances (pixels, or strides with
    norm_on_bbox) and centerness logits of all P points."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self.network(images).flat())


class Decoded(nn.Module):
    """The network with boxes (N, P, 4) xyxy in pixels of the input and scores (N, P, classes),
    probability times centerness, as outputs."""

    def __init__(self, network: nn.Module, recipe: Recipe):
        super().__init__()
        self.network, self.recipe = network, recipe

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        boxes, logits, centerness = decode_outputs(self.network(images), self.recipe)
        return boxes, logits.sigmoid() * centerness.sigmoid()


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    needed = ("onnx", "onnxruntime", "onnxscript")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(f"the export needs more packages: pip install {' '.join(missing)}")
    args.checkpoint = args.files[-1] if args.files else args.checkpoint
    state = cli.checkpoint_to_use(args)
    recipe = own_network(cli.chosen_recipe(args, RECIPES), state)
    model = build_model(recipe, num_classes_of(state)).eval()
    print(f"{state['path']}: {load_weights(model, state).demand_all(state['path'])}")
    outputs = ["boxes", "scores"] if args.decoded else ["logits", "distances", "centerness"]
    model = (Decoded(model, recipe) if args.decoded else Flat(model)).eval()

    graph = export(model, args.shape, outputs, args.opset, args.dynamic)
    for shape in [args.shape, args.shape[::-1]] if args.dynamic else [args.shape]:
        images = real_images(args.images, shape, recipe)
        for batch in (images[:1], images):
            found = compare(graph, model, batch)
            print(f"onnxruntime against torch, {tuple(batch.shape)}: {found}")
    describe(graph, recipe, class_names_of(state), args.shape)
    write_atomically(args.output_file, graph.SerializeToString())
    print(f"{args.output_file}: {graph.ByteSize() / 2**20:.1f} MiB, opset {args.opset}")


def parse(argv: list[str] | None):
    parser = cli.parser(__doc__.split("\n")[0], "files", recipes=RECIPES)
    text = "the same as --checkpoint; the port's CONFIG may stand before it, without effect"
    parser.add_argument("files", nargs="*", metavar="FILE.pth", help=text)
    cli.add(parser, "--output-file", Path("fcos_r50.onnx"), "to write")
    cli.add(parser, "--decoded", False, "boxes and scores, not raw outputs")
    cli.add(parser, "--dynamic", False, "height and width free, multiples of 32")
    parser.add_argument("--shape", nargs=2, type=int, default=[800, 1344], metavar=("H", "W"))
    cli.add(parser, "--opset --opset-version", 17, "version of ONNX's operator set")
    text = "to check with; default: sample"
    parser.add_argument("--images", "--input-img", "--test-img", nargs="+", help=text)
    cli.add(parser, "--verify", True, "no effect: what is written has always been verified")
    args = parser.parse_args(argv)
    if len(args.files) > 1 and not (len(args.files) == 2 and args.files[0].endswith(".py")):
        raise UserError(f"{' '.join(args.files)}: give one checkpoint")
    if any(side < 32 or side % 32 for side in args.shape):
        raise UserError(f"--shape {args.shape[0]} {args.shape[1]}: give multiples of 32")
    return args


def real_images(paths: list[str] | None, shape: list[int], recipe: Recipe) -> Tensor:
    """Network inputs (at least 2, 3, *shape) of the files, by default of the sample's images."""
    with tempfile.TemporaryDirectory() as scratch:
        if not paths:
            write_sample(Path(scratch, "sample"), train=1, val=2)
            paths = sorted(map(str, Path(scratch, "sample", "val2017").iterdir()))
        inputs = [fitted(read_image(path), shape, recipe) for path in paths]
    return torch.cat((inputs * 2)[: max(2, len(inputs))])


def fitted(image: np.ndarray, shape: list[int], recipe: Recipe) -> Tensor:
    """The network input (1, 3, *shape) of an image: the largest that fits, padded."""
    factor = min(side / own for side, own in zip(shape, image.shape, strict=False))
    size = [int(own * factor) for own in image.shape[:2]]
    canvas = torch.zeros(1, *shape, 3, dtype=torch.uint8)
    canvas[0, : size[0], : size[1]] = resize(image, tuple(size))
    return normalise(canvas, torch.tensor([size]), recipe)


def export(model: nn.Module, shape: list[int], outputs: list[str], opset: int, dynamic: bool):
    """The network as an onnx.ModelProto. Raises UserError where torch cannot write the opset."""
    import onnx

    for name in ("torch.onnx", "onnxscript"):  # they warn of detours of their own
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Not one: an example batch of one would fix the batch axis.
    example = torch.zeros(2, 3, *shape)
    names = {"input_names": ["input"], "output_names": outputs}
    options = {"dynamo": True, "opset_version": opset, "verbose": False}
    # An end, though none is meant: torch 2.6 refuses an open one.
    free = {0: torch.export.Dim("batch", max=4096)}
    if dynamic:
        for axis, name in ((2, "height"), (3, "width")):
            free[axis] = 32 * torch.export.Dim(f"{name}_in_32s", min=4, max=512)
    options["dynamic_shapes"] = (free,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        program = torch.onnx.export(model, (example,), **names, **options)
    for cached in (make_levels, make_anchors, point_strides):
        cached.cache_clear()  # of the export's symbols
    graph = program.model_proto
    written = next(used.version for used in graph.opset_import if not used.domain)
    if written != opset:
        raise UserError(f"--opset {opset}: torch cannot write it; give --opset {written}")
    onnx.checker.check_model(graph, full_check=True)
    return graph


@torch.no_grad()
def compare(graph, model: nn.Module, images: Tensor) -> str:
    """How far onnxruntime is from torch on `images` (N, 3, H, W); UserError where too far."""
    import onnxruntime

    content, parts = graph.SerializeToString(), []
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    exported = session.run(None, {"input": images.numpy()})
    for output, theirs, ours in zip(session.get_outputs(), exported, model(images), strict=True):
        largest = ours.abs().max().item()
        difference = (ours - torch.from_numpy(theirs)).abs().max().item()
        parts.append(f"{output.name} differ by {difference:.1e} (largest value {largest:.3g})")
        if not difference <= TOLERANCE * largest:
            raise UserError(f"the exported network is wrong, {parts[-1]}; try another --opset")
    return ", ".join(parts)


def describe(graph, recipe: Recipe, class_names: tuple[str, ...], shape: list[int]) -> None:
    """Put what a deployer must know into the graph's metadata, lists as JSON."""
    import onnx

    notes = {
        "classes": json.dumps(class_names),
        "input_size": json.dumps(shape),
        "preprocessing": "BGR, resized with its aspect kept (bilinear, no antialias), minus mean, "
        "then padded right and bottom with 0",
        "points": "by level, row, column: column * stride + stride // 2, the same of the row",
        "boxes": "left, top, right, bottom in pixels of the input, not clipped",
        "distances": "from the point to left, top, right, bottom, in "
        + ("strides" if recipe.norm_on_bbox else "pixels"),
        "scores": "sigmoid(logits) * sigmoid(centerness); the threshold is for sigmoid(logits)",
    }
    for name in ["mean", "strides", "score_threshold", "nms_iou", "candidates", "max_detections"]:
        notes[name] = json.dumps(getattr(recipe, name))
    onnx.helper.set_model_props(graph, notes)


if __name__ == "__main__":
    entry.run(main)
