"""Pictures of what went wrong: costs of errors, confusion, worst images, suspect labels."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.arithmetic import ceil_div
from common.coco.analysis import ERROR_TYPES, SUSPECT_KINDS, Analysis, ImageErrors, Suspect
from common.coco.draw import draw_boxes, fit_image, write_png
from common.coco.fonts import font_families, has_cjk, text_font
from common.files import write_figure

# Colours that colour-blind people can tell apart, all bright enough for black letters.
RIGHT_COLOUR = "#7fb2ff"
MISSED_COLOUR = "#ffb000"
FALSE_COLOUR = "#ff6fb5"
SUSPECT_COLOUR = "#ffb000"
TEXT_COLOUR = "#333333"
OUTSIDE_COLOUR = "#dddddd"  # where a cut-out reaches over the border of the image
BAR_COLOUR = "#4c78a8"
SUM_COLOUR = "#9aa5b1"
DOTS_PER_INCH = 110

# Of the sheets, in pixels.
PANEL_SIDE = 460
GAP = 18
TITLE_HEIGHT = 22
FONT_SIZE = 14
PAIRS_ABREAST = 2
TILE_SIDE = 210
TILES_ABREAST = 6
TILES_OF_A_KIND = 12
TILE_TITLE_HEIGHT = 40
SMALL_FONT_SIZE = 12
SMALLEST_CROP = 48  # of the image, around a suspect label
CROP_MARGIN = 0.6  # of the longer side of the box, on all sides

# Of the confusion matrix.
CLASSES_WITH_COUNTS = 20  # up to so many there is room for numbers in all cells
MOST_CLASSES = 100
WRITTEN_SHARE = 0.1  # in a large matrix, from which a confusion is written in its cell
BACKGROUND_NAME = "background"


def draw_errors(path: Path, analysis: Analysis) -> None:
    """Write a PNG of bars: how much AP50 each type of error costs, the dearest on top."""
    from matplotlib.figure import Figure

    types = sorted(ERROR_TYPES, key=lambda name: -analysis.errors[name].cost)
    labels = [f"{name}\n{ERROR_TYPES[name]}" for name in types]
    errors = [analysis.errors[name] for name in types]
    labels += ["all false detections", "all boxes without a right detection"]
    errors += [analysis.false_positives, analysis.false_negatives]
    # A gap parts the types from the two sums, which have errors of several types.
    places = [*range(len(types)), len(types) + 0.5, len(types) + 1.5]
    costs = [100 * error.cost for error in errors]
    colours = [BAR_COLOUR] * len(types) + [SUM_COLOUR] * 2
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(places, costs, color=colours)
    texts = [f"{cost:.1f}  ({error.count:,})" for cost, error in zip(costs, errors, strict=True)]
    axes.bar_label(bars, texts, padding=4, fontsize="small")
    axes.set_yticks(places, labels, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlim(min(0, *costs), max(1.0, 1.25 * max(costs)))
    axes.set_xlabel("points of AP50 that would be gained without it (number of errors)")
    axes.set_title(f"what costs AP50, which is {100 * analysis.ap50:.1f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    write_figure(path, figure, DOTS_PER_INCH)


def draw_confusion(
    path: Path, confusion: np.ndarray, class_names: Sequence[str], score: float, iou: float
) -> None:
    """Write a PNG of a confusion matrix (C + 1, C + 1) int64 [true, detected].

    Cells are coloured by their share of the boxes of the true class; those of the last row, false
    detections, by their share of the detections of the class. Of more than MOST_CLASSES classes
    those with most errors are shown.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    title = f"detections with a score from {score:.2f}, at IoU {iou:g}"
    num_classes = len(class_names)
    shown = np.arange(num_classes + 1)
    shares = confusion_shares(confusion)
    if num_classes > MOST_CLASSES:
        wrong = confusion.sum(axis=0) + confusion.sum(axis=1) - 2 * np.diag(confusion)
        worst = np.sort(np.argsort(-wrong[:-1], kind="stable")[:MOST_CLASSES])
        shown = np.append(worst, num_classes)
        title += f"; the {MOST_CLASSES} classes of {num_classes} with most errors"
    names = [*class_names, BACKGROUND_NAME]
    names = [names[k].replace("$", r"\$") for k in shown]  # no formulas
    counts = confusion[np.ix_(shown, shown)]
    shares = shares[np.ix_(shown, shown)]
    is_small = len(names) <= CLASSES_WITH_COUNTS + 1
    font_size = 9 if is_small else 6.5
    # The margins are computed, because matplotlib takes seconds to find them for so many names.
    longest = max(_columns(name) for name in names)
    names_inches = 0.0085 * font_size * longest
    left = names_inches + 0.5
    bottom = names_inches + 0.75
    side = max(2.4, (0.6 if is_small else 0.2) * len(names))
    width = max(6.0, left + side + 0.3)
    height = bottom + side + 0.5
    figure = Figure(figsize=(width, height))
    area = (left / width, bottom / height, side / width, side / height)
    axes = figure.add_axes(area)
    axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.6, vmin=0, vmax=1))
    families = font_families(names)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=font_size, fontfamily=families)
    axes.set_yticks(range(len(names)), names, fontsize=font_size, fontfamily=families)
    axes.set_xlabel("detected (background: missed)")
    axes.set_ylabel("true (background: false detection)")
    figure.text(0.01, 1 - 0.25 / height, title, fontsize="medium")
    borders = np.arange(len(names) - 1) + 0.5
    limits = (-0.5, len(names) - 0.5)
    axes.vlines(borders, *limits, color="#dddddd", linewidth=0.4)
    axes.hlines(borders, *limits, color="#dddddd", linewidth=0.4)
    axes.set(xlim=limits, ylim=limits[::-1])
    for row, column in np.argwhere(counts > 0).tolist():
        share = shares[row, column]
        text = f"{counts[row, column]:,}"
        if not is_small:
            if row == column or share < WRITTEN_SHARE:
                continue
            text = f"{100 * share:.0f}"
        colour = "white" if share > 0.45 else TEXT_COLOUR
        size = 9 if is_small else 5.5
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)
    note = "colours: share of the boxes of the true class, in the last row of the detections"
    if not is_small:
        note = note.replace("colours", f"colours and numbers from {100 * WRITTEN_SHARE:.0f} %")
    figure.text(0.01, 0.08 / height, note, fontsize="small", color=TEXT_COLOUR)
    write_figure(path, figure, DOTS_PER_INCH)


