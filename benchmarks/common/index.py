#!/usr/bin/env python3
"""CPU time and memory of reading an annotation file as large as COCO's train2017.

    python3 benchmarks/common/index.py                      ours and pycocotools
    python3 benchmarks/common/index.py --other ../before    and the index of another checkout

The file is made of tiny_coco's real images and annotations, repeated under new ids.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "data" / "tiny_coco" / "annotations" / "instances_train2017.json"

OURS = "from common.coco.index import read_annotations; read_annotations(sys.argv[1])"
PYCOCOTOOLS = "from pycocotools.coco import COCO; COCO(sys.argv[1])"
# The time of the imports, which come first in both, is left out.
CHILD = """
import resource, sys, time
{imports}
start = time.process_time()
{call}
seconds = time.process_time() - start
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=118_287, help="images in the file")
    parser.add_argument("--rounds", type=int, default=3, help="how often each reads it, in turns")
    parser.add_argument("--other", type=Path, help="another checkout to compare with")
    args = parser.parse_args()
    readers = {"ours": (OURS, ROOT), "pycocotools": (PYCOCOTOOLS, ROOT)}
    if args.other:
        readers["other"] = (OURS, args.other)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "instances_train2017.json")
        num_boxes = write_annotations(path, args.images)
        print(f"{args.images} images, {num_boxes} boxes, {path.stat().st_size >> 20} MiB")
        results = {name: [] for name in readers}
        for _ in range(args.rounds):
            for name, (code, checkout) in readers.items():
                results[name].append(measure(code, checkout, path))
    for name, measured in results.items():
        seconds = median(of_round[0] for of_round in measured)
        gibibytes = median(of_round[1] for of_round in measured)
        print(f"{name:<12} {seconds:6.1f} s of CPU time  {gibibytes:.1f} GiB")


def write_annotations(path: Path, num_images: int) -> int:
    """Write an annotation file of `num_images` and return its number of annotations."""
    coco = json.loads(TINY.read_text())
    of_image = {}
    for annotation in coco["annotations"]:
        of_image.setdefault(annotation["image_id"], []).append(annotation)
    images = []
    annotations = []
    for number, image in zip(range(1, num_images + 1), itertools.cycle(coco["images"])):
        images.append({**image, "id": number, "file_name": f"{number:012}.jpg"})
        for annotation in of_image.get(image["id"], []):
            new_ids = {"id": len(annotations) + 1, "image_id": number}
            annotations.append({**annotation, **new_ids})
    content = {**coco, "images": images, "annotations": annotations}
    path.write_text(json.dumps(content))
    return len(annotations)


def measure(code: str, checkout: Path, path: Path) -> tuple[float, float]:
    """Return CPU seconds and the peak memory in GiB of reading a file in a process of its own."""
    imports, call = code.split("; ")
    child = CHILD.format(imports=imports, call=call)
    command = [sys.executable, "-c", child, str(path)]
    done = subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True)
    seconds, gibibytes = done.stdout.split()[-2:]
    return float(seconds), float(gibibytes)


if __name__ == "__main__":
    main()
