"""It learns: a small network remembers four real images, trained by the real script."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "data" / "tiny_coco"


@pytest.mark.slow
def test_four_real_images_are_remembered(tmp_path):
    content = json.loads((TINY / "annotations/instances_train2017.json").read_text())
    boxes = Counter(a["image_id"] for a in content["annotations"])
    chosen = sorted(image for image, count in boxes.items() if 3 <= count <= 8)[:4]
    content["images"] = [image for image in content["images"] if image["id"] in chosen]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in chosen]
    subset = tmp_path / "four.json"
    subset.write_text(json.dumps(content))
    files = [
        f"--{split}_{what}={path}"
        for split in ("train", "val")
        for what, path in (("annotations", subset), ("images", TINY / "train2017"))
    ]
    # Random initialisation: a warm-up and a clipped gradient instead of ImageNet weights.
    recipe = "--backbone=resnet10 --batch_size=4 --epochs=90 --lr=0.16 --lr_step=0 --warmup=15"
    recipe += " --warmup_factor=0 --clip_norm=10 --lr_decay_epochs 65 --evaluation 75"
    recipe += " --threshold=0.5"
    recipe += " --no-augment --num_workers=0 --no-save --device=cpu"
    script = [sys.executable, ROOT / "ssd_resnet34/train.py", f"--output_dir={tmp_path}/out"]
    subprocess.run([*script, *files, *recipe.split()], check=True, timeout=800)
    (log,) = (tmp_path / "out").glob("*.log.json")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (val,) = [line for line in lines if line.get("mode") == "val"]
    assert val["bbox_mAP_50"] >= 0.9
    # The goal is reached at the first evaluation, and the run ends there.
    assert val["epoch"] == max(line.get("epoch", 0) for line in lines) == 75
