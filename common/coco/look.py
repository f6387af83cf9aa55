"""Training samples as the network gets them, with what matches each box: text and pictures."""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from common.coco.draw import class_colour, draw_boxes, fit_image
from common.coco.fonts import text_font
from common.files import write_atomically

SAMPLES_A_PAGE = 12
# Of a page, in pixels.
PAIRS_ABREAST = 2
PANEL_SIDE = 448
GAP = 18
PAIR_WIDTH = 2 * PANEL_SIDE + GAP
FONT_SIZE = 15
LINE_HEIGHT = 21
SWATCH_SIDE = 11
SPACE = 14  # between two entries of a line
LINES_OF_BOXES = 4  # under a pair; further boxes are counted in a last entry
MOST_TAGGED_BOXES = 12  # of more boxes, only the colours under the picture tell the classes
POINT_RADIUS = 1.5
DIMMED = 0.5  # brightness of the image under anchors and points
MATCHES_OPACITY = 0.65  # their boxes stand out
JPEG_QUALITY = 90
TEXT_COLOUR = "#222222"
ALARM_COLOUR = "#d00000"
NOT_FINITE = "not finite"


class Sample(NamedTuple):
    """An image as the network gets it, the normalisation undone, and what is learned from it."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    boxes_xyxy: np.ndarray  # (n, 4) float32, pixels of the image
    labels: np.ndarray  # (n,) int64 0-based classes
    # Of each box what learns it, in pixels of the image: anchors (k, 4) xyxy or points (k, 2) xy
    matches: list[np.ndarray]
    image_id: int
    file: str = ""
    losses: dict[str, float] | None = None  # loss terms of this image alone

    def box_texts(self, class_names: Sequence[str]) -> list[str]:
        """Return the class of each box with its number of matches."""
        texts = []
        for label, matches in zip(self.labels.tolist(), self.matches, strict=True):
            texts.append(f"{class_names[label]} {len(matches)}")
        return texts

    def loss_texts(self) -> list[str]:
        """Return the loss terms with their values; one without a finite value says so."""
        texts = []
        for name, value in (self.losses or {}).items():
            mark = "" if math.isfinite(value) else f" {NOT_FINITE}"
            texts.append(f"{name} {value:.4g}{mark}")
        return texts

    def line(self, class_names: Sequence[str]) -> str:
        """Return all that is said of the sample in one line."""
        count = len(self.matches)
        parts = [f"image {self.image_id}", self.file, "1 box" if count == 1 else f"{count} boxes"]
        if self.matches:
            parts[-1] += f" with their matches: {', '.join(self.box_texts(class_names))}"
        if self.losses:
            parts.append(", ".join(self.loss_texts()))
        return "; ".join(part for part in parts if part)


def make_samples(
    pixels: Tensor,
    boxes_xyxy: Tensor,
    labels: Tensor,
    valid: Tensor,
    image_ids: Tensor,
    anchors: Tensor,
    positive: Tensor,
    matched: Tensor,
) -> list[Sample]:
    """Return the samples of a batch.

    `pixels` (N, 3, H, W) are RGB in 0..255, not rounded; `boxes_xyxy` (N, M, 4), in pixels,
    `labels` and `valid` (N, M) the padded ground truth; `anchors` (P, 4) xyxy or points (P, 2), in
    pixels; `positive` and `matched` (N, P) what `assign` of a model returns.
    """
    images = pixels.cpu().clamp(0, 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    boxes_xyxy = boxes_xyxy.cpu().numpy()
    labels = labels.cpu().numpy()
    valid = valid.cpu().numpy()
    anchors = anchors.cpu().numpy()
    positive = positive.cpu().numpy()
    matched = matched.cpu().numpy()
    samples = []
    for i, image in enumerate(images):
        matches = []
        for column in np.flatnonzero(valid[i]):
            matches.append(anchors[positive[i] & (matched[i] == column)])
        sample = Sample(
            image=image,
            boxes_xyxy=boxes_xyxy[i][valid[i]],
            labels=labels[i][valid[i]],
            matches=matches,
            image_id=int(image_ids[i]),
        )
        samples.append(sample)
    return samples


def draw_pages(
    samples: Iterable[Sample], class_names: Sequence[str], folder: Path, name: str
) -> Iterator[Path]:
    """Write `<name>_<page>.jpg` of the samples in a folder, and yield the path of each page.

    Pages of that name from a longer series before are deleted.
    """
    number = 0
    pairs = []
    for sample in samples:
        pairs.append(draw_pair(sample, class_names))
        if len(pairs) == SAMPLES_A_PAGE:
            number += 1
            yield _write_page(pairs, folder / f"{name}_{number}.jpg")
            pairs = []
    if pairs:
        number += 1
        yield _write_page(pairs, folder / f"{name}_{number}.jpg")
    while True:
        number += 1
        left_over = folder / f"{name}_{number}.jpg"
        if not left_over.exists():
            return
        left_over.unlink()


def _write_page(pairs: list[Image.Image], path: Path) -> Path:
    """Write pairs as one JPEG, `PAIRS_ABREAST` of them in a row."""
    rows = []
    for first in range(0, len(pairs), PAIRS_ABREAST):
        rows.append(pairs[first : first + PAIRS_ABREAST])
    width = GAP + PAIRS_ABREAST * (PAIR_WIDTH + GAP)
    heights = [max(pair.height for pair in row) for row in rows]
    page = Image.new("RGB", (width, GAP + sum(heights) + GAP * len(rows)), "white")
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        for number, pair in enumerate(row):
            page.paste(pair, (GAP + number * (PAIR_WIDTH + GAP), top))
        top += height + GAP
    content = io.BytesIO()
    # Colours as sharp as brightness: lines are one pixel wide.
    page.save(content, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    write_atomically(path, content.getvalue())
    return path


def draw_pair(sample: Sample, class_names: Sequence[str]) -> Image.Image:
    """Return a picture of a sample, `PAIR_WIDTH` wide.

    At left is the image with its boxes, at right the same with what matches them. Each box has a
    colour of its own. The text below has the matches of each box, first of those without any, and
    the loss terms.
    """
    panel, scale = fit_image(sample.image, PANEL_SIDE)
    boxes = sample.boxes_xyxy * scale
    numbers = np.arange(len(boxes))
    names = [class_names[label] for label in sample.labels.tolist()]
    counts = [str(len(matches)) for matches in sample.matches]
    if len(boxes) > MOST_TAGGED_BOXES:
        names = [""] * len(boxes)
        counts = names

    left_panel = draw_boxes(np.asarray(panel), boxes, numbers, names)
    dimmed = panel.point(lambda value: value * DIMMED)
    with_matches = dimmed.copy()
    draw = ImageDraw.Draw(with_matches)
    for number, matches in enumerate(sample.matches):
        _draw_matches(draw, matches * scale, class_colour(number))
    with_matches = Image.blend(dimmed, with_matches, MATCHES_OPACITY)
    right_panel = draw_boxes(np.asarray(with_matches), boxes, numbers, counts)

    lines = _wrapped(_box_entries(sample, class_names))
    lines += _wrapped(_loss_entries(sample))
    pair_height = LINE_HEIGHT + panel.height + LINE_HEIGHT * len(lines) + 4
    pair = Image.new("RGB", (PAIR_WIDTH, pair_height), "white")
    draw = ImageDraw.Draw(pair)
    title = f"image {sample.image_id}"
    if sample.file:
        title = f"{Path(sample.file).name}, {title}"
    draw.text((0, 0), title, fill=TEXT_COLOUR, font=text_font(FONT_SIZE, title))
    pair.paste(left_panel, (0, LINE_HEIGHT))
    pair.paste(right_panel, (PANEL_SIDE + GAP, LINE_HEIGHT))
    top = LINE_HEIGHT + panel.height + 4
    for line in lines:
        left = 0
        for entry in line:
            left = _draw_entry(draw, entry, left, top)
        top += LINE_HEIGHT
    return pair


def _draw_matches(draw: ImageDraw.ImageDraw, matches: np.ndarray, colour: str) -> None:
    """Draw anchors (k, 4) as thin lines, points (k, 2) as dots."""
    for match in matches.tolist():
        if len(match) == 2:
            x, y = match
            corners = (x - POINT_RADIUS, y - POINT_RADIUS, x + POINT_RADIUS, y + POINT_RADIUS)
            draw.ellipse(corners, fill=colour)
        else:
            draw.rectangle(match, outline=colour)


class _Entry(NamedTuple):
    """A text under a pair, with a square of its box's colour before it."""

    text: str
    colour: str = TEXT_COLOUR
    swatch: str | None = None

    def width(self) -> float:
        swatch_width = SWATCH_SIDE + 5 if self.swatch else 0
        return swatch_width + text_font(FONT_SIZE, self.text).getlength(self.text)


