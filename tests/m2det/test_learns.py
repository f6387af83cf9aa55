"""It learns: a thin network remembers two real images, trained by the real script."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "data" / "tiny_coco"


@pytest.mark.slow
def test_two_real_images_are_remembered(tmp_path):
    content = json.loads((TINY / "annotations/instances_train2017.json").read_text())
    boxes = Counter(a["image_id"] for a in content["annotations"])
    chosen = sorted(image for image, count in boxes.items() if 3 <= count <= 8)[:2]
    content["images"] = [image for image in content["images"] if image["id"] in chosen]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in chosen]
    subset = tmp_path / "two.json"
    subset.write_text(json.dumps(content))
    files = [
        f"--{split}_{what}={path}"
        for split in ("train", "val")
        for what, path in (("annotations", subset), ("images", TINY / "train2017"))
    ]
    recipe = "--recipe=quickstart --batch_size=2 --epochs=160 --warmup_epochs=10 --lr=0.02"
    recipe += " --lr_last_epochs 130 160 --bn_momentum=0.1 --threshold=0.6"
    recipe += " --num_workers=0 --no-save --device=cpu --amp=O0"
    script = [sys.executable, ROOT / "m2det/train.py", f"--output_dir={tmp_path}/out"]
    subprocess.run([*script, *files, *recipe.split()], check=True, timeout=800)
    (log,) = (tmp_path / "out").glob("*.log.json")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    values = [line["bbox_mAP_50"] for line in lines if line.get("mode") == "val"]
    assert values[-1] >= 0.9
