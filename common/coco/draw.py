"""Pictures of boxes: one image, or a sheet with ground truth and detections side by side."""

import colorsys
import io
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.npu.files import write_atomically

# Of a sheet, in pixels.
PANEL, GAP, MARGIN, TITLE = 400, 6, 18, 20
PAIR = 2 * PANEL + GAP


def draw_boxes(
    image_uint8_hwc: np.ndarray,
    boxes_xyxy: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    scores: np.ndarray | None = None,
    *,
    min_score: float = 0.0,
) -> Image.Image:
    """Copy of the image (H, W, 3) with boxes (n, 4) in pixels, labels (n,) and scores (n,), if any.

    Boxes are cut at the border and boxes outside of it left out, as are those below `min_score`.
    The best lie on top.
    """
    picture = Image.fromarray(image_uint8_hwc)
    draw = ImageDraw.Draw(picture)
    line = max(2, round(min(picture.size) / 200))
    font = ImageFont.load_default(max(11, round(min(picture.size) / 30)))
    limits = (picture.width - 1, picture.height - 1) * 2
    boxes_xyxy = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4).clip(0, limits)
    labels = np.asarray(labels).tolist()
    texts = [class_names[label] for label in labels]
    if scores is None:
        scores = np.full(len(labels), np.inf)
    else:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores, strict=True)]
    for i in np.argsort(scores, kind="stable").tolist():
        left, top, right, bottom = boxes_xyxy[i].round().astype(int).tolist()
        if scores[i] < min_score or right <= left or bottom <= top:
            continue
        colour = _colour(labels[i])
        draw.rectangle((left, top, right, bottom), outline=colour, width=line)
        # The tag stands on the box, or in it where it would leave the picture.
        width, height = draw.textbbox((4, 3), texts[i], font=font)[2:]  # with a margin
        left = max(0, min(left, picture.width - width))
        top = top - height if top >= height else top
        draw.rectangle((left, top, left + width, top + height), fill=colour)
        draw.text((left + 2, top + 1), texts[i], fill="black", font=font)
    return picture


def draw_pairs(
    path: str | os.PathLike,
    rows: Sequence[tuple],
    class_names: Sequence[str],
    *,
    columns: int = 2,
    min_score: float = 0.3,
) -> None:
    """Write a PNG sheet, `columns` pairs abreast: ground truth at left, detections at right.

    `rows`: one (image, gt_boxes_xyxy, gt_labels, boxes_xyxy, labels, scores) an image, as
    `draw_boxes` takes them. Detections below `min_score` are not drawn.
    """
    pairs = [_draw_pair(row, class_names, min_score) for row in rows]
    lines = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]
    heights = [max(pair.height for pair in line) + MARGIN for line in lines]
    width = min(columns, len(pairs)) * (PAIR + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, sum(heights) + MARGIN), "white")
    for number, line in enumerate(lines):
        for column, pair in enumerate(line):
            place = MARGIN + column * (PAIR + MARGIN), MARGIN + sum(heights[:number])
            sheet.paste(pair, place)
    sheet.save(png := io.BytesIO(), "PNG")
    write_atomically(path, png.getvalue())


def _draw_pair(row: tuple, class_names: Sequence[str], min_score: float) -> Image.Image:
    """Two titled copies of the image, PAIR pixels wide."""
    image_uint8_hwc, gt_boxes_xyxy, gt_labels, boxes_xyxy, labels, scores = row
    image = Image.fromarray(image_uint8_hwc)
    scale = PANEL / max(image.size)
    # Resized before drawing, not after: lines and letters keep one size over the whole sheet.
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    resized = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
    truth = draw_boxes(resized, np.asarray(gt_boxes_xyxy) * scale, gt_labels, class_names)
    found = draw_boxes(
        resized, np.asarray(boxes_xyxy) * scale, labels, class_names, scores, min_score=min_score
    )
    pair = Image.new("RGB", (PAIR, TITLE + size[1]), "white")
    draw = ImageDraw.Draw(pair)
    font = ImageFont.load_default(14)
    titles = "ground truth", f"detections, score from {min_score:g}"
    for panel, title, left in zip((truth, found), titles, (0, PANEL + GAP), strict=True):
        draw.text((left, 0), title, fill="#444444", font=font)
        pair.paste(panel, (left, TITLE))
    return pair


def _colour(label: int) -> tuple[int, int, int]:
    """The class's own colour, bright enough for black letters; neighbours lie far apart in hue."""
    hue, lightness = label * 0.618034 % 1, (0.6, 0.72)[label % 2]
    return tuple(round(255 * part) for part in colorsys.hls_to_rgb(hue, lightness, 0.95))
