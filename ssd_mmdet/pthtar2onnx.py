#!/usr/bin/env python3
"""Export SSD-VGG16 to ONNX, checked with onnxruntime against torch on real images.

    python3 pthtar2onnx.py --checkpoint FILE             boxes (n, 4), scores (n,), labels (n,)
    python3 pthtar2onnx.py --checkpoint FILE --no_nms    boxes (N, P, 4), scores (N, P, classes)

Input: `image` (1, 3, 300, 300) float32; without NMS any N in place of 1. Boxes are in pixels of
the network input. How to prepare it and the class names are in the file's metadata.
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
from ssd_mmdet.anchors import make_anchors
from ssd_mmdet.config import RECIPES, Recipe
from ssd_mmdet.data import prepare_image
from ssd_mmdet.evaluate import own_network
from ssd_mmdet.model import build_model
from ssd_mmdet.postprocess import decode_outputs, detect
from ssd_mmdet.weights import class_names_of, load_weights, num_classes_of

TOLERANCE = 1e-4  # of an output's largest value; fp32 rounding makes about 1e-6


# From what `Decoded` gives for one image: NMS of each class, then the best of all classes.
NMS = """
<ir_version: 10, opset_import: ["": {opset}]>
nms (float[1, {anchors}, 4] all_boxes, float[1, {anchors}, {classes}] all_scores)
    => (float[n, 4] boxes, float[n] scores, int64[n] labels)
{{
    by_class = Transpose <perm = [0, 2, 1]> (all_scores)
    most = Constant <value = int64[1] {{{most}}}> ()
    iou = Constant <value = float[1] {{{iou}}}> ()
    threshold = Constant <value = float[1] {{{threshold}}}> ()
    found = NonMaxSuppression (all_boxes, by_class, most, iou, threshold)
    found_scores = GatherND (by_class, found)
    count = Shape (found_scores)
    kept = Min (count, most)
    scores, order = TopK <axis = 0> (found_scores, kept)
    best = Gather <axis = 0> (found, order)
    class_column = Constant <value = int64 {{1}}> ()
    anchor_column = Constant <value = int64 {{2}}> ()
    labels = Gather <axis = 1> (best, class_column)
    rows = Gather <axis = 1> (best, anchor_column)
    first = Constant <value = int64[1] {{0}}> ()
    image_boxes = Squeeze (all_boxes, first)
    boxes = Gather <axis = 0> (image_boxes, rows)
}}
"""


class Decoded(nn.Module):
    """The network with boxes (N, P, 4) in its pixels and scores (N, P, classes) as outputs."""

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
    if args.config:
        print(f"--config {args.config}: not needed, the checkpoint says which network it is")
    state = cli.checkpoint_to_use(args)
    recipe = own_network(RECIPES["1p"], state)
    model = build_model(recipe, num_classes_of(state)).eval()
    print(f"{state['path']}: {load_weights(model, state).demand_all(state['path'])}")
    if {*args.shape} - {recipe.image_size}:
        raise UserError(f"--shape {args.shape}: this network takes {recipe.image_size} pixels")
    if (*args.mean, *args.std) != (*recipe.mean, 1, 1, 1):
        mean = " ".join(map(str, recipe.mean))
        raise UserError(f"--mean, --std: this network takes --mean {mean} --std 1 1 1; omit both")

    decoded = Decoded(model, recipe).eval()
    names = ["decoded_boxes", "decoded_scores"] if args.nms else ["boxes", "scores"]
    graph = export(decoded, recipe, names, args.opset)
    images = real_images(args.images, recipe)
    for batch in (images[:1], images):
        print(f"onnxruntime against torch, batch {len(batch)}: {compare(graph, decoded, batch)}")
    if args.nms:
        graph = with_nms(graph, recipe, num_classes_of(state))
        for image in images:
            print(f"with NMS: {compare_detections(graph, model, image, recipe)}")
    describe(graph, recipe, class_names_of(state))
    write_atomically(args.output_file, graph.SerializeToString())
    print(f"{args.output_file}: {graph.ByteSize() / 2**20:.1f} MiB, opset {args.opset}")
    print(f"Successfully exported ONNX model: {args.output_file}")


def parse(argv: list[str] | None):
    parser = cli.parser(__doc__.split("\n")[0], "files")
    cli.add(parser, "--output-file", Path("ssd300.onnx"), "to write")
    cli.add(parser, "--nms", True, "detections, not all boxes and scores")
    cli.add(parser, "--opset --opset-version", 17, "version of ONNX's operator set")
    cli.add(parser, "--shape", (), "side, or height and width; checked only")
    cli.add(parser, "--mean", RECIPES["1p"].mean, "checked only: `image` has it subtracted")
    cli.add(parser, "--std", (1.0, 1.0, 1.0), "checked only: `image` is not divided")
    cli.add(parser, "--config", "", "of old commands; the checkpoint says which network it is")
    cli.add(parser, "--show", False, "of old commands; no window opens")
    cli.add(parser, "--verify", True, "of old commands; every export is verified")
    parser.add_argument(
        "--images", "--input-img", nargs="+", help="to check with; default: sample images"
    )
    return parser.parse_args(argv)


def real_images(paths: list[str] | None, recipe: Recipe) -> Tensor:
    """Network inputs (at least 3, 3, 300, 300) of the files, by default of the sample's images."""
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


