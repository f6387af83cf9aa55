"""No training step takes more kernels than it does today.

A step may take fewer: then the limit is lowered. Another torch may take some more.
"""

import pytest

from benchmarks.kernels import CASES, count_kernels

LIMITS = {
    "ssd_mmdet": 343,
    "ssd_resnet34": 520,
    "ssd_resnet34_tfrecord": 474,
    "m2det": 1344,
    "fcos": 1039,
}
ROOM = 1.02


def test_every_recipe_has_a_limit():
    assert LIMITS.keys() == CASES.keys()


@pytest.mark.parametrize("name", LIMITS)
def test_a_step_takes_few_kernels(name):
    counts = count_kernels(name)
    assert counts["aten::convolution_backward"] > 30
    assert counts.total() <= LIMITS[name] * ROOM, counts.most_common(20)
