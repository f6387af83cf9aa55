"""It learns: a small network remembers four real images, trained by the real script."""

import json
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from tests.fcos import runs
from tests.scripts import TINY


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_four_real_images_are_remembered(tmp_path):
    content = json.loads((TINY / "annotations/instances_train2017.json").read_text())
    crowded = {a["image_id"] for a in content["annotations"] if a["iscrowd"]}
    boxes = Counter(a["image_id"] for a in content["annotations"])
    # Lying ones, so that a batch holds all four, and those with the largest smallest box: they
    # can be learnt at a small scale.
    lying = {image["id"] for image in content["images"] if image["width"] > image["height"]}
    sides = defaultdict(list)
    for annotation in content["annotations"]:
        sides[annotation["image_id"]] += annotation["bbox"][2:]
    some = [i for i in lying - crowded if 3 <= boxes[i] <= 8]
    chosen = sorted(some, key=lambda i: min(sides[i]))[-4:]
    content["images"] = [image for image in content["images"] if image["id"] in chosen]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in chosen]
    subset = tmp_path / "four.json"
    subset.write_text(json.dumps(content))
    files = [
        f"--{split}_{what}={path}"
        for split in ("train", "val")
        for what, path in (("annotations", subset), ("images", TINY / "train2017"))
    ]
    recipe = "--recipe=quickstart --no-augment --batch_size=4 --epochs=110"
    recipe += " --lr=0.08 --lr_decay_epochs 80 100 --warmup=20"
    # What training padded, evaluation must pad.
    recipe += " --eval_shapes=two --num_workers=0 --no-save --device=cpu"
    script = [sys.executable, runs.MODEL / "train.py", f"--output_dir={tmp_path}/out"]
    subprocess.run([*script, *files, *recipe.split()], check=True)
    (log,) = (tmp_path / "out").glob("*.log.json")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (val,) = [line for line in lines if line.get("mode") == "val"]
    assert val["bbox_mAP_50"] >= 0.9
