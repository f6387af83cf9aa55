"""What gpu.py measures: each part is a process of its own and prints lines of JSON."""

import contextlib
import importlib
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import DeviceType, ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.loop import TrainingLoop
from benchmarks.steps import LR, matrix_rate, placed, synchronize
from common.npu.device import has_bf16, in_host_memory, memory_mib
from common.npu.precision import Precision

ROOT = Path(__file__).resolve().parents[1]
PHOTOGRAPHS = ROOT / "tests/data/tiny_coco"
RECORDS = ROOT / "tests/golden/ssd_resnet34_tfrecord/train2017*"

MOST_BOXES = 96  # of an image of COCO's train2017, padded as a run on it has them
WITHOUT_WAITING = 20  # steps
WARMUP = 10  # steps
SECONDS = 2.0  # of a measurement of speed
PROFILED = 5  # steps
PROFILE_LINES = 10
LONGEST_NAME = 60  # characters of a kernel's name
SHARE_OF_MEMORY = 0.9  # that the estimate of a batch may take
LARGEST_BATCH = 1024
NEVER = 10**9  # steps

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Program(NamedTuple):
    """A training program, and the recipe of it that is measured."""

    package: str
    preset: str
    tiny: dict[str, object]  # fields of the recipe that make a step quick, for a test
    estimate: int  # images/s on one H100 at the recipe's batch: counted, not measured
    precision: str = "fp16"  # of the recipe


PROGRAMS = {
    "ssd_mmdet": Program("ssd_mmdet", "1p", {"width": 1 / 16}, 1200),
    "ssd_resnet34": Program("ssd_resnet34", "1p", {"backbone": "resnet10"}, 1850),
    "tfrecord": Program(
        "ssd_resnet34.tfrecord", "port", {"backbone": "resnet10"}, 1200, precision="fp32"
    ),
    "m2det": Program("m2det", "512_vgg", {"backbone": "vgg16_thin", "planes": 16}, 220),
    "fcos": Program(
        "fcos", "gn", {"backbone": "resnet14", "channels": 32, "img_scale": ("96,160",)}, 150
    ),
}
PEERS = {"ssd300_vgg16": "ssd_mmdet", "fcos_resnet50_fpn": "fcos"}  # torchvision's, and ours


class Settings(NamedTuple):
    """Where and how large to measure."""

    device: torch.device
    tiny: bool
    ends_at: float  # on the monotonic clock: what would take longer is left out

    def precisions(self, program: Program) -> list[str]:
        """Return the names of the precisions to measure, fp16 first."""
        if in_host_memory(self.device):
            return ["fp32"]
        names = ["fp16"]
        if has_bf16(self.device):
            names.append("bf16")
        if program.precision == "fp32":
            names.append("fp32")
        return names

    @property
    def seconds(self) -> float:
        return 0.0 if self.tiny else SECONDS


def say(**figures: object) -> None:
    """Print a result, which counts even if the part fails later."""
    print(json.dumps(figures), flush=True)


def measure_matrix(settings: Settings) -> None:
    """Measure the rates of a large matrix product, which shares of speed refer to."""
    names = ["fp32"] if in_host_memory(settings.device) else list(DTYPES)
    for name in names:
        say(kind="rate", precision=name, flops=matrix_rate(settings.device, DTYPES[name]))


def measure_steps(name: str, settings: Settings) -> None:
    """Measure the training step of a program as it is."""
    program = PROGRAMS[name]
    seconds_of_last = 0.0
    for position, precision in enumerate(settings.precisions(program)):
        started = time.monotonic()
        if started + seconds_of_last > settings.ends_at:
            say(kind="left_out", what=f"{name}, {precision}")
            continue
        with training(program, precision, settings) as loop:
            batch = recipe_batch(loop, settings)
            counter = FlopCounterMode(display=False)
            loop.step(batch, counter)
            flops = counter.get_total_flops() / images_of(batch)
            measured = measure_speed(loop, batch, settings)
            say(kind="step", model=name, precision=precision, flops=flops, **measured)
            if position == 0:
                kernels = where_time_goes(loop, batch)
                say(kind="profile", model=name, precision=precision, kernels=kernels)
                if not in_host_memory(settings.device):
                    loop.step(batch, waiting_is_an_error(), WITHOUT_WAITING)
                    say(kind="no_wait", model=name, precision=precision, steps=WITHOUT_WAITING)
            large = largest_batch(loop, batch, settings)
            if large is None:
                continue
            try:
                measured = measure_speed(loop, large, settings)
            except torch.OutOfMemoryError:
                say(kind="failed", what=f"{name}, {precision}, batch {images_of(large)}: memory")
                continue
            say(kind="step", model=name, precision=precision, flops=flops, **measured)
        seconds_of_last = time.monotonic() - started


