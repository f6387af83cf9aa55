"""Writing a network as ONNX and checking it with onnxruntime; the graph itself is the model's.

An export gives one of three kinds of outputs: "raw" ones, as the network has them, "decoded" boxes
and scores of all anchors, or "detections", with the NMS inside the graph.
"""

import copy
import importlib.util
import io
import json
import logging
import tempfile
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import __version__, flags
from common.coco.detections import Detections
from common.coco.images import read_image
from common.coco.sample import write_sample
from common.errors import UserError
from common.files import write_atomically
from common.parser import renamed

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
OUTPUT_KINDS = ("raw", "decoded", "detections")

# The operator sets that the converters of accelerators take: CANN 5 and 6 stop at 13 and 16.
LOWEST_OPSET = 11
DEFAULT_OPSET = 17
HIGHEST_OPSET = 18
# torch.export's graphs are written in 18, which every torch does alike, and converted down to this
# one. Lower ones are written by the exporter that traces.
LOWEST_CONVERTED_OPSET = 15
IR_VERSION = 8  # of the file; onnxruntime before 1.15 and CANN 7 and 8 read no later one
MAX_BATCH = 4096  # torch 2.6 requires an upper bound of a free axis; none is meant
FOLDED_SIZE = 2**30  # limit of a constant that is computed when the graph is written

# Of a value's magnitude and the median one together. fp32 rounding makes about 1e-6, and 2e-4 of
# the boxes of an untrained network, whose sides are exponential functions of large numbers.
TOLERANCE = 1e-3
HALF_TOLERANCE = 0.05
# An untrained network may give boxes of any size: what is beyond this is not told apart.
LARGEST_COMPARED = 1e4
LEAST_MEDIAN = 0.1  # most scores are next to nothing; all other outputs are larger
LARGEST_COORDINATE = 1e30  # far above those of any image
# Detections from the same boxes and scores are the same within this share of the largest value.
SAME_DETECTION = 1e-4
# An IoU at the limit may fall to either side: so many detections may be without a counterpart.
MAX_SHARE_LOST = 0.01

OLD_FLAGS = (
    *renamed("--decoded", "--outputs=decoded"),
    *renamed("--no-decoded", "--outputs=raw"),
    *renamed("--nms", "--outputs=detections", value=""),
    *renamed("--nms", "--outputs=detections"),
    *renamed("--no-nms", "--outputs=decoded"),
)

# The outputs of a graph that only the NMS needs have names that begin with this. The scores that it
# ranks are `nms_scores` (N, classes, K).
FOR_NMS = "nms_"
DETECTIONS = ("boxes", "scores", "labels")
# The survivors of the NMS get their scores back, all others 0. So the best of an image are a fixed
# number of rows, whatever the batch, and no shape depends on the values but inside.
NMS = """
nms (float[N, K, 4] {boxes}, float[N, C, K] nms_scores) => (
    float[{batch}, {rows}, 4] boxes, float[{batch}, {rows}] scores, int64[{batch}, {rows}] labels
)
{{
    nms_limit = Constant <value = int64[1] {{{max_per_class}}}> ()
    nms_iou = Constant <value = float[1] {{{iou}}}> ()
    nms_threshold = Constant <value = float[1] {{{threshold}}}> ()
    nms_selected = NonMaxSuppression (
        {iou_boxes}, nms_scores, nms_limit, nms_iou, nms_threshold)
    nms_selected_scores = GatherND (nms_scores, nms_selected)
    nms_zero = Constant <value = float {{0.0}}> ()
    nms_nothing = Mul (nms_scores, nms_zero)
    nms_surviving = ScatterND (nms_nothing, nms_selected, nms_selected_scores)
    nms_by_box = Transpose <perm = [0, 2, 1]> (nms_surviving)
    nms_row_of_image = Constant <value = int64[2] {{0, -1}}> ()
    nms_flat = Reshape (nms_by_box, nms_row_of_image)
    nms_rows = Constant <value = int64[1] {{{rows}}}> ()
    scores, nms_position = TopK <axis = 1> (nms_flat, nms_rows)
    nms_classes = Constant <value = int64 {{{classes}}}> ()
    nms_box = Div (nms_position, nms_classes)
    nms_before = Mul (nms_box, nms_classes)
    labels = Sub (nms_position, nms_before)
    nms_column = Constant <value = int64[3] {{0, {rows}, 1}}> ()
    nms_box_column = Reshape (nms_box, nms_column)
    nms_index = Concat <axis = 2> (nms_box_column, nms_box_column, nms_box_column, nms_box_column)
    boxes = GatherElements <axis = 1> ({boxes}, nms_index)
}}
"""