def _columns(name: str) -> int:
    """Return how wide a name is, in letters: Chinese characters take two."""
    return sum(2 if has_cjk(character) else 1 for character in name)


def confusion_shares(confusion: np.ndarray) -> np.ndarray:
    """Return each cell's share of its row, in the last row of its column, (C + 1, C + 1)."""
    shares = confusion / confusion.sum(axis=1, keepdims=True).clip(min=1)
    num_detected = confusion.sum(axis=0).clip(min=1)
    shares[-1] = confusion[-1] / num_detected
    return shares


class WorstExample(NamedTuple):
    """An image (H, W, 3) uint8 RGB with its errors."""

    file_name: str
    image: np.ndarray
    errors: ImageErrors


def draw_worst_images(path: Path, examples: Sequence[WorstExample], score: float) -> None:
    """Write a PNG sheet, two images abreast: ground truth at left, detections at right.

    Missed boxes and false detections have a colour of their own and a tag, what is right has none.
    """
    pair_width = 2 * (PANEL_SIDE + GAP)
    pairs = [_draw_pair(example) for example in examples]
    num_rows = ceil_div(len(pairs), PAIRS_ABREAST)
    heights = []  # of the panels of each row
    for row in range(num_rows):
        of_row = pairs[row * PAIRS_ABREAST : (row + 1) * PAIRS_ABREAST]
        heights.append(max(boxes.height for boxes, _ in of_row))
    header = TITLE_HEIGHT + GAP
    width = GAP + min(len(pairs), PAIRS_ABREAST) * pair_width
    height = GAP + header + sum(heights) + num_rows * (TITLE_HEIGHT + GAP)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = text_font(FONT_SIZE)
    legend = [
        (RIGHT_COLOUR, "found, right"),
        (MISSED_COLOUR, "missed"),
        (FALSE_COLOUR, f"false, score from {score:.2f}"),
    ]
    left = GAP
    for colour, text in legend:
        draw.rectangle((left, GAP, left + FONT_SIZE, GAP + FONT_SIZE), fill=colour)
        draw.text((left + 1.5 * FONT_SIZE, GAP - 2), text, fill=TEXT_COLOUR, font=font)
        left += round(draw.textlength(text, font=font)) + 4 * FONT_SIZE
    top = GAP + header
    for row in range(num_rows):
        for column in range(PAIRS_ABREAST):
            number = row * PAIRS_ABREAST + column
            if number == len(pairs):
                break
            example = examples[number]
            left = GAP + column * pair_width
            missed = f"{example.file_name}: {example.errors.is_missed.sum()} missed"
            false = f"{example.errors.is_false.sum()} false"
            for panel, text in zip(pairs[number], (missed, false), strict=True):
                font = text_font(FONT_SIZE, text)
                text = _shortened(text, PANEL_SIDE, font)
                draw.text((left, top), text, fill=TEXT_COLOUR, font=font)
                sheet.paste(panel, (left, top + TITLE_HEIGHT))
                left += PANEL_SIDE + GAP
        top += TITLE_HEIGHT + heights[row] + GAP
    write_png(path, sheet)


def _draw_pair(example: WorstExample) -> tuple[Image.Image, Image.Image]:
    """Return the image with its ground truth, and with its detections; errors lie on top."""
    panel, scale = fit_image(example.image, PANEL_SIDE)
    resized = np.asarray(panel)
    errors = example.errors
    order = np.argsort(errors.is_missed, kind="stable")
    boxes = _draw_coloured(
        resized,
        errors.boxes_xyxy[order] * scale,
        [errors.box_names[i] if errors.is_missed[i] else "" for i in order],
        errors.is_missed[order],
        MISSED_COLOUR,
    )
    order = np.lexsort([errors.scores, errors.is_false])
    detections = _draw_coloured(
        resized,
        errors.detected_xyxy[order] * scale,
        [_false_tag(errors, i) for i in order],
        errors.is_false[order],
        FALSE_COLOUR,
    )
    return boxes, detections


