#!/usr/bin/env python3
"""Detect and draw: FCOS on images, folders of images, videos and cameras.

    python3 demo.py FILE.pth IMAGE FOLDER ...    a checkpoint, ours or MMDetection's, and images
    python3 demo.py FILE.pth clip.mp4 0          a video, and camera 0 until Ctrl-C (needs OpenCV)
    python3 demo.py                              newest checkpoint, built-in sample

Pictures keep the names of their images, below the folder that all have in common; of a video the
frames are drawn in a video. `results.json` lists what is drawn, `--coco` writes all detections in
COCO's format. An image that cannot be read is reported and left out; the exit status is 1 then.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common.npu.interpreter  # noqa: F401 before torch

# isort: split

import tempfile
import time
from argparse import Namespace
from itertools import chain

from common import flags
from common.coco.demo_images import DemoOutput, category_ids_of, find_images, read_images
from common.coco.metrics import lowest_scores
from common.coco.sample import write_sample
from common.coco.video import find_videos, read_videos
from common.npu import entry
from common.npu.device import setup_device
from common.npu.weights import notes_on_class_names
from fcos.config import RECIPES, Recipe
from fcos.data import input_size
from fcos.detector import Detector
from fcos.old_flags import OLD_FLAGS
from fcos.weights import note_on_preset, recipe_of_checkpoint

SAMPLE_IMAGES = 12  # drawn where no image is given


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device, reason = setup_device(args.device, args.device_id)
    print(reason)
    state = flags.checkpoint_to_use(args, Recipe.model)
    requested = flags.chosen_recipe(args, RECIPES)
    recipe = recipe_of_checkpoint(requested, state, user_fields=vars(args))
    recipe = flags.require_agreement(args, recipe, state)
    detector = Detector.from_checkpoint(state, recipe, device, user_fields=vars(args))
    note = note_on_preset(requested, state)
    if note is not None:
        print(note)
    print(f"{state['path']}: {detector.report}")
    for line in notes_on_class_names(state, detector.class_names):
        print(line)
    print(f"input: {input_size(detector.recipe)}")
    min_scores = lowest_scores(args.min_score, state["path"], detector.class_names)
    output = DemoOutput(args.show_dir, detector.class_names, min_scores)
    with tempfile.TemporaryDirectory() as scratch, output:
        inputs = args.inputs
        if not inputs:
            sample = Path(scratch, "sample")
            write_sample(sample, train=1, val=SAMPLE_IMAGES)
            inputs = [sample / "val2017"]
        files = find_images(inputs, args.show_dir)
        videos = find_videos(inputs, args.show_dir)
        batches = chain(read_images(files, batch_size=1), read_videos(videos, batch_size=1))
        started = time.perf_counter()
        for names, images in batches:
            for name, image, detections in zip(
                names, images, detector.detect_batch(images), strict=True
            ):
                output.add(name, image, detections)
        seconds = time.perf_counter() - started
    output.write(category_ids_of(state, detector.class_names) if args.coco else None)
    count = len(output)
    total = len(files) + output.num_frames
    print(f"{count} of {total} images drawn in {args.show_dir}, {count / seconds:.1f} images/s")
    print(output.boxes_line())
    return 0 if count == total else 1


def parse(argv: list[str] | None) -> Namespace:
    parser = flags.make_parser(__doc__, "files", "device", recipes=RECIPES, old_flags=OLD_FLAGS)
    flags.add(parser, "--config", "", "no effect: the checkpoint shows its network")
    args = flags.parse_demo(parser, argv)
    if args.config:
        print("--config has no effect: the checkpoint shows its network")
    return args


if __name__ == "__main__":
    entry.run(main)
