#!/usr/bin/env python3
"""Check this machine: versions, and the originals' numbers of every model computed on its device.

    python3 selfcheck.py                          the first device that works: NPU, CUDA, else CPU
    python3 selfcheck.py --device npu --model fcos

Anchors, targets, loss and gradients, detections, forward pass and training steps of each model are
replayed in fp32 from the golden files, small ones first. A line says how far the result is from the
original's, what is allowed, how long it took the first time, and which operators the device left to
the host. The report is written to a file as well: attach it to a question about this machine. The
exit status is 1 where a phase fails.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
import common.npu.interpreter  # noqa: F401 before torch

# isort: split

import importlib
import time

from common import flags
from common.coco.images import read_image
from common.files import write_atomically
from common.npu import entry
from common.npu.device import be_exact, device_versions, environment, has_bf16, setup_device
from common.npu.selfcheck import Golden, run_phase, warm_up

MODELS = ("ssd_resnet34", "ssd_mmdet", "fcos", "m2det")
PHOTOGRAPHS_TO_DECODE = 50


def main(argv: list[str] | None = None) -> int:
    parser = flags.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto", help="auto, npu, cuda or cpu")
    parser.add_argument("--device-id", type=int, default=0, help="which of several devices")
    parser.add_argument("--model", choices=MODELS, help="this one alone")
    parser.add_argument("--report", type=Path, default=Path("selfcheck.txt"), help="text file")
    args = parser.parse_args(argv)
    report = []

    def say(line: str) -> None:
        print(line, flush=True)
        report.append(line)

    device, reason = setup_device(args.device, args.device_id)
    be_exact(device)
    say(reason)
    say(environment())
    for version in device_versions(device):
        say(version)
    say(f"bfloat16: {'yes' if has_bf16(device) else 'no'}")

    warm_up(device)
    num_phases = 0
    num_passed = 0
    models = [args.model] if args.model else MODELS
    for model in models:
        golden = Golden(model)
        for phase in importlib.import_module(f"{model}.selfcheck").PHASES:
            outcome = run_phase(phase, golden, device)
            say(outcome.line(model))
            num_phases += 1
            num_passed += outcome.passed
    say(f"decoding photographs: {decoded_images_per_second(golden):.0f} images/s a process")
    say(f"{num_passed} of {num_phases} phases pass")
    write_atomically(args.report, "\n".join([*report, ""]).encode())
    print(f"report: {args.report}")
    return int(num_passed < num_phases)


def decoded_images_per_second(golden: Golden) -> float:
    """Return how many photographs a loader's process decodes a second."""
    paths = sorted((golden.photographs / "train2017").glob("*.jpg"))[:PHOTOGRAPHS_TO_DECODE]
    started = time.perf_counter()
    for path in paths:
        read_image(path)
    return len(paths) / (time.perf_counter() - started)


if __name__ == "__main__":
    entry.run(main)
