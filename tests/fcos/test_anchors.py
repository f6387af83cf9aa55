import torch
from torch.testing import assert_close

from fcos.anchors import decode, encode, make_anchors, make_levels, map_sizes, point_strides

CPU = torch.device("cpu")


def test_map_sizes_round_up(recipe):
    assert map_sizes(recipe, 800, 1344) == ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))


def test_decode_inverts_encode(recipe):
    points = make_anchors(recipe, map_sizes(recipe, 64, 96))
    corners = 100 * torch.rand(len(points), 2, 2, generator=torch.Generator().manual_seed(0))
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    assert_close(decode(encode(boxes, points), points), boxes)
    distances = encode(torch.tensor([1.0, 2.0, 10.0, 20.0]), torch.tensor([4.0, 4.0]))
    assert distances.tolist() == [3, 2, 6, 16]


def test_strides_and_ranges_belong_to_the_points(recipe):
    sizes = map_sizes(recipe, 64, 96)
    strides = point_strides(recipe, sizes, CPU)
    points = make_anchors(recipe, sizes)
    assert torch.equal(points % strides, strides.floor_divide(2).expand(-1, 2))
    levels = make_levels(recipe, sizes, CPU)
    assert [level.stride for level in levels] == [8, 16, 32, 64, 128]
    assert [(level.min_distance, level.max_distance) for level in levels] == [
        (-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8)
    ]  # fmt: skip
