#!/usr/bin/env python3
"""Evaluate SSD300-ResNet34 on a COCO-format val set.

    python3 evaluate.py --data DIR --checkpoint FILE                  one device
    python3 -m torch.distributed.launch --use_env --nproc_per_node=8 evaluate.py ...

Each image counts once, whatever the number of ranks and the batch size. `--format_only` writes
the results in COCO's submission format and computes nothing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: F401 before torch

# isort: split

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.coco import evaluation
from common.coco.draw import draw_pairs
from common.coco.evaluation import Evaluation
from common.coco.images import read_image
from common.coco.index import CocoIndex, find_coco, read_index
from common.fps.summary import write_summary
from common.npu import cli, distributed, entry
from common.npu.device import memory_format, setup_device
from common.npu.distributed import Ranks
from common.npu.precision import Precision
from ssd_resnet34.config import RECIPES, Recipe
from ssd_resnet34.data import build_loader, normalise
from ssd_resnet34.model import build_model
from ssd_resnet34.postprocess import detect
from ssd_resnet34.weights import load_weights

RESULTS = "results.bbox.json"  # COCO's submission format


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    ranks = Ranks.from_environment()
    device, why = setup_device(args.device, ranks.card(args.device_id))
    distributed.start(device, ranks, args.timeout)
    say = print if ranks.main else (lambda *_: None)
    say(why)

    state = cli.checkpoint_to_use(args, ranks)
    recipe = own_network(cli.chosen_recipe(args, RECIPES), state)
    files = find_coco(args.data, "val", args.val_annotations, args.val_images)
    records = read_index(*files, classes=state.get("classes"))
    cli.check_num_classes(args, len(records.class_names))
    model = build_model(recipe, len(records.class_names))
    say(f"{state['path']}: {load_weights(model, state).demand_all(state['path'])}")
    model.to(device, memory_format=memory_format(device))

    precision = Precision(device, getattr(args, "amp", "O0"), recipe.loss_scale, args.amp_dtype)
    workers = cli.workers_for(args, ranks.local_world_size)
    rows = detect_all(model, recipe, records, device, ranks, workers, precision)
    if rows is None:
        return
    if args.format_only:
        evaluation.save_results(args.output_dir / RESULTS, rows)
        say(f"{len(rows)} detections in {len(records)} images: {args.output_dir / RESULTS}")
        return
    outcome = assess(rows, records, recipe, args, say)
    case = (recipe.name, recipe.eval_batch_size, ranks.world_size, "eval")
    seconds, accuracy = time.time() - args.started, outcome.stats["AP"]
    say("\n".join(write_summary(args.output_dir, case, seconds, accuracy=accuracy)))


def parse(argv: list[str] | None):
    groups = ("data", "files", "evaluation", "device", "process")
    parser = cli.parser(__doc__.split("\n")[0], *groups, recipes=RECIPES)
    cli.add(parser, "--format-only", False, "write results, no metrics")
    return parser.parse_args(argv)


def own_network(recipe: Recipe, state: dict) -> Recipe:
    """The recipe with the network that a checkpoint of ours was trained with."""
    kept = state.get("recipe", {})
    return replace(recipe, **{key: kept[key] for key in ("name", "backbone") if key in kept})


def detect_all(
    model: nn.Module,
    recipe: Recipe,
    records: CocoIndex,
    device: torch.device,
    ranks: Ranks,
    workers: int,
    precision: Precision | None = None,
) -> np.ndarray | None:
    """Detect on every image once, shared among the ranks; result rows on rank 0, else None.

    In fp32, unless another `precision` is given.
    """
    loader = build_loader(recipe, records, False, ranks=ranks, workers=workers)
    doors = (detect, records.category_ids)
    return detect_loaded(model, recipe, loader, *doors, device, ranks, precision)


@torch.no_grad()
def detect_loaded(
    model: nn.Module,
    recipe: Recipe,
    loader: Iterable,
    detect: Callable,
    category_ids: Sequence[int],
    device: torch.device,
    ranks: Ranks,
    precision: Precision | None = None,
) -> np.ndarray | None:
    """What `detect` finds in a loader's (images, sizes, ids): result rows of all ranks on rank 0,
    else None."""
    precision = precision or Precision(device)
    was_training = model.training
    model.eval()
    rows = []
    silent = not (ranks.main and sys.stderr.isatty())
    for images, sizes, image_ids in tqdm(loader, "evaluating", leave=False, disable=silent):
        with precision.autocast():
            outputs = model(normalise(images.to(device, non_blocking=True), recipe))
        for image_id, found in zip(image_ids.tolist(), detect(outputs, sizes, recipe), strict=True):
            parts = (part.numpy() for part in found)
            rows.append(evaluation.to_rows(image_id, *parts, category_ids))
    model.train(was_training)
    return evaluation.gather_rows(rows, ranks)


def assess(
    rows: np.ndarray, records: CocoIndex, recipe: Recipe, args, say: Callable[[str], None]
) -> Evaluation:
    """COCO's figures of result rows, told; rows and pictures go to the output folder."""
    folder = args.output_dir
    outcome = told(rows, records.annotation_file, len(records), folder, args, say)
    # The line that the port's users look for.
    say(f"Current AP: {outcome.stats['AP']:.5f} AP goal: {recipe.threshold:.5f}")
    draw_examples(folder / "detections.png", records, rows)
    return outcome


def told(
    rows: np.ndarray, annotation_file: str, images: int, folder: Path, args, say: Callable
) -> Evaluation:
    """COCO's figures of result rows in `images` images, told; rows and curves go to a folder."""
    evaluation.save_results(folder / RESULTS, rows)
    outcome = evaluation.evaluate(annotation_file, rows, args.eval_backend == "faster")
    say(f"{outcome.text}\n{len(rows)} detections in {images} images: {folder / RESULTS}")
    if args.per_class:
        width = max(len(name) for name, _ in outcome.per_class)
        say("\n".join(f"{name:<{width}}  AP {value:.3f}" for name, value in outcome.per_class))
    evaluation.draw_pr_curves(folder / "pr_curves.png", outcome)
    return outcome


def draw_examples(path: Path, records: CocoIndex, rows: np.ndarray, count: int = 8) -> None:
    """Some images with ground truth beside detections, spread over the set."""
    with_truth = np.flatnonzero(np.diff(records.offsets))
    chosen = with_truth if len(with_truth) else np.arange(len(records))
    label = {category: position for position, category in enumerate(records.category_ids)}
    pictures = []
    for i in chosen[np.unique(np.linspace(0, len(chosen) - 1, count, dtype=int))]:
        truth = records.annotations(i)
        found = rows[rows[:, 0] == records.image_ids[i]]
        pictures.append(
            (
                read_image(records.path(i)),
                to_xyxy(truth.box_xywh),
                truth.label,
                to_xyxy(found[:, 1:5]),
                np.array([label[category] for category in found[:, 6]], np.int64),
                found[:, 5],
            )
        )
    draw_pairs(path, pictures, records.class_names)


def to_xyxy(boxes_xywh: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)


if __name__ == "__main__":
    entry.run(main)
