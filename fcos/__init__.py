"""FCOS with a caffe ResNet and FPN: MMDetection 2.x's detector and its Ascend recipe."""

import common  # noqa: F401 before torch, see common/__init__.py
