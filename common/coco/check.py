"""`--check_data`: every rule for an annotation file (index.py), and every image decoded."""

from functools import partial
from multiprocessing.pool import ThreadPool

from tqdm import tqdm

from common.coco.images import read_image
from common.coco.index import CocoIndex, read_annotations
from common.errors import UserError


def check_data(*data: tuple[str, str]) -> int:
    """Print what is wrong with each annotation file and its image folder; the exit status."""
    status, classes = 0, None
    for files in data:
        index = read_annotations(*files)
        index.compare(classes := classes or index.class_names)
        with ThreadPool() as pool:
            found = pool.imap(partial(_problem, index), range(len(index)), chunksize=16)
            found = list(tqdm(found, total=len(index), unit="image", disable=None))
        rule = "error: image that cannot be read, or of another size than annotated"
        index.report[rule] = list(filter(None, found))
        lines = index.lines(limit=None)
        errors = sum(line.startswith("error: ") for line in lines)
        print(f"{files[0]}: {errors} errors, {len(lines) - errors} notes", *lines, sep="\n  ")
        status |= errors > 0
    return status


def _problem(index: CocoIndex, i: int) -> str | None:
    try:
        size = list(read_image(index.path(i)).shape[:2])
    except UserError as error:
        return str(error).split(";")[0]
    return None if size == index.sizes[i].tolist() else f"{index.path(i)}: {size[1]} x {size[0]}"