def measure_compiled(name: str, settings: Settings) -> None:
    """Measure the training step of a program with `--compile`: the largest batch in the end."""
    program = PROGRAMS[name]
    precisions = settings.precisions(program)
    tries = [(precision, False) for precision in precisions]
    tries.append((precisions[0], True))
    seconds_of_last = 0.0
    for precision, is_large in tries:
        started = time.monotonic()
        if started + seconds_of_last > settings.ends_at:
            size = "the largest batch" if is_large else "the recipe's batch"
            say(kind="left_out", what=f"{name} --compile, {precision}, {size}")
            continue
        with training(program, precision, settings, "--compile") as loop:
            batch = recipe_batch(loop, settings)
            if is_large:
                # To know the memory of a step, which is compiled already.
                loop.step(batch)
                batch = largest_batch(loop, batch, settings)
                if batch is None:
                    continue
            before_compiling = time.monotonic()
            loop.step(batch)
            compile_seconds = time.monotonic() - before_compiling
            measured = measure_speed(loop, batch, settings)
            say(kind="step", model=name, precision=precision, compile_seconds=compile_seconds,
                **measured)  # fmt: skip
        seconds_of_last = time.monotonic() - started


def measure_peer(name: str, settings: Settings) -> None:
    """Measure the training step of one of torchvision's detectors, in the faster memory layout."""
    ours = PEERS[name]
    step = importlib.import_module(f"benchmarks.{ours}.step")
    program = PROGRAMS[ours]
    recipe = importlib.import_module(f"{ours}.config").RECIPES[program.preset]
    batch_size = 1 if settings.tiny else recipe.batch_size
    for precision_name in settings.precisions(program):
        precision = make_precision(precision_name, settings.device)
        if ours == "fcos":
            batch = step.landscape_batch(str(PHOTOGRAPHS), recipe, batch_size)
            model = step.torchvision_model(recipe)
        else:
            batch = step.first_batch(str(PHOTOGRAPHS), recipe, batch_size)
            model = step.torchvision_model()
        run = step.torchvision_peer(placed(model, settings.device), recipe, batch, precision)
        speed = batch_size / seconds_a_step(partial(repeat, run), settings)
        say(kind="peer", peer=name, model=ours, precision=precision_name, batch=batch_size,
            images_per_second=speed)  # fmt: skip


def repeat(run: Callable[[], None], count: int) -> None:
    for _ in range(count):
        run()


def make_precision(name: str, device: torch.device) -> Precision:
    """Return autocast to the half type of that name, or fp32."""
    if name == "fp32":
        return Precision(device, "O0")
    return Precision(device, "O1", dtype=name)


@contextlib.contextmanager
def training(
    program: Program, precision: str, settings: Settings, *flags: str
) -> Iterator[TrainingLoop]:
    """Start a program in its loop, with the recipe's batch and nothing due between steps."""
    train = importlib.import_module(f"{program.package}.train")
    build_model = train.build_model

    def as_pretrained(*arguments) -> nn.Module:
        """Build the network, that of fcos frozen as with pretrained weights."""
        model = build_model(*arguments)
        if program.package == "fcos":
            model.backbone.freeze()
        return model

    recipe = replace(train.RECIPES[program.preset], lr=LR)
    if settings.tiny:
        recipe = replace(recipe, batch_size=2, **program.tiny)
    words = [f"--device={settings.device.type}", f"--save_interval={NEVER}", *flags]
    if precision == "fp32":
        words.append("--amp=O0")
    else:
        words += ["--amp=O1", f"--amp_dtype={precision}"]
    if program.package == "ssd_resnet34.tfrecord":
        words += [f"--training_file_pattern={RECORDS}", "--mode=train"]
    else:
        words += [f"--data={PHOTOGRAPHS}", "--kind=perf"]
    log = io.StringIO()
    loop = TrainingLoop(train, recipe, words)
    with contextlib.redirect_stdout(log), mock.patch.object(train, "build_model", as_pretrained):
        loop.__enter__()
    try:
        progress = loop.state.progress
        progress.log_interval = NEVER
        progress.end = NEVER
        yield loop
    finally:
        with contextlib.redirect_stdout(log):
            loop.__exit__()


