"""Pictures of boxes: one image, or a sheet with ground truth and detections side by side."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from common.arithmetic import ceil_div
from common.coco.fonts import text_font
from common.files import write_atomically

# Of a sheet, in pixels.
PANEL_SIDE = 400
GAP = 18
TITLE_HEIGHT = 20
TITLE_FONT_SIZE = 14
PAIRS_ABREAST = 2

# A box with a smaller side has a thin outline and a tag in small letters, so that it stays visible.
SMALL_BOX = 1 / 8  # of the shorter side of the picture
TAG_OPACITY = 200  # of 255: what lies under a tag can be seen through it

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


def draw_boxes(
    image_uint8_hwc, boxes_xyxy, labels, class_names, scores=None, colours=None
) -> Image.Image:
    """Return a copy of the image (H, W, 3) with boxes (n, 4) in pixels and labels (n,) drawn in it.

    Boxes are cut at the border, and boxes outside of it are left out. With scores (n,), those are
    written beside the class names and the best boxes lie on top. A tag stands outside its box where
    the picture has room, and where it covers the least of other boxes and tags. An empty name has
    no tag. `colours` (n,) of the boxes, as Pillow names them, replace those of the classes.
    """
    picture = Image.fromarray(image_uint8_hwc)
    last_column = picture.width - 1
    last_row = picture.height - 1
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    boxes = boxes.clip(0, (last_column, last_row, last_column, last_row))
    boxes = boxes.round().astype(int)
    labels = np.asarray(labels).tolist()
    names = [class_names[label] for label in labels]
    from_best = np.arange(len(labels))
    if scores is not None:
        names = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
        from_best = np.argsort(-np.asarray(scores), kind="stable")
    else:
        from_best = from_best[::-1]  # the last one lies on top
    is_inside = (boxes[:, :2] < boxes[:, 2:]).all(axis=1)
    from_best = [i for i in from_best.tolist() if is_inside[i]]

    if colours is None:
        colours = [class_colour(label) for label in labels]
    style = _Style.of(picture, names)
    tags = {}
    for i in from_best:
        if not names[i]:
            continue
        taken = [boxes[other] for other in from_best if other != i]
        taken += [tag.box for tag in tags.values()]
        is_small = (boxes[i, 2:] - boxes[i, :2]).min() < style.small_side
        font = style.small_font if is_small else style.font
        tags[i] = _place_tag(picture, names[i], font, boxes[i], np.array(taken).reshape(-1, 4))
    draw = ImageDraw.Draw(picture, "RGBA")  # in which colours may be half transparent
    for i in reversed(from_best):
        is_small = (boxes[i, 2:] - boxes[i, :2]).min() < style.small_side
        width = 1 if is_small else style.line_width
        draw.rectangle(boxes[i].tolist(), outline=colours[i], width=width)
    for i in reversed(tags):
        tag = tags[i]
        colour = ImageColor.getrgb(colours[i])
        left, top = tag.box[:2]
        draw.rectangle(tag.box, fill=(*colour, TAG_OPACITY))
        draw.text((left + 2, top + 1), tag.text, fill="black", font=tag.font)
    return picture


class _Style(NamedTuple):
    """How large lines and letters are in a picture."""

    line_width: int
    small_side: float  # boxes with a smaller side have thin lines and small letters
    font: ImageFont.ImageFont
    small_font: ImageFont.ImageFont

    @staticmethod
    def of(picture: Image.Image, names: Sequence[str]) -> "_Style":
        shorter_side = min(picture.size)
        font_size = max(11, round(shorter_side / 30))
        characters = "".join(names)
        return _Style(
            line_width=max(2, round(shorter_side / 200)),
            small_side=shorter_side * SMALL_BOX,
            font=text_font(font_size, characters),
            small_font=text_font(max(9, round(font_size * 0.7)), characters),
        )


class _Tag(NamedTuple):
    """A text and the rectangle (left, top, right, bottom) that it fills, in pixels."""

    text: str
    font: ImageFont.ImageFont
    box: tuple[int, int, int, int]


def _place_tag(
    picture: Image.Image,
    text: str,
    font: ImageFont.ImageFont,
    box: np.ndarray,
    taken: np.ndarray,
) -> _Tag:
    """Return the tag of a box (4,), where it covers the least of the boxes `taken` (m, 4).

    The places are above, below, at the right and at the left of the box. It lies in the box only
    where none of them has room in the picture.
    """
    draw = ImageDraw.Draw(picture)
    width, height = draw.textbbox((4, 3), text, font=font)[2:]  # with a margin
    width = int(width)
    height = int(height)
    left, top, right, bottom = box.tolist()
    start = max(0, min(left, picture.width - 1 - width))  # of a tag above or below
    corners = [(start, top - height - 1), (start, bottom + 1), (right + 1, top)]
    corners += [(left - width - 1, top)]
    best = None
    least = np.inf
    for x, y in corners:
        end_x = x + width
        end_y = y + height
        if x < 0 or y < 0 or end_x >= picture.width or end_y >= picture.height:
            continue
        covered = _covered_share((x, y, end_x, end_y), taken)
        if covered < least:
            least = covered
            best = (x, y)
    x, y = best or (start, top)
    return _Tag(text, font, (x, y, x + width, y + height))


def _covered_share(box: tuple[int, int, int, int], others: np.ndarray) -> float:
    """Return how much a box covers of others (m, 4): the sum of the covered shares of each."""
    top_left = np.maximum(others[:, :2], box[:2])
    bottom_right = np.minimum(others[:, 2:], box[2:])
    overlap = (bottom_right - top_left).clip(0).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1)
    return float((overlap / areas).sum())


def class_colour(label: int) -> str:
    """Return the colour of a class.

    Neighbouring classes lie far apart in hue, and all are bright enough for black letters.
    """
    hue = label * 222.5 % 360
    lightness = 60 + label % 2 * 12
    return f"hsl({hue}, 95%, {lightness}%)"


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
    font = text_font(TITLE_FONT_SIZE)
    for number, example in enumerate(examples):
        ground_truth, detections = _draw_panels(example, class_names)
        left = GAP + number % PAIRS_ABREAST * pair_width
        top = GAP + number // PAIRS_ABREAST * pair_height
        draw.text((left, top), GT_TITLE, fill="#444444", font=font)
        sheet.paste(ground_truth, (left, top + TITLE_HEIGHT))
        left += PANEL_SIDE + GAP
        draw.text((left, top), DETECTIONS_TITLE, fill="#444444", font=font)
        sheet.paste(detections, (left, top + TITLE_HEIGHT))
    write_png(path, sheet)


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a picture as PNG, atomically."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    write_atomically(path, content.getvalue())


def fit_image(image: np.ndarray, side: int) -> tuple[Image.Image, float]:
    """Return an image (H, W, 3) uint8 RGB whose longer side has `side` pixels, and the scale."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), scale


def draw_panel(image, boxes_xyxy, labels, class_names, scores=None) -> Image.Image:
    """Return what `draw_boxes` does, of the image in the size of a panel.

    It is resized before drawing: lines and letters have one size in all panels.
    """
    panel, scale = fit_image(image, PANEL_SIDE)
    return draw_boxes(np.asarray(panel), boxes_xyxy * scale, labels, class_names, scores)


def _draw_panels(example: Example, class_names: Sequence[str]) -> tuple[Image.Image, Image.Image]:
    """Return the example's image with its ground truth, and with its detections."""
    ground_truth = draw_panel(example.image, example.gt_boxes_xyxy, example.gt_labels, class_names)
    keep = example.scores >= MIN_SCORE
    detections = draw_panel(
        example.image,
        example.boxes_xyxy[keep],
        example.labels[keep],
        class_names,
        example.scores[keep],
    )
    return ground_truth, detections
