"""A folder as a run leaves it, made by hand, with names that are no markup; a page, read back."""

import json
import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

VOID = {"meta", "link", "img", "input", "br"}  # elements without an end
CLASSES = ["<script>alert(1)</script>", '"quo\'ted" & <b>bold</b>', "自行车", "plain"]
FILES = ["<img src=x onerror=alert(1)>.jpg", os.fsdecode(b"bild_\xff.jpg"), "ordinary.jpg"]
METRICS = {"AP": 0.4321, "AP50": 0.6789, "AP75": 0.4, "APsmall": -1.0, "AR100": 0.5}
BEST = {"score": 0.37, "precision": 0.8, "recall": 0.5, "f1": 0.61}
RECORD = {
    "started": "2026-01-02T03:04:05",
    "folder": "/data",
    "command": ["python3", "train.py", "--data=<b>"],
    "model": "ssd_mmdet",
    "recipe": {"name": "SSD<300>", "lr": 0.1},
    "resumed": None,
    "data": [{"path": "/data/<b>/train.json"}],
    "device": "device: cpu (as asked)",
    "precision": "O0",
    "ranks": 1,
    "seed": 3,
    "flags": {},
    "versions": {"commit": "5" * 60, "python": "3.11", "torch": "2.13"},
}


def write_log(folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps(RECORD))
    lines = [{"env_info": "python", "config": "lr = 0.1", "seed": 3, "exp_name": "x"}]
    for step in range(10, 101, 10):
        about = {"mode": "train", "epoch": 1, "iter": step, "lr": 0.1, "step": step}
        lines.append({**about, "loss_cls": 2 / step, "loss": 3 / step, "fps": 50.0, "time": 0.1})
    scores = {"bbox_mAP": 0.4, "bbox_mAP_50": 0.6, "bbox_mAP_75": 0.4}
    lines.append({"mode": "val", "epoch": 1, "iter": 100, "lr": 0.1, **scores, "steps_done": 100})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "20260102_030405.log.json").write_text(text)
    warning = "2026-01-02 03:04:05,678 - onestage - WARNING - 2 images are <small>\n"
    (folder / "train_0.log").write_text(2 * warning)
    (folder / "SSD300_bs8_1p_acc.log").write_text("ActualFPS = 51.25\nE2ETrainingTime = 7384\n")


def write_evaluation(folder: Path, classes: list[str] = CLASSES, images: int = 4) -> None:
    """What an evaluation and the analysis of its errors leave."""
    rng = np.random.default_rng(0)
    of_classes = []
    curves = {}
    for k, name in enumerate(classes):
        ap = round(0.1 + 0.8 * k / len(classes), 3)
        figures = {"name": name, "AP": ap, "AP50": ap, "AR": ap, "boxes": 10 + k, "best_f1": BEST}
        of_classes.append(figures)
        falling = np.sort(rng.random(101).round(3))[::-1].tolist()
        curves[name] = {"AP50": falling, "AP": falling}
    of_classes.append(
        {
            "name": "absent", "AP": -1.0, "AP50": -1.0, "AR": -1.0, "boxes": 0,
            "best_f1": dict.fromkeys(BEST, -1.0),
        }
    )  # fmt: skip
    metrics = {**METRICS, "step": 100, "images": 50, "best_f1": BEST, "classes": of_classes}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "pr_curves.json").write_text(json.dumps(curves))
    names = [*classes, "background"]
    worst = [{"image_id": i, "file": FILES[i % 3], "missed": i, "false": 2} for i in range(30)]
    suspect = {"kind": "no label", "file": FILES[1], "image_id": 1, "box": [1, 2, 3, 4]}
    analysis = {
        "AP50": 0.6789,
        "min_score": 0.37,
        "iou": 0.5,
        "errors": {"localisation": {"count": 5, "dAP": 0.25}, "missed": {"count": 7, "dAP": 0.05}},
        "worst_images": worst,
        "suspects": [{**suspect, "label": "", "detected": classes[0], "score": 0.91}],
        "confusion": {
            "names": names,
            "min_score": 0.37,
            "iou": 0.5,
            "counts": rng.integers(0, 9, (len(names), len(names))).tolist(),
        },
    }
    (folder / "analysis.json").write_text(json.dumps(analysis))
    for name in ("detections", "worst_images", "suspect_labels"):
        pixels = rng.integers(0, 256, (40 * images, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text of each section."""

    def __init__(self, path):
        super().__init__()
        self.elements = []
        self.sections = {}
        self.open = []
        self._section = None
        self.feed(path.read_bytes().decode("utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self._section = attributes["id"]
            self.sections[self._section] = ""

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "section":
            self._section = None

    def handle_data(self, data):
        if self._section and self.open[-1] not in ("script", "style"):
            self.sections[self._section] += data

    def attributes(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]