def _false_tag(errors: ImageErrors, i: int) -> str:
    if not errors.is_false[i]:
        return ""
    return f"{errors.detected_names[i]} {errors.scores[i]:.2f}"


def _draw_coloured(
    image: np.ndarray,
    boxes_xyxy: np.ndarray,
    tags: Sequence[str],
    is_wrong: np.ndarray,
    wrong_colour: str,
) -> Image.Image:
    colours = [wrong_colour if wrong else RIGHT_COLOUR for wrong in is_wrong.tolist()]
    return draw_boxes(image, boxes_xyxy, np.arange(len(tags)), tags, colours=colours)


def draw_suspects(
    path: Path, suspects: Sequence[Suspect], read_image: Callable[[int], np.ndarray | None]
) -> None:
    """Write a PNG sheet of cut-outs around the first suspect labels of each kind.

    `read_image` returns the image (H, W, 3) uint8 RGB of an id, or None where it is not there.
    """
    blocks = []
    for kind, text in SUSPECT_KINDS.items():
        tiles = []
        for suspect in suspects:
            if suspect.kind != kind or len(tiles) == TILES_OF_A_KIND:
                continue
            image = read_image(suspect.image_id)
            if image is not None:
                tiles.append((suspect, _cut_out(image, suspect.box_xyxy)))
        if tiles:
            blocks.append((f"{kind}: {text}", tiles))
    tile_height = TILE_SIDE + TILE_TITLE_HEIGHT + GAP
    num_rows = sum(ceil_div(len(tiles), TILES_ABREAST) for _, tiles in blocks)
    width = GAP + TILES_ABREAST * (TILE_SIDE + GAP)
    height = GAP + len(blocks) * 2 * TITLE_HEIGHT + num_rows * tile_height
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    heading_font = text_font(FONT_SIZE + 2)
    top = GAP
    for heading, tiles in blocks:
        draw.text((GAP, top), heading, fill="black", font=heading_font)
        top += round(1.5 * TITLE_HEIGHT)
        for number, (suspect, tile) in enumerate(tiles):
            left = GAP + number % TILES_ABREAST * (TILE_SIDE + GAP)
            if number and number % TILES_ABREAST == 0:
                top += tile_height
            lines = (_suspect_line(suspect), suspect.file_name)
            for i, text in enumerate(lines):
                font = text_font(SMALL_FONT_SIZE, text)
                text = _shortened(text, TILE_SIDE, font)
                place = (left, top + i * TILE_TITLE_HEIGHT // 2)
                draw.text(place, text, fill=TEXT_COLOUR, font=font)
            sheet.paste(tile, (left, top + TILE_TITLE_HEIGHT))
        top += tile_height
    write_png(path, sheet)


def _suspect_line(suspect: Suspect) -> str:
    if not suspect.label:
        return f"{suspect.suggested}? {suspect.score:.2f}"
    if not suspect.suggested:
        return f"{suspect.label}, not found ({suspect.score:.0%} are)"
    return f"{suspect.label}; {suspect.suggested}? {suspect.score:.2f}"


def _cut_out(image: np.ndarray, box_xyxy: Sequence[float]) -> Image.Image:
    """Return a square tile of the image around a box, which is drawn in it.

    What of the box lies outside of the image is cut off: a network that has learned nothing may
    give boxes a thousand times as large, whose tile would not fit into the memory.
    """
    height, width = image.shape[:2]
    limits = np.array([width, height, width, height])
    left, top, right, bottom = np.clip(np.asarray(box_xyxy, np.float64), 0, limits).tolist()
    side = (1 + 2 * CROP_MARGIN) * max(right - left, bottom - top)
    side = max(SMALLEST_CROP, side)
    x = (left + right - side) / 2
    y = (top + bottom - side) / 2
    scale = TILE_SIDE / side
    region = [max(0, round(x)), max(0, round(y))]
    region += [min(width, round(x + side)), min(height, round(y + side))]
    square = Image.new("RGB", (round(side), round(side)), OUTSIDE_COLOUR)
    if region[0] < region[2] and region[1] < region[3]:  # else the box lies outside of the image
        part = Image.fromarray(image).crop(region)
        square.paste(part, (region[0] - round(x), region[1] - round(y)))
    tile = square.resize((TILE_SIDE, TILE_SIDE), Image.Resampling.BICUBIC)
    corners = [(left - x) * scale, (top - y) * scale, (right - x) * scale, (bottom - y) * scale]
    corners = np.clip(corners, 0, TILE_SIDE - 1).round().tolist()
    ImageDraw.Draw(tile).rectangle(corners, outline=SUSPECT_COLOUR, width=2)
    return tile


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Return a text that is at most `width` pixels wide; its end is what counts in a file name."""
    shortened = text
    while font.getlength(shortened) > width and len(text) > 1:
        text = text[1:]
        shortened = f"…{text}"
    return shortened