class Suppression(NamedTuple):
    """What the NMS in a graph does, with which outputs of the graph without it."""

    boxes: str  # (N, K, 4): those that detections have
    iou_boxes: str  # (N, K, 4): those that the IoU is computed of
    iou: float  # a box goes when its IoU with a better one of its class is greater
    score_threshold: float  # a score must be greater
    max_per_class: int  # survivors of a class in an image
    max_detections: int  # survivors of an image


def add_flags(parser: ArgumentParser, output_file: str, outputs: str) -> None:
    """Add the flags of all exports, with the default file and kind of outputs."""
    parser.old_flags = (*OLD_FLAGS, *parser.old_flags)
    group = parser.add_argument_group("export")
    flags.add(group, "--output-file", Path(output_file), "file to write")
    flags.add(
        group,
        "--outputs",
        outputs,
        "raw outputs; decoded boxes and scores of all anchors; detections, with the NMS inside",
        choices=OUTPUT_KINDS,
    )
    flags.add(group, "--batch", 0, "number of images, a constant; 0: any number")
    flags.add(group, "--half", False, "weights and network in fp16; input and outputs are fp32")
    flags.add(
        group,
        "--opset --opset-version",
        DEFAULT_OPSET,
        f"version of ONNX's operator set, {LOWEST_OPSET} to {HIGHEST_OPSET}",
    )
    group.add_argument(
        "--images",
        "--input-img",
        "--test-img",
        nargs="+",
        help="to check with; default: sample images",
    )


def require_packages() -> None:
    """Raise UserError where a package that the export needs is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the export needs more packages: pip install {' '.join(missing)}")


def inputs_to_check(
    paths: list[str] | None, prepare_image: Callable[[np.ndarray], Tensor], at_least: int = 3
) -> Tensor:
    """Return network inputs (N, 3, H, W) of image files, by default of sample images.

    Where there are fewer than `at_least`, the first is repeated.

    `prepare_image` makes an input (3, H, W) of an image (H, W, 3) uint8 RGB.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if not paths:
            sample = Path(scratch, "sample")
            write_sample(sample, train=1, val=at_least)
            paths = sorted(str(path) for path in (sample / "val2017").iterdir())
        inputs = [prepare_image(read_image(path)) for path in paths]
    while len(inputs) < at_least:
        inputs.append(inputs[0])
    return torch.stack(inputs)


def batches_to_check(images: Tensor, batch: int) -> list[Tensor]:
    """Return the batches to run a graph on: its fixed number of images, or one and all of them."""
    if batch:
        return [images[:batch]]
    return [images[:1], images]


class HalfPrecision(nn.Module):
    """A copy of a network with weights in fp16, for images in fp32; its outputs are fp16."""

    def __init__(self, network: nn.Module):
        super().__init__()
        network = copy.deepcopy(network).requires_grad_(False)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                # A variance may be too large for fp16; the weight takes it over.
                module.weight.div_((module.running_var + module.eps).sqrt())
                module.running_var.fill_(1.0)
        self.network = network.half()

    def forward(self, images: Tensor):
        return self.network(images.half())


def without_boundless(scores: Tensor, boxes: Tensor) -> Tensor:
    """Return scores (N, classes, K), 0 where a box (N, K, 4) is too large for a number.

    A network that has not learned may give such boxes, which the detectors leave out.
    """
    reach = boxes.abs().amax(dim=2).unsqueeze(1)
    return torch.where(reach < LARGEST_COORDINATE, scores, 0.0)