def recipe_batch(loop: TrainingLoop, settings: Settings):
    """Return the first batch, with as much padding of ground truth as COCO's needs."""
    batch = next(iter(loop.loader))
    missing = max(0, MOST_BOXES - batch.valid.shape[1])
    batch = batch._replace(
        boxes=F.pad(batch.boxes, (0, 0, 0, missing)),
        labels=F.pad(batch.labels, (0, missing)),
        valid=F.pad(batch.valid, (0, missing)),
    )
    return repeated(batch, 1, settings)


def repeated(batch, times: int, settings: Settings):
    """Return a batch with the images `times` over, in pinned memory where that is of use."""
    tensors = []
    for tensor in batch:
        tensor = torch.cat([tensor] * times)
        if not in_host_memory(settings.device):
            tensor = tensor.pin_memory()
        tensors.append(tensor)
    return type(batch)(*tensors)


def images_of(batch) -> int:
    return len(batch.valid)


def measure_speed(loop: TrainingLoop, batch, settings: Settings) -> dict[str, float]:
    """Return batch, images/s, and the peak memory in MiB."""
    device = settings.device
    if not in_host_memory(device):
        torch.accelerator.reset_peak_memory_stats()
    seconds = seconds_a_step(lambda count: loop.step(batch, count=count), settings)
    images = images_of(batch)
    return {
        "batch": images,
        "images_per_second": images / seconds,
        "memory_mib": memory_mib(device),
    }


def seconds_a_step(run: Callable[[int], object], settings: Settings) -> float:
    """Return the wall time of a step; `run(count)` waits for the device only at its end."""
    run(1 if settings.tiny else WARMUP)
    seconds = timed(run, 2, settings)
    count = max(2, int(settings.seconds / seconds))
    return timed(run, count, settings)


def timed(run: Callable[[int], object], count: int, settings: Settings) -> float:
    synchronize(settings.device)
    started = time.perf_counter()
    run(count)
    synchronize(settings.device)
    return (time.perf_counter() - started) / count


def largest_batch(loop: TrainingLoop, batch, settings: Settings):
    """Return the batch repeated as often as the memory takes, by doubling; None for not at all.

    What the steps so far took beyond weights and optimizer is taken to grow with the batch.
    """
    if in_host_memory(settings.device):
        return repeated(batch, 2, settings) if settings.tiny else None
    for parameter in loop.state.model.parameters():
        parameter.grad = None
    always = torch.cuda.memory_allocated()
    each_time = torch.cuda.max_memory_allocated() - always
    _, total = torch.cuda.mem_get_info()
    times = 1
    while times * images_of(batch) < LARGEST_BATCH:
        if always + 2 * times * each_time > SHARE_OF_MEMORY * total:
            break
        times *= 2
    return repeated(batch, times, settings) if times > 1 else None


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Raise RuntimeError where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def where_time_goes(loop: TrainingLoop, batch) -> list[tuple[str, float, int]]:
    """Return the kernels (on a CPU the operators) that take most time.

    Each has its name, its share of the time of all of them, and how often it runs in a step.
    """
    activities = [ProfilerActivity.CPU]
    kind = DeviceType.CPU
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        kind = DeviceType.CUDA
    profiler = profile(activities=activities)
    loop.step(batch, profiler, PROFILED)
    events = []
    for event in profiler.key_averages():
        if event.device_type == kind:
            events.append((_own_microseconds(event, kind), event.key, event.count))
    events.sort(reverse=True)
    total = sum(microseconds for microseconds, _, _ in events)
    kernels = []
    for microseconds, key, count in events[:PROFILE_LINES]:
        name = key.replace("|", "/")[:LONGEST_NAME]
        kernels.append((name, microseconds / total, round(count / PROFILED)))
    return kernels


def _own_microseconds(event, kind: DeviceType) -> float:
    if kind == DeviceType.CPU:
        return event.self_cpu_time_total
    return event.self_device_time_total


MEASURES = {
    "matrix": measure_matrix,
    "step": measure_steps,
    "compiled": measure_compiled,
    "peer": measure_peer,
}


def measure(part: str, settings: Settings) -> None:
    """Measure a part, named "matrix" or by what and whom: "step ssd_mmdet"."""
    what, _, name = part.partition(" ")
    if name:
        MEASURES[what](name, settings)
    else:
        MEASURES[what](settings)
