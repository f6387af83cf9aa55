"""`--check_data`: every rule of an annotation file (index.py), and every image decoded.

What the training set holds is counted (counts.py), and the boxes that the chosen preset sees
(coverage.py); lines and a picture (data_picture.py) say it.
"""

import os
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.coco.counts import TrainingBoxes, count_lines, join_boxes, training_boxes
from common.coco.coverage import Presets, report_coverage
from common.coco.data_picture import data_picture_file, draw_data
from common.coco.images import ImageReader, turned_images_line
from common.coco.index import (
    CocoIndex,
    Findings,
    Rule,
    Severity,
    find_image_files,
    read_annotations,
)
from common.coco.layout import Files
from common.coco.trained import trained_boxes_line
from common.errors import UserError
from common.files import encoded, write_atomically

BAD_IMAGE_FILE = Rule(
    "image that cannot be read, or of another size than annotated", Severity.ERROR
)
IMAGES_PER_TASK = 16  # of a thread
EXAMPLES_SHOWN = 20  # of each rule; the report file has all


def check_data(
    training: Sequence[Files],
    validation: Sequence[Files],
    untrained_boxes: Callable[[CocoIndex], dict[str, np.ndarray]],
    turns_if_both_fit: bool,
    output_dir: Path,
    presets: Presets,
) -> int:
    """Check annotation files and their image folders, and print what is wrong with each.

    After that print what the training set holds and what of it `presets` see, and draw it, unless
    there are errors in it.

    The classes of the first file are the ones that all may have. `untrained_boxes` gives, by
    reason, the boxes (A,) of an index that are not trained on. Findings that the terminal does not
    show are written to a file beside `output_dir`, and so is the picture. Return the exit status: 1
    where there are errors.
    """
    folder = output_dir.absolute()
    report_file = folder.with_name(f"{folder.name}_check_data.txt")
    status = 0
    class_names = None
    whole_report = []
    is_shortened = False
    trained = []
    for number, files in enumerate([*training, *validation]):
        index = read_annotations(files.annotation_file, files.image_dir, class_names, examples=None)
        if class_names is None:
            class_names = index.class_names
        index.check_classes(class_names)
        index = find_image_files(index)
        reader = ImageReader(index, turns_if_both_fit)
        index.report[BAD_IMAGE_FILE] = Findings.of(_bad_image_files(reader))

        num_errors = 0
        num_notes = 0
        for rule, findings in index.broken_rules().items():
            if rule.severity is Severity.ERROR:
                num_errors += findings.count
            else:
                num_notes += findings.count
            is_shortened |= findings.count > EXAMPLES_SHOWN
        headline = f"{files}: {num_errors} errors, {num_notes} notes"
        whole_report += [headline, *index.lines(limit=None)]
        print(headline)
        for line in index.lines(EXAMPLES_SHOWN):
            print(f"  {line}")
        num_turned = np.count_nonzero(reader.is_turned)
        if num_turned:
            print(f"  {turned_images_line(num_turned, len(index))}")
        if num_errors:
            status = 1
        elif number < len(training):
            usable = index.without_unusable()
            untrained = untrained_boxes(usable)
            try:
                print(f"  {trained_boxes_line(usable, untrained)}")
            except UserError as error:
                print(f"  error: {error}")
                status = 1
            else:
                trained.append(training_boxes(usable, untrained, class_names))
    if is_shortened:
        text = "\n".join(whole_report) + "\n"
        write_atomically(report_file, encoded(text))
        print(f"all of them: {report_file}")
    if len(trained) == len(training):
        look_at_boxes(join_boxes(trained), presets, output_dir)
    else:
        print("the boxes are counted once the training set has no error")
    return status


def look_at_boxes(boxes: TrainingBoxes, presets: Presets, output_dir: Path) -> None:
    """Print what a training set holds and what of it is seen; draw it beside `output_dir`."""
    picture_file = data_picture_file(output_dir)
    report = report_coverage(boxes, presets)
    print("training set:")
    for line in count_lines(boxes):
        print(f"  {line}")
    *table, advice = report.lines
    for line in table:
        print(f"  {line}")
    draw_data(picture_file, boxes, report.chosen)
    print(f"  picture: {picture_file}")
    print(advice)


def _bad_image_files(reader: ImageReader) -> list[str]:
    """Decode all images that are there; describe those that cannot be read or of another size."""

    def describe_problem(i: int) -> str | None:
        has_size = reader.records.sizes[i].min() > 0
        if not has_size or not os.path.lexists(reader.records.path(i)):
            return None  # reported as that
        try:
            reader.read(i)
        except UserError as error:
            return error.problem
        return None

    num_images = len(reader.records)
    with ThreadPool() as pool:
        answers = pool.imap(describe_problem, range(num_images), chunksize=IMAGES_PER_TASK)
        problems = list(tqdm(answers, total=num_images, unit="image", disable=None))
    return [problem for problem in problems if problem is not None]