def export_graph(
    network: nn.Module,
    image_size: tuple[int, int],
    input_name: str,
    output_names: Sequence[str],
    opset: int,
    batch: int = 0,
    free_axes: dict | None = None,
):
    """Return a network of images (N, 3, *image_size) as an onnx.ModelProto.

    N is `batch`, or free where that is 0. `free_axes` names further free axes, by position, with
    their `torch.export.Dim`. Raise UserError for an operator set that cannot be written.
    """
    import onnx

    if not LOWEST_OPSET <= opset <= HIGHEST_OPSET:
        raise UserError(
            f"--opset {opset}: is not one of {LOWEST_OPSET} to {HIGHEST_OPSET}; "
            f"give --opset {DEFAULT_OPSET}"
        )
    # Not one image: an example batch of one would fix the batch axis.
    example = torch.zeros(batch or 2, 3, *image_size)
    if free_axes and opset < LOWEST_CONVERTED_OPSET:
        raise UserError(
            f"--opset {opset}: height and width are free from {LOWEST_CONVERTED_OPSET} on"
        )
    if free_axes and torch_version() < (2, 7):
        raise UserError(
            f"torch {torch.__version__} cannot export a network of free height and width",
            "give a fixed size, or use torch 2.7 or a later one",
        )
    if opset < LOWEST_CONVERTED_OPSET or (must_be_traced() and not free_axes):
        graph = trace(network, example, input_name, output_names, opset, batch)
    else:
        axes = dict(free_axes or {})
        if not batch:
            axes[0] = torch.export.Dim("batch", max=MAX_BATCH)
        graph = export_program(network, example, input_name, output_names, axes)
        if opset != HIGHEST_OPSET:
            replace_splits(graph.graph)
            graph = onnx.version_converter.convert_version(graph, opset)
    graph = fold_constants(graph)
    tidy(graph, opset)
    graph = rewrite_resizes(graph)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def torch_version() -> tuple[int, int]:
    """Return the first two numbers of torch's version."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def must_be_traced() -> bool:
    """Return whether torch is 2.6 or 2.7, whose exporter does not suit today's packages.

    2.6 fails on the batch norm of onnxscript; onnx cannot lower some Splits of 2.7 to opset 17.
    """
    return torch_version() < (2, 8)


def export_program(
    network: nn.Module, example: Tensor, input_name: str, output_names: Sequence[str], axes: dict
):
    """Return the graph that `torch.export` gives, in HIGHEST_OPSET."""
    for name in ("torch.onnx", "onnxscript"):  # they log warnings about their fallbacks
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        program = torch.onnx.export(
            network,
            (example,),
            input_names=[input_name],
            output_names=list(output_names),
            dynamo=True,
            opset_version=HIGHEST_OPSET,
            dynamic_shapes=(axes,) if axes else None,
            verbose=False,
        )
    return program.model_proto


def trace(
    network: nn.Module,
    example: Tensor,
    input_name: str,
    output_names: Sequence[str],
    opset: int,
    batch: int,
):
    """Return the graph of the exporter that traces."""
    import onnx

    batch_axis = {0: "batch"}
    dynamic_axes = None
    if not batch:
        dynamic_axes = dict.fromkeys((input_name, *output_names), batch_axis)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is the old exporter, and what it traces
        torch.onnx.export(
            network,
            (example,),
            file,
            input_names=[input_name],
            output_names=list(output_names),
            dynamo=False,
            opset_version=opset,
            dynamic_axes=dynamic_axes,
        )
    graph = onnx.load_from_string(file.getvalue())
    with torch.no_grad():
        outputs = network(example)
    for value, output in zip(graph.graph.output, outputs, strict=True):
        # The tracer takes every size that follows from the batch for a free one.
        sizes = ["batch", *output.shape[1:]] if not batch else output.shape
        value.CopyFrom(
            onnx.helper.make_tensor_value_info(
                value.name, value.type.tensor_type.elem_type, list(sizes)
            )
        )
    return graph


def replace_splits(graph) -> None:
    """Replace the Splits of an onnx.GraphProto by Slices: onnx does not convert them to 17.

    Their sizes must be constants.
    """
    import onnx

    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = node.attribute[0].t
    nodes = []
    for node in graph.node:
        if node.op_type != "Split" or len(node.input) < 2 or node.input[1] not in constants:
            nodes.append(node)
            continue
        axis = 0
        for attribute in node.attribute:
            if attribute.name == "axis":
                axis = attribute.i
        start = 0
        for size, output in zip(
            onnx.numpy_helper.to_array(constants[node.input[1]]), node.output, strict=True
        ):
            inputs = [node.input[0]]
            for name, number in (("start", start), ("end", start + size), ("axis", axis)):
                value = np.array([number], np.int64)
                constant = onnx.numpy_helper.from_array(value, f"{output}_{name}")
                graph.initializer.append(constant)
                inputs.append(constant.name)
            nodes.append(onnx.helper.make_node("Slice", inputs, [output], name=f"{output}_slice"))
            start += size
    del graph.node[:]
    graph.node.extend(nodes)


def fold_constants(graph):
    """Return a graph in which what is constant is computed, such as weights times a factor."""
    import onnxscript.optimizer

    fill_constants(graph.graph)
    return onnxscript.optimizer.optimize(
        graph, input_size_limit=FOLDED_SIZE, output_size_limit=FOLDED_SIZE
    )


def fill_constants(graph) -> None:
    """Replace the ConstantOfShape nodes of an onnx.GraphProto by constants, where the shape is one.

    onnxscript keeps them, and with them whatever follows, such as the widths of a padding.
    """
    import onnx

    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    for node in graph.node:
        if node.op_type != "ConstantOfShape" or node.input[0] not in constants:
            continue
        shape = onnx.numpy_helper.to_array(constants[node.input[0]])
        value = np.zeros(1, np.float32)
        for attribute in node.attribute:
            value = onnx.numpy_helper.to_array(attribute.t)
        filled = np.full(shape, value[0], value.dtype)
        constant = onnx.helper.make_node(
            "Constant", [], node.output, name=node.name, value=onnx.numpy_helper.from_array(filled)
        )
        node.CopyFrom(constant)


def tidy(graph, opset: int) -> None:
    """Make a graph one that the converters of accelerators read."""
    import onnx

    graph.ir_version = IR_VERSION
    # ATC refuses a file that names ONNX's own domain twice.
    del graph.opset_import[:]
    graph.opset_import.add(domain="", version=opset)
    # Notes on nodes and values: they hold source paths, and version 8 of the format has none.
    for notes in (graph, graph.graph, *graph.graph.node, *graph.graph.value_info):
        del notes.metadata_props[:]
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.initializer):
        del value.metadata_props[:]
    for node in graph.graph.node:
        known = onnx.defs.get_schema(node.op_type, opset).attributes
        # The conversion leaves some of later operator sets, with a value that means no change.
        kept = [attribute for attribute in node.attribute if attribute.name in known]
        del node.attribute[:]
        node.attribute.extend(kept)


def rewrite_resizes(graph):
    """Return a graph whose nearest Resizes have constant sizes, in the form that ATC takes.

    CANN knows the nearest mode "round_prefer_ceil", torch's is "floor". By a whole factor both give
    the same pixels, counted from their centres. Other factors become a choice of rows and one of
    columns. A Resize whose sizes are free stays as it is.
    """
    import onnx

    if all(node.op_type != "Resize" for node in graph.graph.node):
        return graph
    shapes = static_shapes(onnx.shape_inference.infer_shapes(graph, data_prop=True))
    nodes = []
    constants = []
    for node in graph.graph.node:
        before = shapes.get(node.input[0], ())
        after = shapes.get(node.output[0], ())
        is_known = len(before) == len(after) == 4 and 0 not in (*before[2:], *after[2:])
        if node.op_type != "Resize" or not is_known:
            nodes.append(node)
        elif after[2] % before[2] == 0 and after[3] % before[3] == 0:
            nodes.append(resize_by_factor(node, before, after, constants))
        else:
            nodes.extend(resize_by_choice(node, before, after, constants))
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    graph.graph.initializer.extend(constants)
    remove_unused(graph.graph)
    return graph


def static_shapes(graph) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a graph's values by name; a size that is free counts 0."""
    values = (*graph.graph.input, *graph.graph.value_info, *graph.graph.output)
    shapes = {}
    for value in values:
        dimensions = value.type.tensor_type.shape.dim
        shapes[value.name] = tuple(dimension.dim_value for dimension in dimensions)
    return shapes


