"""Will a detector see the boxes of a data set? The share of them that its anchors or points fit.

A detector learns a box from the anchors that overlap it, or from the points inside it. A box that
none of them fits is learned from one bad example, or not at all, however long the training takes.
That is known before the training: from the boxes, the size of the network input and the anchors.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.coco.counts import FEW_BOXES, TrainingBoxes

# Columns of the table, by the side of a box: the root of its area in pixels of the network input.
SIDES = (0, 8, 16, 32, 64, 96)
# Boxes that are looked at, drawn with a seed: the shares are then right within 1 %, and the time is
# seconds, of the 860,000 boxes of COCO's training set as well.
SAMPLE_SIZE = 20_000
SAMPLE_SEED = 0
ROUNDING = 1 / 64  # pixels: anchors whose sizes or centres differ by less are taken as equal

# From this share of seen boxes on, nothing is advised about their size. The networks that fit
# COCO's photographs best reach it; SSD300 sees 0.6 of COCO's boxes.
ENOUGH_SEEN = 0.8
# Another preset, or tiles, must add this share of the boxes to be advised: they cost time.
WORTHWHILE_GAIN = 0.05
TILES_ALONG_SIDE = (2, 3, 4)  # ways to cut an image into tiles that are tried


class Matching(NamedTuple):
    """How the boxes of a data set meet the anchors of a model; each model has one."""

    kind: str  # of what a box is learned from: "anchors" or "points"
    # Fields of the recipe: presets that are equal in them see the same boxes.
    fields: tuple[str, ...]
    # Of a recipe: the size of its network input in words.
    input_size: Callable[[Any], str]
    # Of boxes (B, 4) xyxy in pixels of their images, the images' (height, width) (B, 2) and a
    # recipe: the boxes in pixels of the network input, as evaluation resizes the images.
    boxes_in_input: Callable[[np.ndarray, np.ndarray, Any], np.ndarray]
    # Of those boxes and a recipe: which of them are seen, (B,) bool.
    seen_boxes: Callable[[np.ndarray, Any], np.ndarray]
    seen: str  # what a box must have to be seen
    unseen: str  # what becomes of the others


def anchor_matching(
    fields: tuple[str, ...], seen_boxes: Callable[[np.ndarray, Any], np.ndarray]
) -> Matching:
    """Return how boxes meet the anchors of a model that resizes images to a square.

    The side of the square is the recipe's `image_size`; the parameters are those of Matching.
    """
    return Matching(
        kind="anchors",
        fields=("image_size", *fields),
        input_size=_square_size,
        boxes_in_input=_boxes_in_square,
        seen_boxes=seen_boxes,
        seen="an anchor overlaps the box with an IoU above 0.5",
        unseen="learned from the one anchor that overlaps them most, too little to be found "
        "reliably",
    )


def _square_size(recipe: Any) -> str:
    return f"{recipe.image_size} x {recipe.image_size}"


def _boxes_in_square(boxes_xyxy: np.ndarray, image_sizes: np.ndarray, recipe: Any) -> np.ndarray:
    factors = recipe.image_size / image_sizes[:, ::-1]  # of x and y
    return boxes_xyxy * np.tile(factors, 2)


class Presets(NamedTuple):
    """The preset of a run, with the flags of the command on top, and all presets of its model."""

    name: str
    recipe: Any
    recipes: dict[str, Any]
    matching: Matching


class Coverage(NamedTuple):
    """Which of S boxes a preset sees."""

    preset: str
    input_size: str
    sides: np.ndarray  # (S,) float64: root of a box's area, pixels of the network input
    seen: np.ndarray  # (S,) bool

    @property
    def share(self) -> float:
        """The share of the boxes that are seen."""
        return float(self.seen.mean())


class Report(NamedTuple):
    """What is printed and drawn about the boxes that a model sees."""

    lines: list[str]  # the table, and the advice as the last one
    chosen: Coverage


def fitted_boxes(
    boxes_xyxy: np.ndarray,
    anchors_xyxy: Tensor,
    pairwise_iou: Callable[[Tensor, Tensor], Tensor],
    match_iou: float,
) -> np.ndarray:
    """Return which boxes (B, 4) have an anchor (P, 4) with an IoU above `match_iou`, (B,) bool.

    `pairwise_iou` is the model's. Of anchors of one size on a grid, the one whose centre is nearest
    to the box's in each direction has the highest IoU: no other is compared.
    """
    boxes = torch.as_tensor(boxes_xyxy, dtype=torch.float32)
    center_x, center_y = ((boxes[:, :2] + boxes[:, 2:]) / 2).unbind(1)
    fitted = torch.zeros(len(boxes), dtype=torch.bool)
    for grid in anchor_grids(anchors_xyxy):
        nearest_x = _nearest(grid.x, center_x)
        nearest_y = _nearest(grid.y, center_y)
        centers = torch.stack([nearest_x, nearest_y], dim=1)
        anchors = torch.cat([centers - grid.size / 2, centers + grid.size / 2], dim=1)
        # An image with one box and one anchor, for each box.
        iou = pairwise_iou(boxes.view(-1, 1, 4), anchors.view(-1, 1, 1, 4))
        fitted |= iou.flatten() > match_iou
    return fitted.numpy()


class AnchorGrid(NamedTuple):
    """Anchors of one size whose centres are all combinations of some x and some y."""

    x: Tensor  # (columns,) float32, rising
    y: Tensor  # (rows,) float32, rising
    size: Tensor  # (2,) float32 width and height


def anchor_grids(anchors_xyxy: Tensor) -> list[AnchorGrid]:
    """Return all anchors (P, 4) as grids.

    Anchors of one size that form no grid, such as those of two feature maps, become one for each
    row.
    """
    sizes = anchors_xyxy[:, 2:] - anchors_xyxy[:, :2]
    sizes = (sizes / ROUNDING).round() * ROUNDING
    centers = (anchors_xyxy[:, :2] + anchors_xyxy[:, 2:]) / 2
    centers = (centers / ROUNDING).round() * ROUNDING
    different_sizes, which = sizes.unique(dim=0, return_inverse=True)
    grids = []
    for number, size in enumerate(different_sizes):
        of_size = centers[which == number]
        x = of_size[:, 0].unique()
        y = of_size[:, 1].unique()
        if len(x) * len(y) == len(of_size.unique(dim=0)):
            grids.append(AnchorGrid(x, y, size))
            continue
        for row in y:
            of_row = of_size[of_size[:, 1] == row]
            grids.append(AnchorGrid(of_row[:, 0].unique(), row.view(1), size))
    return grids


def _nearest(coordinates: Tensor, values: Tensor) -> Tensor:
    """Return, for each value (B,), the nearest of the rising coordinates (K,)."""
    between = (coordinates[1:] + coordinates[:-1]) / 2
    return coordinates[torch.bucketize(values.contiguous(), between)]


def sample_boxes(boxes: TrainingBoxes) -> tuple[np.ndarray, np.ndarray]:
    """Return at most SAMPLE_SIZE boxes (S, 4) and the (height, width) of their images (S, 2)."""
    rows = np.arange(len(boxes.boxes_xyxy))
    if len(rows) > SAMPLE_SIZE:
        rows = np.random.default_rng(SAMPLE_SEED).choice(rows, SAMPLE_SIZE, replace=False)
    return boxes.boxes_xyxy[rows], boxes.sizes_of_boxes[rows]


def cover(
    boxes_xyxy: np.ndarray, image_sizes: np.ndarray, name: str, recipe: Any, matching: Matching
) -> Coverage:
    """Return which boxes (S, 4) of images of (height, width) `image_sizes` (S, 2) are seen."""
    boxes = matching.boxes_in_input(boxes_xyxy, image_sizes, recipe)
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
    seen = matching.seen_boxes(boxes, recipe)
    return Coverage(name, matching.input_size(recipe), sides, seen)


def cover_in_tiles(
    boxes_xyxy: np.ndarray,
    image_sizes: np.ndarray,
    tiles: int,
    recipe: Any,
    matching: Matching,
) -> float:
    """Return the share of boxes (S, 4) that are seen in images cut into `tiles` x `tiles` tiles.

    Each tile becomes a network input. Tiles overlap, so that each box lies whole in one of them; a
    box that is larger than a tile counts as not seen.
    """
    tile_sizes = image_sizes / tiles
    width_and_height = tile_sizes[:, ::-1]
    sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    fits = (sides <= width_and_height).all(axis=1)
    centers = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
    top_left = centers % width_and_height - sides / 2
    top_left = np.clip(top_left, 0, np.maximum(width_and_height - sides, 0))
    in_tile = np.concatenate([top_left, top_left + sides], axis=1)
    tiled = cover(in_tile[fits], tile_sizes[fits], "", recipe, matching)
    return np.count_nonzero(tiled.seen) / len(boxes_xyxy)


def different_presets(presets: Presets) -> dict[str, Any]:
    """Return the chosen preset and one of each kind that sees other boxes than those before it."""
    chosen = {presets.name: presets.recipe}
    known = [_kind(presets.recipe, presets.matching)]
    for name, recipe in presets.recipes.items():
        kind = _kind(recipe, presets.matching)
        if kind not in known:
            known.append(kind)
            chosen[name] = recipe
    return chosen


def _kind(recipe: Any, matching: Matching) -> list:
    return [getattr(recipe, field) for field in matching.fields]


def report_coverage(boxes: TrainingBoxes, presets: Presets) -> Report:
    """Return the table of the boxes that a model's presets see, and the advice.

    The columns are the sides of the boxes in the chosen preset's input; the same boxes are in the
    same column in the lines of the other presets.
    """
    sample, image_sizes = sample_boxes(boxes)
    matching = presets.matching
    recipes = different_presets(presets)
    coverages = []
    for name, recipe in recipes.items():
        coverages.append(cover(sample, image_sizes, name, recipe, matching))
    chosen = coverages[0]
    best = max(coverages, key=lambda coverage: coverage.share)
    if best.share < chosen.share + WORTHWHILE_GAIN:
        best = chosen
    shares_in_tiles = {}
    if best.share < ENOUGH_SEEN:
        recipe = recipes[best.preset]
        for tiles in TILES_ALONG_SIDE:
            share = cover_in_tiles(sample, image_sizes, tiles, recipe, matching)
            shares_in_tiles[tiles] = share

    lines = [
        f"what --recipe {chosen.preset} sees of the boxes, by their side: the root of the area in "
        f"pixels of the network input ({chosen.input_size})"
    ]
    if len(sample) < len(boxes.labels):
        lines[0] += f"; {len(sample)} boxes, drawn with seed {SAMPLE_SEED}"
    lines += _table(coverages)
    lines.append(f"seen: {matching.seen}; the others: {matching.unseen}")
    num_rare = len(boxes.rare_classes())
    lines.append(advise(chosen, best, shares_in_tiles, num_rare, len(boxes.class_names)))
    return Report(lines, chosen)


def _table(coverages: list[Coverage]) -> list[str]:
    """Return the lines of the table: boxes by side, and the share of them that each preset sees."""
    chosen = coverages[0]
    columns = column_masks(chosen.sides, SIDES)
    labels = ["side, pixels", "boxes", "seen"]
    rows = [
        [*column_titles(SIDES), "all"],
        [*(str(np.count_nonzero(column)) for column in columns), str(len(chosen.sides))],
        share_cells(chosen.seen, columns),
    ]
    for coverage in coverages[1:]:
        labels.append(f"seen with --recipe {coverage.preset} ({coverage.input_size})")
        rows.append(share_cells(coverage.seen, columns))
    return text_table(labels, rows)


def column_titles(edges: tuple[int, ...]) -> list[str]:
    """Return the titles of columns that begin at these edges; the last one has no end."""
    titles = []
    for start, end in pairwise(edges):
        titles.append(f"{start}-{end}")
    return [*titles, f">{edges[-1]}"]


def column_masks(sizes: np.ndarray, edges: tuple[int, ...]) -> list[np.ndarray]:
    """Return which sizes (S,) fall into each column; an edge belongs to the column it begins."""
    column = np.digitize(sizes, edges[1:])
    return [column == number for number in range(len(edges))]


def share_cells(seen: np.ndarray, columns: list[np.ndarray]) -> list[str]:
    """Return the share of seen boxes (S,) of each column and of all; "-" where there is no box."""
    cells = []
    for column in [*columns, np.ones(len(seen), dtype=bool)]:
        in_column = seen[column]
        cells.append(percent(in_column.mean()) if len(in_column) else "-")
    return cells


def text_table(labels: list[str], rows: list[list[str]]) -> list[str]:
    """Return a line for each row: its label, then its cells in columns that end flush."""
    label_width = max(len(label) for label in labels)
    widths = []
    for cells in zip(*rows, strict=True):
        widths.append(max(len(cell) for cell in cells))
    lines = []
    for label, row in zip(labels, rows, strict=True):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([label.ljust(label_width), *cells]))
    return lines


def percent(share: float) -> str:
    return f"{share:.0%}"


def advise(
    chosen: Coverage,
    best: Coverage,
    shares_in_tiles: dict[int, float],
    num_rare: int,
    num_classes: int,
) -> str:
    """Return one sentence on what to do about the boxes that the chosen preset does not see.

    `best` is the preset to advise, which may be the chosen one, and `shares_in_tiles` the share
    that it would see in images cut into 2 x 2 tiles and so on. `num_rare` classes of `num_classes`
    have fewer than FEW_BOXES boxes.
    """
    tiles = _tiles_to_advise(best.share, shares_in_tiles)
    cut = ""
    if tiles:
        cut = (
            f"cut the images into {tiles} x {tiles} overlapping tiles (no program here does), in "
            f"which it sees {percent(shares_in_tiles[tiles])}"
        )
    if best.preset != chosen.preset:
        sentence = (
            f"take --recipe {best.preset}, whose input of {best.input_size} sees "
            f"{percent(best.share)} of the boxes instead of {percent(chosen.share)}"
        )
        if tiles:
            sentence += f", and {cut}"
    elif chosen.share >= ENOUGH_SEEN:
        sentence = f"fine as it is: {percent(chosen.share)} of the boxes are seen"
    elif tiles:
        sentence = (
            f"no other preset sees much more than the {percent(chosen.share)} of the boxes that "
            f"this one sees: {cut}"
        )
    else:
        sentence = (
            f"only {percent(chosen.share)} of the boxes are seen, and neither another preset nor "
            "tiles help: the boxes are too small or of shapes that no anchor has, so look at the "
            "other models with compare.py --data"
        )
    if num_rare:
        sentence += (
            f"; and label more: {num_rare} of {num_classes} classes have fewer than {FEW_BOXES} "
            "boxes"
        )
    return f"advice: {sentence}."


def _tiles_to_advise(share: float, shares_in_tiles: dict[int, float]) -> int | None:
    """Return how many tiles along a side to advise: the fewest that are enough, or the best.

    None where no number of tiles is worth its time; `share` is that of whole images.
    """
    worthwhile = {}
    for tiles, tiled_share in shares_in_tiles.items():
        if tiled_share >= ENOUGH_SEEN:
            return tiles
        if tiled_share >= share + WORTHWHILE_GAIN:
            worthwhile[tiles] = tiled_share
    if not worthwhile:
        return None
    return max(worthwhile, key=worthwhile.get)
