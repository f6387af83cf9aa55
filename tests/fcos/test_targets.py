import pytest
import torch

from fcos.anchors import make_axes, make_levels, map_sizes
from fcos.targets import assign

CPU = torch.device("cpu")


def levels_of(recipe, height=256, width=320):
    return make_levels(recipe, map_sizes(recipe, height, width), CPU)


def axes_of(recipe, height=256, width=320):
    return make_axes(recipe, map_sizes(recipe, height, width), CPU)


def one_by_one(levels, boxes, labels, radius):
    """The rule in plain Python for one image: (index of the box or -1) of every point."""
    found = []
    for level in levels:
        for y in level.y.tolist():
            for x in level.x.tolist():
                best, smallest = -1, float("inf")
                for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
                    sides = (x - x1, y - y1, x2 - x, y2 - y)
                    inside = min(sides) > 0
                    if radius:
                        reach, cx, cy = radius * level.stride, (x1 + x2) / 2, (y1 + y2) / 2
                        inside = (
                            x > max(cx - reach, x1) and x < min(cx + reach, x2)
                            and y > max(cy - reach, y1) and y < min(cy + reach, y2)
                        )  # fmt: skip
                    area = (x2 - x1) * (y2 - y1)
                    in_range = level.min_distance <= max(sides) <= level.max_distance
                    if inside and in_range and area < smallest:
                        best, smallest = k, area
                found.append(best)
    return torch.tensor(found)


@pytest.mark.parametrize("radius", [0.0, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_the_rule_in_plain_python(recipe, radius, seed):
    """On whole and half pixels, so that points lie on sides, ranges end at points, areas tie."""
    random = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 400, (2, 12, 2), generator=random) / 2
    size = torch.randint(1, 12, (2, 12, 2), generator=random) * 16
    boxes = torch.cat([start, start + size], dim=2)
    boxes[:, 6] = boxes[:, 2]  # twins: the first has it
    labels = torch.randint(0, 80, (2, 12), generator=random)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 5:] = False
    levels = levels_of(recipe, 128, 192)
    axes = axes_of(recipe, 128, 192)
    positive, matched, label = assign(axes, boxes, labels, valid, radius)
    for i, count in enumerate((12, 5)):
        expected = one_by_one(levels, boxes[i, :count], labels[i], radius)
        assert positive[i].tolist() == (expected >= 0).tolist()
        assert matched[i, positive[i]].tolist() == expected[positive[i]].tolist()
        assert label[i, positive[i]].tolist() == labels[i, expected[positive[i]]].tolist()
    assert 0 < positive.sum() < positive.numel()


@pytest.mark.parametrize(("level", "center"), [(0, 76.0), (1, 72.0)])
def test_both_ends_of_a_range_are_inclusive(recipe, level, center):
    """A box that reaches exactly 64 from one point of P3, or of P4: both have it."""
    levels = levels_of(recipe)
    box = torch.tensor([[[center - 64, center - 20, center + 64, center + 20]]])
    label, valid = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    positive = assign(axes_of(recipe), box, label, valid, 0.0)[0][0]
    sizes = [len(x.y) * len(x.x) for x in levels]
    grid = levels[level]
    found = positive.split(sizes)[level].view(len(grid.y), len(grid.x))
    column, row = int((center - grid.x[0]) // grid.stride), int((center - grid.y[0]) // grid.stride)
    assert grid.x[column] == grid.y[row] == center
    assert found[row, column]
    # P3 has no point that reaches less, so only this column.
    assert level == 1 or found.sum() == found[:, column].sum()


def test_padding_matches_nothing(recipe):
    boxes = torch.full((1, 4, 4), float("nan"))
    boxes[..., :2], boxes[..., 2:] = -100, 1000
    none = torch.zeros(1, 4, dtype=torch.bool)
    labels = torch.zeros(1, 4, dtype=torch.int64)
    for radius in (0.0, 1.5):
        assert not assign(axes_of(recipe), boxes, labels, none, radius)[0].any()
