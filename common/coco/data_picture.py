"""The picture of a training set: classes, sizes of the boxes and what is seen of them, places."""

from pathlib import Path

import numpy as np

from common.arithmetic import ceil_div
from common.coco.counts import FEW_BOXES, TrainingBoxes
from common.coco.coverage import Coverage, percent
from common.coco.fonts import font_families
from common.files import write_figure

CLASSES_DRAWN = 30  # the most frequent ones
NAME_LENGTH = 24  # characters of a class name
SIZE_COLUMNS = 2.0 ** np.arange(1, 11.5, 0.5)  # sides in pixels: 2, 2.8, 4 ... 2048
RATIO_COLUMNS = 2.0 ** np.arange(-4, 4.25, 0.25)  # width over height
MOST_BARS = 40  # of the numbers of boxes an image
MAP_CELLS = 32  # along a side of the map of box centres
SEEN_COLOUR = "tab:blue"
UNSEEN_COLOUR = "tab:orange"
DOTS_PER_INCH = 110


def data_picture_file(output_dir: Path) -> Path:
    """Return the file of the picture: beside the output folder, which a new run may rename."""
    folder = output_dir.absolute()
    return folder.with_name(f"{folder.name}_check_data.png")


def draw_data(path: Path, boxes: TrainingBoxes, coverage: Coverage) -> None:
    """Write a PNG that shows what a training set holds, and what of it a preset sees."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(14, 8), layout="constrained")
    panels = figure.subplot_mosaic(
        [["classes", "sizes", "sizes"], ["classes", "images", "map"], ["classes", "ratios", "map"]],
        width_ratios=(1.1, 1, 1),
        height_ratios=(1.4, 1, 1),
    )
    _draw_classes(panels["classes"], boxes)
    _draw_sizes(panels["sizes"], coverage)
    _draw_images(panels["images"], boxes)
    _draw_ratios(panels["ratios"], boxes)
    _draw_centers(panels["map"], boxes)
    for axis in (panels["classes"].xaxis, panels["images"].xaxis, panels["images"].yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    write_figure(path, figure, DOTS_PER_INCH)


def _draw_classes(axes, boxes: TrainingBoxes) -> None:
    """Draw a bar for each of the most frequent classes."""
    counts = boxes.boxes_a_class()
    by_count = np.argsort(-counts, kind="stable")
    drawn = [label for label in by_count[:CLASSES_DRAWN] if counts[label] > 0]
    names = []
    colours = []
    for label in drawn:
        name = boxes.class_names[label]
        if len(name) > NAME_LENGTH:
            name = name[: NAME_LENGTH - 1] + "…"
        names.append(name.replace("$", r"\$"))  # else matplotlib reads a formula
        colours.append(UNSEEN_COLOUR if counts[label] < FEW_BOXES else SEEN_COLOUR)
    positions = np.arange(len(drawn))
    bars = axes.barh(positions, counts[drawn], color=colours)
    axes.bar_label(bars, padding=3, fontsize="small")
    axes.set_yticks(positions, names, fontsize="small", fontfamily=font_families(names))
    axes.set_ylim(max(len(drawn), 8) - 0.5, -0.5)  # the most frequent at the top
    axes.margins(x=0.15)
    axes.set_title(f"boxes a class: the first {len(drawn)} of {len(counts)} classes")
    axes.set_xlabel(f"boxes (orange: fewer than {FEW_BOXES})")


def _draw_sizes(axes, coverage: Coverage) -> None:
    """Draw how many boxes of each size are seen and not seen, with the share of the seen ones."""
    sides = np.clip(coverage.sides, SIZE_COLUMNS[0], SIZE_COLUMNS[-1] * 0.999)
    seen, _ = np.histogram(sides[coverage.seen], SIZE_COLUMNS)
    unseen, _ = np.histogram(sides[~coverage.seen], SIZE_COLUMNS)
    starts = SIZE_COLUMNS[:-1]
    widths = np.diff(SIZE_COLUMNS)
    axes.bar(starts, seen, widths, align="edge", color=SEEN_COLOUR, edgecolor="white", label="seen")
    axes.bar(
        starts,
        unseen,
        widths,
        bottom=seen,
        align="edge",
        color=UNSEEN_COLOUR,
        edgecolor="white",
        label="not seen",
    )
    totals = seen + unseen
    for number in np.flatnonzero(totals):
        share = seen[number] / totals[number]
        middle = np.sqrt(SIZE_COLUMNS[number] * SIZE_COLUMNS[number + 1])
        axes.annotate(
            percent(share),
            (middle, totals[number]),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize="x-small",
        )
    axes.set_xscale("log", base=2)
    ticks = SIZE_COLUMNS[::2]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(0, 1.12 * totals.max())  # with room for the shares
    axes.set_title(
        f"sizes: {percent(coverage.share)} of the boxes are seen by {coverage.preset} "
        f"({coverage.input_size})"
    )
    axes.set_xlabel("side: root of the area, pixels of the network input (the ends: and beyond)")
    axes.set_ylabel("boxes")
    axes.legend()


def _draw_images(axes, boxes: TrainingBoxes) -> None:
    """Draw how many images have how many boxes."""
    an_image = boxes.boxes_an_image()
    most = int(an_image.max())
    step = max(1, ceil_div(most, MOST_BARS))
    edges = np.arange(0, most + step + 1, step) - 0.5
    axes.hist(an_image, edges, color=SEEN_COLOUR, edgecolor="white")
    axes.set_title(f"boxes an image: median {np.median(an_image):g}, most {most}")
    axes.set_xlabel("boxes")
    axes.set_ylabel("images")


def _draw_ratios(axes, boxes: TrainingBoxes) -> None:
    """Draw the aspect ratios of the boxes in their images."""
    width, height = (boxes.boxes_xyxy[:, 2:] - boxes.boxes_xyxy[:, :2]).T
    smallest = np.finfo(np.float64).tiny  # a box of the records may have no height
    ratios = np.clip(width / np.maximum(height, smallest), *RATIO_COLUMNS[[0, -1]])
    axes.hist(ratios, RATIO_COLUMNS, color=SEEN_COLOUR, edgecolor="white")
    axes.set_xscale("log", base=2)
    ticks = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16)
    axes.set_xticks(ticks, ("1:16", "1:8", "1:4", "1:2", "1:1", "2:1", "4:1", "8:1", "16:1"))
    axes.set_title("shapes of the boxes")
    axes.set_xlabel("width : height (the ends: and beyond)")
    axes.set_ylabel("boxes")


def _draw_centers(axes, boxes: TrainingBoxes) -> None:
    """Draw where in their images the boxes are, as a map of their centres."""
    from matplotlib.ticker import MaxNLocator

    centers = (boxes.boxes_xyxy[:, :2] + boxes.boxes_xyxy[:, 2:]) / 2
    relative = centers / boxes.sizes_of_boxes[:, ::-1]
    counts, _, _ = np.histogram2d(
        relative[:, 1], relative[:, 0], bins=MAP_CELLS, range=((0, 1), (0, 1))
    )
    image = axes.imshow(counts, extent=(0, 1, 1, 0), cmap="viridis", vmin=0, aspect="auto")
    axes.figure.colorbar(image, ax=axes, label="boxes", ticks=MaxNLocator(integer=True))
    axes.set_title("centres of the boxes in their images")
    axes.set_xlabel("x, share of the width")
    axes.set_ylabel("y, share of the height")
