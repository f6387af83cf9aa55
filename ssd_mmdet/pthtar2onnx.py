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
import common.npu.interpreter  # noqa: F401 before torch

# isort: split

import functools
import json
from argparse import Namespace

import torch
from torch import Tensor, nn

from common import flags
from common.errors import UserError
from common.export import (
    compare,
    describe,
    export_graph,
    inputs_to_check,
    opset_of,
    require_packages,
    run_graph,
)
from common.files import write_atomically
from common.npu import entry
from common.npu.weights import notes_on_class_names
from ssd_mmdet.anchors import make_anchors
from ssd_mmdet.config import RECIPES, Recipe
from ssd_mmdet.data import prepare_image
from ssd_mmdet.detector import Detector
from ssd_mmdet.postprocess import decode_outputs, detect

# Numbers of the recipe that a deployer needs.
DEPLOYED_FIELDS = ("mean", "score_threshold", "nms_iou", "max_detections")
NO_STD = (1.0, 1.0, 1.0)  # the network's input is not divided
# Two detections are the same within this, in pixels and in score together.
SAME_DETECTION = 0.01
# An IoU at the limit may fall to either side: so many detections may be without a counterpart.
MAX_SHARE_LOST = 0.01

# From what `Decoded` gives for one image: NMS of each class, then the best of all classes.
NMS = """
<ir_version: 10, opset_import: ["": {opset}]>
nms (float[1, {anchors}, 4] all_boxes, float[1, {anchors}, {classes}] all_scores)
    => (float[n, 4] boxes, float[n] scores, int64[n] labels)
{{
    by_class = Transpose <perm = [0, 2, 1]> (all_scores)
    limit = Constant <value = int64[1] {{{max_detections}}}> ()
    iou = Constant <value = float[1] {{{iou}}}> ()
    threshold = Constant <value = float[1] {{{threshold}}}> ()
    selected = NonMaxSuppression (all_boxes, by_class, limit, iou, threshold)
    selected_scores = GatherND (by_class, selected)
    count_selected = Shape (selected_scores)
    count_kept = Min (count_selected, limit)
    scores, order = TopK <axis = 0> (selected_scores, count_kept)
    best = Gather <axis = 0> (selected, order)
    class_column = Constant <value = int64 {{1}}> ()
    anchor_column = Constant <value = int64 {{2}}> ()
    labels = Gather <axis = 1> (best, class_column)
    anchor_indices = Gather <axis = 1> (best, anchor_column)
    batch_axis = Constant <value = int64[1] {{0}}> ()
    image_boxes = Squeeze (all_boxes, batch_axis)
    boxes = Gather <axis = 0> (image_boxes, anchor_indices)
}}
"""


class Decoded(nn.Module):
    """The network with boxes (N, P, 4) xyxy in its pixels and scores (N, P, classes) as outputs."""

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
    detector = Detector.from_checkpoint(state, RECIPES["1p"], torch.device("cpu"))
    recipe = detector.recipe
    print(f"{state['path']}: {detector.report}")
    for line in notes_on_class_names(state, detector.class_names):
        print(line)
    require_input(recipe, args.shape, args.mean, args.std)

    network = Decoded(detector.model, recipe).eval()
    output_names = ["boxes", "scores"]
    if args.nms:  # which brings outputs of these names
        output_names = ["decoded_boxes", "decoded_scores"]
    image_size = (recipe.image_size, recipe.image_size)
    graph = export_graph(network, image_size, "image", output_names, args.opset)
    images = inputs_to_check(args.images, functools.partial(prepare_image, recipe=recipe))
    for batch in (images[:1], images):
        difference = compare(graph, network, batch)
        print(f"onnxruntime against torch, batch {len(batch)}: {difference}")
    if args.nms:
        graph = with_nms(graph, recipe, len(detector.class_names))
        for image in images:
            print(f"with NMS: {compare_detections(graph, detector.model, image, recipe)}")
    describe(graph, deployment_notes(recipe, detector.class_names), recipe, DEPLOYED_FIELDS)
    write_atomically(args.output_file, graph.SerializeToString())
    mebibytes = graph.ByteSize() / 2**20
    print(f"{args.output_file}: {mebibytes:.1f} MiB, opset {args.opset}")
    print(f"Successfully exported ONNX model: {args.output_file}")


