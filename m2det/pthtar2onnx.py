#!/usr/bin/env python3
"""Export M2Det to ONNX, checked with onnxruntime against torch on real images.

    python3 pthtar2onnx.py --checkpoint FILE             offsets (N, P, 4), logits (N, P, C)
    python3 pthtar2onnx.py --checkpoint FILE --decoded   boxes (N, P, 4), scores (N, P, C)

Input: `image` (N, 3, S, S) float32, N free; P is the number of priors. How to prepare it, the class
names and the numbers of the NMS are in the file's metadata.
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

import torch
from torch import Tensor, nn

from common.coco.images import read_image
from common.coco.sample import write_sample
from common.errors import UserError
from common.files import write_atomically
from common.npu import cli, entry
from m2det.anchors import make_anchors
from m2det.config import RECIPES, Recipe
from m2det.data import prepare_image
from m2det.evaluate import own_network
from m2det.model import build_model
from m2det.postprocess import decode_outputs
from m2det.weights import class_names_of, load_weights, num_classes_of

TOLERANCE = 1e-4  # of an output's largest value; fp32 rounding makes about 1e-6


class Decoded(nn.Module):
    """The network with boxes (N, P, 4) normalised ltrb, scores (N, P, 1 + classes) as outputs."""

    def __init__(self, network: nn.Module, recipe: Recipe):
        super().__init__()
        self.network, self.recipe = network, recipe
        self.register_buffer("anchors", make_anchors(recipe))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return decode_outputs(self.network(images), self.anchors, self.recipe)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    needed = ("onnx", "onnxruntime", "onnxscript")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(f"the export needs more packages: pip install {' '.join(missing)}")
    state = cli.checkpoint_to_use(args)
    recipe = own_network(cli.chosen_recipe(args, RECIPES), state)
    model = build_model(recipe, num_classes_of(state)).eval()
    print(f"{state['path']}: {load_weights(model, state).demand_all(state['path'])}")
    outputs = ["offsets", "logits"]
    if args.decoded:
        model, outputs = Decoded(model, recipe).eval(), ["boxes", "scores"]

    graph = export(model, recipe, outputs, args.opset)
    images = real_images(args.images, recipe)
    for batch in (images[:1], images):
        print(f"onnxruntime against torch, batch {len(batch)}: {compare(graph, model, batch)}")
    describe(graph, recipe, class_names_of(state))
    write_atomically(args.output_file, graph.SerializeToString())
    print(f"{args.output_file}: {graph.ByteSize() / 2**20:.1f} MiB, opset {args.opset}")


def parse(argv: list[str] | None):
    parser = cli.parser(__doc__.split("\n")[0], "files", recipes=RECIPES)
    cli.add(parser, "--output-file", Path("m2det.onnx"), "to write")
    cli.add(parser, "--decoded", False, "boxes and scores, not raw outputs")
    cli.add(parser, "--opset", 18, "version of ONNX's operator set; its Resize needs 18")
    parser.add_argument("--images", nargs="+", help="to check with; default: sample images")
    return parser.parse_args(argv)


def real_images(paths: list[str] | None, recipe: Recipe) -> Tensor:
    """Network inputs (at least 3, 3, S, S) of the files, by default of the sample's images."""
    with tempfile.TemporaryDirectory() as scratch:
        if not paths:
            write_sample(Path(scratch, "sample"), train=1, val=3)
            paths = sorted(map(str, Path(scratch, "sample", "val2017").iterdir()))
        inputs = [prepare_image(read_image(path), recipe) for path in paths]
    return torch.stack((inputs * 3)[: max(3, len(inputs))])


def export(model: nn.Module, recipe: Recipe, outputs: list[str], opset: int):
    """The network as an onnx.ModelProto. Raises UserError where torch cannot write the opset."""
    import onnx

    for name in ("torch.onnx", "onnxscript"):  # they warn of detours of their own
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Not one: an example batch of one would fix the batch axis.
    example = torch.zeros(2, 3, recipe.image_size, recipe.image_size)
    names = {"input_names": ["image"], "output_names": outputs}
    options = {"dynamo": True, "opset_version": opset, "verbose": False}
    # An end, though none is meant: torch 2.6 refuses an open one.
    options["dynamic_shapes"] = ({0: torch.export.Dim("batch", max=4096)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(model, (example,), **names, **options)
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
    exported = session.run(None, {"image": images.numpy()})
    for output, theirs, ours in zip(session.get_outputs(), exported, model(images), strict=True):
        largest = ours.abs().max().item()
        difference = (ours - torch.from_numpy(theirs)).abs().max().item()
        parts.append(f"{output.name} differ by {difference:.1e} (largest value {largest:.3g})")
        if not difference <= TOLERANCE * largest:
            raise UserError(f"the exported network is wrong, {parts[-1]}; try another --opset")
    return ", ".join(parts)


def describe(graph, recipe: Recipe, class_names: tuple[str, ...]) -> None:
    """Put what a deployer must know into the graph's metadata, lists as JSON."""
    import onnx

    notes = {
        "classes": json.dumps(class_names),
        "input_size": json.dumps([recipe.image_size] * 2),
        "preprocessing": "BGR in 0..255, resized without keeping the aspect (bilinear, no "
        "antialias), minus mean",
        "boxes": "left, top, right, bottom, 0..1 of the image",
        "offsets": "centre shift / prior size / variance, log of size ratio / variance",
        "logits": "background, then the classes; softmax over them gives scores",
    }
    numbers = "mean center_variance size_variance score_threshold nms soft_nms_iou hard_nms_iou"
    for name in (*numbers.split(), "soft_nms_min_score", "max_per_class", "max_detections"):
        notes[name] = json.dumps(getattr(recipe, name))
    onnx.helper.set_model_props(graph, notes)


if __name__ == "__main__":
    entry.run(main)
