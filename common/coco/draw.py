"""Pictures of boxes: one image, or a sheet with ground truth and detections side by side."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.files import write_atomically

PANEL, GAP, TITLE = 400, 18, 20  # of a sheet, in pixels
MIN_SCORE = 0.3
TITLES = "ground truth", f"detections, score from {MIN_SCORE}"


def draw_boxes(image_uint8_hwc, boxes_xyxy, labels, class_names, scores=None) -> Image.Image:
    """Copy of the image (H, W, 3) with boxes (n, 4) in pixels, labels (n,) and scores (n,), if any.

    Boxes are cut at the border and boxes outside of it left out. The best lie on top.
    """
    picture = Image.fromarray(image_uint8_hwc)
    draw = ImageDraw.Draw(picture)
    line = max(2, round(min(picture.size) / 200))
    font = ImageFont.load_default(max(11, round(min(picture.size) / 30)))
    limits = (picture.width - 1, picture.height - 1) * 2
    corners = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4).clip(0, limits).round().astype(int)
    labels = np.asarray(labels).tolist()
    texts, order = [class_names[label] for label in labels], range(len(labels))
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores, strict=True)]
        order = np.argsort(np.asarray(scores), kind="stable")
    for i in order:
        left, top, right, bottom = corners[i].tolist()
        if right <= left or bottom <= top:
            continue
        # Neighbouring classes lie far apart in hue; all are bright enough for black letters.
        colour = f"hsl({labels[i] * 222.5 % 360}, 95%, {60 + labels[i] % 2 * 12}%)"
        draw.rectangle((left, top, right, bottom), outline=colour, width=line)
        # The tag stands on the box, or in it where it would leave the picture.
        width, height = draw.textbbox((4, 3), texts[i], font=font)[2:]  # with a margin
        left = max(0, min(left, picture.width - width))
        top = top - height if top >= height else top
        draw.rectangle((left, top, left + width, top + height), fill=colour)
        draw.text((left + 2, top + 1), texts[i], fill="black", font=font)
    return picture


def draw_pairs(path: Path, rows: Sequence[tuple], class_names: Sequence[str]) -> None:
    """Write a PNG sheet, two pairs abreast: ground truth at left, detections at right.

    `rows`: one (image, gt_boxes_xyxy, gt_labels, boxes_xyxy, labels, scores) an image, as
    `draw_boxes` takes them. Detections below MIN_SCORE are not drawn.
    """
    wide, high = 2 * (PANEL + GAP), TITLE + PANEL + GAP
    sheet = Image.new("RGB", (GAP + 2 * wide, GAP + math.ceil(len(rows) / 2) * high), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (image, gt_boxes, gt_labels, *found) in enumerate(rows):
        # Resized before drawing, not after: lines and letters keep one size over the whole sheet.
        scale = PANEL / max(image.shape[:2])
        size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
        small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
        boxes, labels, scores = (part[found[2] >= MIN_SCORE] for part in found)
        truth = draw_boxes(small, gt_boxes * scale, gt_labels, class_names)
        detected = draw_boxes(small, boxes * scale, labels, class_names, scores)
        left, top = GAP + number % 2 * wide, GAP + number // 2 * high
        for title, panel in zip(TITLES, (truth, detected), strict=True):
            draw.text((left, top), title, fill="#444444", font=font)
            sheet.paste(panel, (left, top + TITLE))
            left += PANEL + GAP
    sheet.save(png := io.BytesIO(), "PNG")
    write_atomically(path, png.getvalue())
