"""Evaluation of the TFRecord recipe: every record once, COCO's figures under the port's names."""

import os
from collections.abc import Callable
from datetime import datetime

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.coco.evaluation import STATS, Evaluation
from common.coco.index import read_annotations
from common.errors import UserError
from common.npu.distributed import Ranks
from ssd_resnet34.evaluate import detect_loaded, told
from ssd_resnet34.tfrecord.config import Recipe
from ssd_resnet34.tfrecord.data import build_loader
from ssd_resnet34.tfrecord.index import RecordIndex, read_index
from ssd_resnet34.tfrecord.postprocess import detect

# The port's names of the twelve figures.
NAMES = {name: f"COCO/{name.replace('AR1', 'ARmax1')}" for name in STATS}


def validation_records(args, category_ids: tuple[int, ...]) -> RecordIndex:
    """The records to evaluate. Raises UserError where `--val_json_file` does not know an image or a
    category: found now, not after days of training."""
    records = read_index(args.validation_file_pattern, "--validation_file_pattern", category_ids)
    truth = read_annotations(args.val_json_file)
    truth.raise_errors()
    if missing := sorted(set(category_ids) - set(truth.category_ids)):
        raise UserError(f"{args.val_json_file} has no category {missing[0]}; see --category_ids")
    foreign = np.flatnonzero(~np.isin(records.image_ids, truth.image_ids))
    if len(foreign):
        image_id = records.image_ids[foreign[0]]
        reason = f"image {image_id} is not in {args.val_json_file}"
        if image_id < 0:
            reason = "no image/source_id, which the evaluation needs; convert the data set again"
        raise UserError(f"{records.where(foreign[0])}: {reason}")
    return records


def detect_all(
    model: nn.Module,
    recipe: Recipe,
    records: RecordIndex,
    device: torch.device,
    ranks: Ranks,
    workers: int,
) -> np.ndarray | None:
    """Detect on every record once, shared among the ranks, in fp32; result rows on rank 0, else
    None."""
    loader = build_loader(recipe, records, False, ranks=ranks, workers=workers)
    return detect_loaded(model, recipe, loader, detect, records.category_ids, device, ranks)


def assess(rows: np.ndarray, images: int, args, say: Callable[[str], None]) -> Evaluation:
    """COCO's figures of result rows in `images` images, told in the port's lines too; files go to
    `eval` in the output folder."""
    outcome = told(rows, args.val_json_file, images, args.output_dir / "eval", args, say)
    announce(f"Current AP: {outcome.stats['AP']:.5f}")
    results = {NAMES[name]: value for name, value in outcome.stats.items()}
    announce(f"Eval results: {results}")
    return outcome


def announce(text: str) -> None:
    """Print a line as the port's users' scripts look for it, behind `] `."""
    with tqdm.external_write_mode():
        stamp = f"I{datetime.now():%m%d %H:%M:%S.%f} {os.getpid()}"
        print(f"{stamp} ssd_main.py] {text}", flush=True)