def parse(argv: list[str] | None) -> Namespace:
    parser = flags.make_parser(__doc__.split("\n")[0], "files")
    flags.add(parser, "--output-file", Path("ssd300.onnx"), "file to write")
    flags.add(parser, "--nms", True, "detections, not all boxes and scores")
    flags.add(parser, "--opset --opset-version", 17, "version of ONNX's operator set")
    flags.add(parser, "--shape", (), "side, or height and width; checked only")
    flags.add(parser, "--mean", RECIPES["1p"].mean, "checked only: `image` has it subtracted")
    flags.add(parser, "--std", NO_STD, "checked only: `image` is not divided")
    flags.add(parser, "--config", "", "no effect: the checkpoint shows its network")
    flags.add(parser, "--show", False, "no effect: no window opens")
    flags.add(parser, "--verify", True, "no effect: what is written has always been verified")
    parser.add_argument(
        "--images", "--input-img", nargs="+", help="to check with; default: sample images"
    )
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


def with_nms(graph, recipe: Recipe, num_classes: int):
    """Return the decoded graph followed by NMS and a cut to the best detections.

    Both are for one image: the batch of `graph` itself becomes 1.
    """
    import onnx

    nms = onnx.parser.parse_model(
        NMS.format(
            opset=opset_of(graph),
            anchors=len(make_anchors(recipe)),
            classes=num_classes,
            max_detections=recipe.max_detections,
            iou=recipe.nms_iou,
            threshold=recipe.score_threshold,
        )
    )
    nms.ir_version = graph.ir_version
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    connections = [("decoded_boxes", "all_boxes"), ("decoded_scores", "all_scores")]
    merged = onnx.compose.merge_models(graph, nms, io_map=connections)
    onnx.checker.check_model(merged, full_check=True)
    return merged


@torch.no_grad()
def compare_detections(graph, model: nn.Module, image: Tensor, recipe: Recipe) -> str:
    """Return how far onnxruntime's detections in `image` (3, H, W) are from torch's, in words.

    Raise UserError where more than MAX_SHARE_LOST of them have no counterpart.
    """
    batch = image.unsqueeze(0)
    exported = run_graph(graph, batch)
    size = torch.tensor([[recipe.image_size, recipe.image_size]])
    expected = detect(model(batch), size, recipe)[0]
    lost = count_without_counterpart(expected, exported)
    num_exported = len(exported["boxes"])
    num_expected = len(expected.boxes)
    text = f"{num_exported} detections, {lost} of torch's {num_expected} without a counterpart"
    if lost + abs(num_exported - num_expected) > MAX_SHARE_LOST * num_expected:
        raise UserError(f"the exported NMS is wrong: {text}; export with --no_nms")
    return text


def count_without_counterpart(expected, exported: dict[str, Tensor]) -> int:
    """Return how many of the expected Detections are not among the exported ones."""
    if not len(exported["boxes"]):
        return len(expected.boxes)
    distances = (expected.boxes.unsqueeze(1) - exported["boxes"]).abs().amax(dim=2)
    distances += (expected.scores.unsqueeze(1) - exported["scores"]).abs()
    other_class = expected.labels.unsqueeze(1) != exported["labels"]
    nearest = distances.masked_fill(other_class, float("inf")).amin(dim=1)
    return (nearest > SAME_DETECTION).sum().item()


def deployment_notes(recipe: Recipe, class_names: tuple[str, ...]) -> dict[str, str]:
    """Return what a deployer must know beside the recipe's numbers; lists are JSON."""
    return {
        "classes": json.dumps(class_names),
        "input_size": json.dumps([recipe.image_size, recipe.image_size]),
        "preprocessing": "RGB 0..255, resized without keeping the aspect (bilinear, no antialias), "
        "minus mean",
        "boxes": "left, top, right, bottom, pixels of the network input",
        "labels": "position in classes",
    }


if __name__ == "__main__":
    entry.run(main)
