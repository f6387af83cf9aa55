#!/usr/bin/env python3
"""Draw the README's picture from a finished quickstart: detections at left, curves at right.

python3 docs/make_picture.py quickstart/output docs/quickstart.jpg
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common.npu.interpreter  # noqa: F401 before matplotlib

# isort: split

import argparse
import io
import json
from collections import defaultdict

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from common.coco.draw import draw_boxes
from common.coco.images import read_image
from common.coco.index import CocoIndex, read_index
from common.files import write_atomically
from common.fps.curves import ROUND_STEPS, draw_panel, read_panels
from common.npu import entry

DRAWN_IMAGES = 4
SIZE = (12.0, 5.0)  # inches
DOTS_PER_INCH = 100
JPEG_QUALITY = 85
CURVES = ("loss", "COCO AP")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="output folder of the quickstart")
    parser.add_argument("picture", type=Path, help="JPEG file to write")
    args = parser.parse_args(argv)

    record = json.loads((args.run / "run.json").read_text())
    val_set = read_val_set(record)
    detections = read_detections(args.run / "results.bbox.json")
    min_score = json.loads((args.run / "metrics.json").read_text())["best_f1"]["score"]

    figure = Figure(figsize=SIZE, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(5, 6))
    positions = most_boxes_first(val_set)[:DRAWN_IMAGES]
    for ax, position in zip(left.subplots(2, 2).flat, positions, strict=True):
        ax.imshow(draw_detections(val_set, position, detections, min_score))
        ax.set_axis_off()
    panels = [panel for panel in read_panels(run_logs(args.run)) if panel.title in CURVES]
    axes = right.subplots(len(panels), 1, sharex=True)
    for ax, panel in zip(axes, panels, strict=True):
        draw_panel(ax, panel)
    axes[-1].set(xlabel="iteration", xlim=(0, None))
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=8, steps=ROUND_STEPS, integer=True))
    write_jpeg(args.picture, figure)


def read_val_set(record: dict) -> CocoIndex:
    """Return the val set of a run of the sample set, by the paths in its `run.json`."""
    annotations = [file["path"] for file in record["data"] if "val" in Path(file["path"]).stem]
    images = Path(annotations[0]).parents[1] / "val2017"
    return read_index(annotations[0], str(images))


def read_detections(path: Path) -> dict[int, list[dict]]:
    """Return the result rows of a submission file by the ids of their images."""
    detections = defaultdict(list)
    for row in json.loads(path.read_text()):
        detections[row["image_id"]].append(row)
    return detections


def most_boxes_first(val_set: CocoIndex) -> list[int]:
    """Return the positions of the images, those with most ground truth first."""
    counts = np.diff(val_set.offsets)
    return np.argsort(-counts, kind="stable").tolist()


def draw_detections(
    val_set: CocoIndex, position: int, detections: dict[int, list[dict]], min_score: float
) -> Image.Image:
    """Draw the detections of an image from `min_score` on."""
    rows = detections[int(val_set.image_ids[position])]
    rows = [row for row in rows if row["score"] >= min_score]
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = [val_set.category_ids.index(row["category_id"]) for row in rows]
    scores = [row["score"] for row in rows]
    image = read_image(val_set.path(position))
    return draw_boxes(image, boxes, labels, val_set.class_names, scores)


def run_logs(run: Path) -> list[Path]:
    return sorted(run.glob("*.log.json"))


def write_jpeg(path: Path, figure: Figure) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DOTS_PER_INCH)
    picture = io.BytesIO()
    Image.open(drawn).convert("RGB").save(picture, "JPEG", quality=JPEG_QUALITY, optimize=True)
    write_atomically(path, picture.getvalue())


if __name__ == "__main__":
    entry.run(main)
