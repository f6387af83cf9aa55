"""The one rule of resizing an image for evaluation, against OpenCV itself."""

import cv2
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from common.coco.images import read_image
from common.coco.resize import resize_as_opencv


def test_real_images_are_resized_as_opencv_does(tiny_val):
    for record in range(0, 50, 5):
        image = read_image(tiny_val.path(record))
        for side in (300, 512):
            assert_array_equal(resize_as_opencv(image, side, side), cv2.resize(image, (side, side)))


@pytest.mark.parametrize("shape", [(37, 41), (1, 1), (2, 700), (700, 2), (300, 300), (64, 900)])
@pytest.mark.parametrize("size", [(300, 300), (512, 512), (20, 1000)])
def test_any_shape_is_resized_as_opencv_does(shape, size):
    """The first and last rows too, whose taps lie beyond the edge where the height grows."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    height, width = size
    assert_array_equal(resize_as_opencv(image, height, width), cv2.resize(image, (width, height)))
