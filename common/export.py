"""Writing a network as ONNX and checking it with onnxruntime; the graph itself is the model's."""

import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.coco.images import read_image
from common.coco.sample import write_sample
from common.errors import UserError
from common.npu.device import require_torch

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
OLDEST_TORCH = (2, 7)  # the exporter of 2.6 cannot translate a batch norm
TOLERANCE = 1e-4  # of an output's largest value; fp32 rounding makes about 1e-6
MAX_BATCH = 4096  # torch 2.6 requires an upper bound of a free axis; none is meant


def require_packages() -> None:
    """Raise UserError where a package that the export needs is not installed, or too old."""
    require_torch(OLDEST_TORCH, "the ONNX export")
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


def export_graph(
    network: nn.Module,
    image_size: tuple[int, int],
    input_name: str,
    output_names: list[str],
    opset: int,
    free_axes: dict | None = None,
):
    """Return a network of images (N, 3, *image_size) as an onnx.ModelProto.

    The number of images is free; `free_axes` names further free axes, by position, with their
    `torch.export.Dim`. Raise UserError where torch cannot write the operator set.
    """
    import onnx

    for name in ("torch.onnx", "onnxscript"):  # they log warnings about their fallbacks
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Not one image: an example batch of one would fix the batch axis.
    example = torch.zeros(2, 3, *image_size)
    axes = {0: torch.export.Dim("batch", max=MAX_BATCH), **(free_axes or {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        program = torch.onnx.export(
            network,
            (example,),
            input_names=[input_name],
            output_names=output_names,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=(axes,),
            verbose=False,
        )
    graph = program.model_proto
    written = opset_of(graph)
    if written != opset:
        raise UserError(f"--opset {opset}: torch cannot write it; give --opset {written}")
    onnx.checker.check_model(graph, full_check=True)
    return graph


def opset_of(graph) -> int:
    """Return the version of ONNX's own operators that a graph uses."""
    for imported in graph.opset_import:
        if not imported.domain:
            return imported.version
    raise ValueError("the graph uses no operator of ONNX itself")


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
def compare(graph, network: nn.Module, images: Tensor) -> str:
    """Return how far onnxruntime is from torch on images (N, 3, H, W), in words.

    Raise UserError where that is too far.
    """
    outputs = run_graph(graph, images)
    differences = []
    for (name, exported), expected in zip(outputs.items(), network(images), strict=True):
        largest = expected.abs().max().item()
        difference = (expected - exported).abs().max().item()
        text = f"{name} differ by {difference:.1e} (largest value {largest:.3g})"
        if not difference <= TOLERANCE * largest:  # a NaN fails the comparison
            raise UserError(f"the exported network is wrong, {text}; try another --opset")
        differences.append(text)
    return ", ".join(differences)


def describe(graph, notes: dict[str, str], recipe, fields: tuple[str, ...]) -> None:
    """Put notes and the recipe's numbers that a deployer needs, as JSON, into the metadata."""
    import onnx

    metadata = dict(notes)
    for field in fields:
        metadata[field] = json.dumps(getattr(recipe, field))
    onnx.helper.set_model_props(graph, metadata)