def with_nms(graph, recipe: Recipe, classes: int):
    """The decoded graph of one image with NMS and the cut to the best detections behind it."""
    import onnx

    tail = onnx.parser.parse_model(
        NMS.format(
            opset=next(used.version for used in graph.opset_import if not used.domain),
            anchors=len(make_anchors(recipe)),
            classes=classes,
            most=recipe.max_detections,
            iou=recipe.nms_iou,
            threshold=recipe.score_threshold,
        )
    )
    tail.ir_version = graph.ir_version
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    joints = [("decoded_boxes", "all_boxes"), ("decoded_scores", "all_scores")]
    whole = onnx.compose.merge_models(graph, tail, io_map=joints)
    onnx.checker.check_model(whole, full_check=True)
    return whole


@torch.no_grad()
def compare_detections(graph, model: nn.Module, image: Tensor, recipe: Recipe) -> str:
    """How far onnxruntime's detections in `image` (3, H, W) are from `detect`'s; UserError where
    more than 1 in 100 has no counterpart (an IoU at the limit may fall to either side)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    size = torch.tensor([[recipe.image_size] * 2])
    (ours,) = detect(model(image.unsqueeze(0)), size, recipe)
    boxes, scores, labels = map(
        torch.from_numpy, session.run(None, {"image": image.unsqueeze(0).numpy()})
    )
    far = (ours.boxes.unsqueeze(1) - boxes).abs().amax(dim=2)
    far += (ours.scores.unsqueeze(1) - scores).abs()
    far = far.masked_fill(ours.labels.unsqueeze(1) != labels, float("inf"))
    lost = (far.amin(dim=1) > 0.01).sum().item() if len(boxes) else len(ours.boxes)
    text = f"{len(boxes)} detections, {lost} of torch's {len(ours.boxes)} without a counterpart"
    if lost + abs(len(boxes) - len(ours.boxes)) > len(ours.boxes) / 100:
        raise UserError(f"the exported NMS is wrong: {text}; export with --no_nms")
    return text


def describe(graph, recipe: Recipe, class_names: tuple[str, ...]) -> None:
    """Put what a deployer must know into the graph's metadata, lists as JSON."""
    import onnx

    notes = {
        "classes": json.dumps(class_names),
        "input_size": json.dumps([recipe.image_size] * 2),
        "preprocessing": "RGB 0..255, resized without keeping the aspect (bilinear, no antialias), "
        "minus mean",
        "boxes": "left, top, right, bottom, pixels of the network input",
        "labels": "position in classes",
    }
    for name in ("mean", "score_threshold", "nms_iou", "max_detections"):
        notes[name] = json.dumps(getattr(recipe, name))
    onnx.helper.set_model_props(graph, notes)


if __name__ == "__main__":
    entry.run(main)
