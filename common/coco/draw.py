"""Pictures of boxes: one image, or a sheet with ground truth and detections side by side."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.arithmetic import ceil_div
from common.files import write_atomically

# Of a sheet, in pixels.
PANEL_SIDE = 400
GAP = 18
TITLE_HEIGHT = 20
TITLE_FONT_SIZE = 14
PAIRS_ABREAST = 2

MIN_SCORE = 0.3
GT_TITLE = "ground truth"
DETECTIONS_TITLE = f"detections, score from {MIN_SCORE}"


class Example(NamedTuple):
    """An image (H, W, 3) uint8 RGB with its ground truth and its detections, boxes in pixels."""

    image: np.ndarray
    gt_boxes_xyxy: np.ndarray  # (n, 4)
    gt_labels: np.ndarray  # (n,)
    boxes_xyxy: np.ndarray  # (m, 4)
    labels: np.ndarray  # (m,)
    scores: np.ndarray  # (m,)


def draw_boxes(image_uint8_hwc, boxes_xyxy, labels, class_names, scores=None) -> Image.Image:
    """Return a copy of the image (H, W, 3) with boxes (n, 4) in pixels and labels (n,) drawn in it.

    Boxes are cut at the border, and boxes outside of it are left out. With scores (n,), those are
    written beside the class names and the best boxes lie on top.
    """
    picture = Image.fromarray(image_uint8_hwc)
    draw = ImageDraw.Draw(picture)
    line_width = max(2, round(min(picture.size) / 200))
    font = ImageFont.load_default(max(11, round(min(picture.size) / 30)))
    last_column = picture.width - 1
    last_row = picture.height - 1
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    boxes = boxes.clip(0, (last_column, last_row, last_column, last_row))
    boxes = boxes.round().astype(int).tolist()
    labels = np.asarray(labels).tolist()
    tags = [class_names[label] for label in labels]
    order = range(len(labels))
    if scores is not None:
        tags = [f"{tag} {score:.2f}" for tag, score in zip(tags, scores, strict=True)]
        order = np.argsort(np.asarray(scores), kind="stable")
    for i in order:
        left, top, right, bottom = boxes[i]
        if right > left and bottom > top:
            colour = _class_colour(labels[i])
            draw.rectangle(boxes[i], outline=colour, width=line_width)
            _draw_tag(picture, tags[i], left, top, colour, font)
    return picture


def _class_colour(label: int) -> str:
    """Return the colour of a class.

    Neighbouring classes lie far apart in hue, and all are bright enough for black letters.
    """
    hue = label * 222.5 % 360
    lightness = 60 + label % 2 * 12
    return f"hsl({hue}, 95%, {lightness}%)"


def _draw_tag(
    picture: Image.Image, text: str, left: int, top: int, colour: str, font: ImageFont.ImageFont
) -> None:
    """Draw a tag that stands on its box, or lies in it where it would leave the picture."""
    draw = ImageDraw.Draw(picture)
    width, height = draw.textbbox((4, 3), text, font=font)[2:]  # with a margin
    left = max(0, min(left, picture.width - width))
    if top >= height:
        top -= height
    draw.rectangle((left, top, left + width, top + height), fill=colour)
    draw.text((left + 2, top + 1), text, fill="black", font=font)


def draw_sheet(path: Path, examples: Sequence[Example], class_names: Sequence[str]) -> None:
    """Write a PNG sheet, two examples abreast: ground truth at left, detections at right.

    Detections below MIN_SCORE are not drawn.
    """
    pair_width = 2 * (PANEL_SIDE + GAP)
    pair_height = TITLE_HEIGHT + PANEL_SIDE + GAP
    num_rows = ceil_div(len(examples), PAIRS_ABREAST)
    sheet_size = (GAP + PAIRS_ABREAST * pair_width, GAP + num_rows * pair_height)
    sheet = Image.new("RGB", sheet_size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(TITLE_FONT_SIZE)
    for number, example in enumerate(examples):
        ground_truth, detections = _draw_panels(example, class_names)
        left = GAP + number % PAIRS_ABREAST * pair_width
        top = GAP + number // PAIRS_ABREAST * pair_height
        draw.text((left, top), GT_TITLE, fill="#444444", font=font)
        sheet.paste(ground_truth, (left, top + TITLE_HEIGHT))
        left += PANEL_SIDE + GAP
        draw.text((left, top), DETECTIONS_TITLE, fill="#444444", font=font)
        sheet.paste(detections, (left, top + TITLE_HEIGHT))
    picture = io.BytesIO()
    sheet.save(picture, "PNG")
    write_atomically(path, picture.getvalue())


def _draw_panels(example: Example, class_names: Sequence[str]) -> tuple[Image.Image, Image.Image]:
    """Return the example's image with its ground truth, and with its detections.

    The image is resized before drawing: lines and letters have one size all over the sheet.
    """
    height, width = example.image.shape[:2]
    scale = PANEL_SIDE / max(height, width)
    panel_size = (max(1, round(width * scale)), max(1, round(height * scale)))
    resized = Image.fromarray(example.image).resize(panel_size, Image.Resampling.LANCZOS)
    resized = np.asarray(resized)
    gt_boxes = example.gt_boxes_xyxy * scale
    ground_truth = draw_boxes(resized, gt_boxes, example.gt_labels, class_names)
    keep = example.scores >= MIN_SCORE
    boxes = example.boxes_xyxy[keep] * scale
    scores = example.scores[keep]
    detections = draw_boxes(resized, boxes, example.labels[keep], class_names, scores)
    return ground_truth, detections
