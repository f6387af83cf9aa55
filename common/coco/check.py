"""`--check_data`: every rule of an annotation file (index.py), and every image decoded."""

from multiprocessing.pool import ThreadPool

from tqdm import tqdm

from common.coco.images import read_image
from common.coco.index import CocoIndex, Rule, Severity, read_annotations
from common.errors import UserError

BAD_IMAGE_FILE = Rule(
    "image that cannot be read, or of another size than annotated", Severity.ERROR
)
IMAGES_PER_TASK = 16  # of a thread


def check_data(*data: tuple[str, str]) -> int:
    """Check annotation files and their image folders, and print what is wrong with each.

    The classes of the first file are the ones that all may have. Return the exit status: 1 where
    there are errors.
    """
    status = 0
    class_names = None
    for annotation_file, image_dir in data:
        index = read_annotations(annotation_file, image_dir)
        if class_names is None:
            class_names = index.class_names
        index.check_classes(class_names)
        index.report[BAD_IMAGE_FILE] = _bad_image_files(index)
        severities = [rule.severity for rule in index.broken_rules()]
        num_errors = severities.count(Severity.ERROR)
        num_notes = len(severities) - num_errors
        print(f"{annotation_file}: {num_errors} errors, {num_notes} notes")
        for line in index.lines(limit=None):
            print(f"  {line}")
        if num_errors:
            status = 1
    return status


def _bad_image_files(index: CocoIndex) -> list[str]:
    """Decode all images, and describe those that cannot be read or have another size."""

    def describe_problem(i: int) -> str | None:
        path = index.path(i)
        try:
            height, width = read_image(path).shape[:2]
        except UserError as error:
            return str(error).split(";")[0]  # without the remedy
        if [height, width] != index.sizes[i].tolist():
            return f"{path}: {width} x {height}"
        return None

    with ThreadPool() as pool:
        answers = pool.imap(describe_problem, range(len(index)), chunksize=IMAGES_PER_TASK)
        problems = list(tqdm(answers, total=len(index), unit="image", disable=None))
    return [problem for problem in problems if problem is not None]