def _box_entries(sample: Sample, class_names: Sequence[str]) -> list[_Entry]:
    """Return an entry for each box, the ones without a match first."""
    if not sample.matches:
        return [_Entry("no box", ALARM_COLOUR)]
    entries = []
    without_match = []
    for number, text in enumerate(sample.box_texts(class_names)):
        if len(sample.matches[number]):
            entries.append(_Entry(text, swatch=class_colour(number)))
        else:
            without_match.append(_Entry(text, ALARM_COLOUR, class_colour(number)))
    return without_match + entries


def _loss_entries(sample: Sample) -> list[_Entry]:
    entries = []
    for text in sample.loss_texts():
        colour = ALARM_COLOUR if text.endswith(NOT_FINITE) else TEXT_COLOUR
        entries.append(_Entry(text, colour))
    return entries


def _wrapped(entries: list[_Entry]) -> list[list[_Entry]]:
    """Return lines of entries that fit the width of a pair, at most `LINES_OF_BOXES`."""
    lines = []
    used = PAIR_WIDTH
    for number, entry in enumerate(entries):
        width = entry.width() + SPACE
        if used + width > PAIR_WIDTH:
            if len(lines) == LINES_OF_BOXES:
                lines[-1][-1] = _Entry(f"and {len(entries) - number + 1} more")
                break
            lines.append([])
            used = 0.0
        lines[-1].append(entry)
        used += width
    return lines


def _draw_entry(draw: ImageDraw.ImageDraw, entry: _Entry, left: float, top: int) -> float:
    """Draw an entry; return where the next one begins."""
    end = left + entry.width() + SPACE
    if entry.swatch:
        swatch_top = top + 4
        corners = (left, swatch_top, left + SWATCH_SIDE, swatch_top + SWATCH_SIDE)
        draw.rectangle(corners, fill=entry.swatch)
        left += SWATCH_SIDE + 5
    font = text_font(FONT_SIZE, entry.text)
    draw.text((left, top), entry.text, fill=entry.colour, font=font)
    return end