def resize_by_factor(node, before: tuple[int, ...], after: tuple[int, ...], constants: list):
    """Return a Resize by whole factors from a shape to another, for the same result as `node`'s.

    Its constants are added to `constants`.
    """
    import onnx

    name = node.output[0]
    roi = onnx.numpy_helper.from_array(np.zeros(0, np.float32), f"{name}_roi")  # unused, required
    if 0 in (*before, *after):  # the batch is free
        factors = [1, 1, after[2] // before[2], after[3] // before[3]]
        target = onnx.numpy_helper.from_array(np.array(factors, np.float32), f"{name}_scales")
        inputs = [node.input[0], roi.name, target.name]
        constants += [roi, target]
    else:
        scales = onnx.numpy_helper.from_array(np.zeros(0, np.float32), f"{name}_scales")
        target = onnx.numpy_helper.from_array(np.array(after, np.int64), f"{name}_sizes")
        inputs = [node.input[0], roi.name, scales.name, target.name]
        constants += [roi, scales, target]
    return onnx.helper.make_node(
        "Resize",
        inputs,
        [name],
        name=node.name,
        mode="nearest",
        coordinate_transformation_mode="half_pixel",
        nearest_mode="round_prefer_ceil",
    )


def resize_by_choice(node, before: tuple[int, ...], after: tuple[int, ...], constants: list):
    """Return two Gathers of rows and columns for the same result as a nearest Resize `node`.

    Their constants are added to `constants`.
    """
    import onnx

    name = node.output[0]
    chosen = []
    for axis in (2, 3):
        positions = torch.arange(before[axis], dtype=torch.float32).view(1, 1, -1)
        nearest = nn.functional.interpolate(positions, size=after[axis], mode="nearest")
        index = nearest.flatten().to(torch.int64).numpy()
        chosen.append(onnx.numpy_helper.from_array(index, f"{name}_axis{axis}"))
    constants += chosen
    between = f"{name}_rows"
    rows_inputs = [node.input[0], chosen[0].name]
    rows = onnx.helper.make_node("Gather", rows_inputs, [between], name=between, axis=2)
    columns_inputs = [between, chosen[1].name]
    columns = onnx.helper.make_node("Gather", columns_inputs, [name], name=node.name, axis=3)
    return [rows, columns]


def remove_unused(graph) -> None:
    """Remove the nodes and constants of an onnx.GraphProto that no output needs."""
    needed = {output.name for output in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(reversed(nodes))
    for values in (graph.initializer, graph.value_info):
        kept = [value for value in values if value.name in needed]
        del values[:]
        values.extend(kept)


def with_nms(graph, suppression: Suppression):
    """Return a graph with an output `nms_scores` followed by the NMS.

    Its outputs are boxes (N, M, 4), scores (N, M) and labels (N, M), best first; M is
    `max_detections`, and the rows beyond the detections of an image have a score of 0.
    """
    import onnx

    outputs = {output.name: output for output in graph.graph.output}
    batch, classes, boxes = static_shapes(graph)["nms_scores"]
    rows = suppression.max_detections
    if boxes:
        rows = min(rows, classes * boxes)
    text = NMS.format(
        boxes=suppression.boxes,
        iou_boxes=suppression.iou_boxes,
        batch=batch or "batch",
        rows=rows,
        classes=classes,
        max_per_class=suppression.max_per_class,
        iou=repr(float(largest_float32(suppression.iou))),
        threshold=repr(float(np.float32(suppression.score_threshold))),
    )
    nms = onnx.parser.parse_graph(text)
    merged = onnx.ModelProto()
    merged.CopyFrom(graph)
    merged.graph.node.extend(nms.node)
    del merged.graph.output[:]
    merged.graph.output.extend(nms.output)
    merged.graph.value_info.extend(outputs.values())
    onnx.checker.check_model(merged, full_check=True)
    return merged


def largest_float32(limit: float) -> np.float32:
    """Return the largest float32 that is not above a limit.

    NMS in numpy compares with the limit itself; the float32 nearest to 0.3 is above 0.3.
    """
    nearest = np.float32(limit)
    if float(nearest) > limit:
        return np.nextafter(nearest, np.float32(0))
    return nearest


def run_graph(graph, images: Tensor) -> dict[str, Tensor]:
    """Run a graph with one input on images (N, 3, H, W); return its outputs by name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    input_name = session.get_inputs()[0].name
    outputs = session.run(None, {input_name: images.numpy()})
    names = [output.name for output in session.get_outputs()]
    return {name: torch.from_numpy(value) for name, value in zip(names, outputs, strict=True)}


@torch.no_grad()
def compare(graph, network: nn.Module, images: Tensor, half: bool = False) -> str:
    """Return how far onnxruntime is from torch on images (N, 3, H, W), in words.

    Left out is what only the NMS needs: which of nearly equal scores are candidates is a matter of
    rounding. Raise UserError where the difference is too large; a graph in `half` precision may
    have larger ones.
    """
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    outputs = run_graph(graph, images)
    differences = []
    for (name, exported), expected in zip(outputs.items(), network(images), strict=True):
        if name.startswith(FOR_NMS):
            continue
        magnitude = expected.abs()
        largest = magnitude.max().item()
        limit = LARGEST_COMPARED
        distance = (expected.clamp(-limit, limit) - exported.clamp(-limit, limit)).abs()
        difference = distance.max().item()
        allowed = tolerance * (magnitude + magnitude.median().clamp(min=LEAST_MEDIAN))
        text = f"{name} differ by {difference:.1e} (largest value {largest:.3g})"
        if not (distance <= allowed).all():  # a NaN fails the comparison
            remedy = "try another --opset"
            if half:
                remedy = "fp16 is not exact enough for it; export without --half"
            raise UserError(f"the exported network is wrong, {text}; {remedy}")
        differences.append(text)
    return ", ".join(differences)


def compare_detections(
    graph, suppression: Suppression, images: Tensor, expected_detections: Callable[..., Detections]
) -> str:
    """Return how far the NMS in a graph is from the detector's on images (N, 3, H, W), in words.

    `graph` is that without NMS. Both choose from the values that the graph decodes, so that only
    the NMS is compared: with other values nearly equal scores may change their order, and the
    detections of a hardly trained network with it. `expected_detections` takes the decoded values
    of one image and returns its Detections in the unit of the graph's boxes. Raise UserError where
    more than MAX_SHARE_LOST of them have no counterpart.
    """
    import onnx

    decoded_outputs = []
    for output in graph.graph.output:
        if not output.name.startswith(FOR_NMS):
            decoded_outputs.append(output)
    both = with_nms(graph, suppression)
    both.graph.output.extend(decoded_outputs)
    outputs = run_graph(both, images)
    onnx.checker.check_model(both)
    counts = []
    for i in range(len(images)):
        decoded = [outputs[output.name][i] for output in decoded_outputs]
        expected = expected_detections(*decoded)
        exists = outputs["scores"][i] > 0
        exported = [outputs[name][i][exists] for name in DETECTIONS]
        lost = count_without_counterpart(expected, exported, suppression.max_detections)
        num_expected = len(expected.scores)
        text = f"{exists.sum()} detections, {lost} other than the {num_expected} of torch"
        if lost > MAX_SHARE_LOST * num_expected:
            raise UserError(f"the exported NMS is wrong: {text}; export with --outputs=decoded")
        counts.append(text)
    return "; ".join(counts)


def check_outputs(graph, reference: nn.Module, images: Tensor, batch: int, half: bool) -> None:
    """Compare a graph's outputs with torch's on images (N, 3, H, W), and print the differences.

    `batch` is the graph's number of images, 0 for any. Raise UserError as `compare` does.
    """
    for inputs in batches_to_check(images, batch):
        difference = compare(graph, reference, inputs, half)
        print(f"onnxruntime against torch, {tuple(inputs.shape)}: {difference}")


def with_checked_nms(
    graph,
    suppression: Suppression,
    images: Tensor,
    batch: int,
    expected_detections: Callable[..., Detections],
):
    """Return a graph with an NMS inside, after comparing its detections with torch's.

    `images`, `batch` as in `check_outputs`; `expected_detections` as in `compare_detections`, which
    says what is printed and raised.
    """
    for inputs in batches_to_check(images, batch):
        counts = compare_detections(graph, suppression, inputs, expected_detections)
        print(f"with NMS, batch {len(inputs)}: {counts}")
    return with_nms(graph, suppression)


def count_without_counterpart(expected, exported, max_detections: int) -> int:
    """Return how many of two sets of detections of an image are in one of them only.

    Both give boxes (n, 4), scores (n,) and labels (n,). Where the sets are full, which of those
    that share the lowest score belong to them is open: they count as far as their numbers differ.
    """
    boxes, scores, labels = expected
    other_boxes, other_scores, other_labels = exported
    lost = abs(len(scores) - len(other_scores))
    if not len(scores) or not len(other_scores):
        return lost
    lowest = 0.0
    if len(scores) == max_detections:
        lowest = scores.min().item() * (1 + SAME_DETECTION)
    tolerance = SAME_DETECTION * boxes.abs().max().clamp(min=1)
    distances = (boxes.unsqueeze(1) - other_boxes).abs().amax(dim=2) / tolerance
    score_distances = (scores.unsqueeze(1) - other_scores).abs() / SAME_DETECTION
    differs = (distances > 1) | (score_distances > 1)
    differs |= labels.unsqueeze(1) != other_labels
    missing = differs.all(dim=1) & (scores > lowest)
    surplus = differs.all(dim=0) & (other_scores > lowest)
    return max(lost, missing.sum().item(), surplus.sum().item())


def describe(graph, notes: dict[str, str], recipe, fields: tuple[str, ...]) -> None:
    """Put notes, our version and the recipe's numbers that a deployer needs into the metadata.

    The numbers are written as JSON.
    """
    import onnx

    metadata = {**notes, "onestage_version": __version__}
    for field in fields:
        metadata[field] = json.dumps(getattr(recipe, field))
    onnx.helper.set_model_props(graph, metadata)


def write_graph(graph, path: Path, opset: int) -> None:
    """Write a graph to a file; print its size, and the next command for each converter."""
    write_atomically(path, graph.SerializeToString())
    mebibytes = graph.ByteSize() / 2**20
    print(f"{path}: {mebibytes:.1f} MiB, opset {opset}, IR version {graph.ir_version}")
    print("Next, one of these; --soc_version is Ascend and the name that npu-smi info shows:")
    for command in next_commands(graph, path):
        print(f"  {command}")


def next_commands(graph, path: Path) -> list[str]:
    """Return the commands that convert a file, for Ascend (two chips), TensorRT and OpenVINO.

    A number of images that is free becomes 1, a height and width that are free `input_size`.
    """
    network_input = graph.graph.input[0]
    sizes = list(static_shapes(graph)[network_input.name])
    is_free = 0 in sizes
    sizes[0] = sizes[0] or 1
    if 0 in sizes:
        notes = {entry.key: entry.value for entry in graph.metadata_props}
        sizes[2:] = json.loads(notes["input_size"])
    stem = path.with_suffix("")
    atc_shape = ",".join(str(size) for size in sizes)
    atc = (
        f"atc --framework=5 --model={path} --output={stem} --input_format=NCHW "
        f'--input_shape="{network_input.name}:{atc_shape}"'
    )
    trtexec = f"trtexec --onnx={path} --saveEngine={stem}.engine"
    if is_free:
        trtexec_shape = "x".join(str(size) for size in sizes)
        trtexec += f" --shapes={network_input.name}:{trtexec_shape}"
    return [
        f"{atc} --soc_version=Ascend910B1",
        f"{atc} --soc_version=Ascend310P3",
        trtexec,
        f"ovc {path} --output_model {stem}.xml",
    ]
