"""M2Det: a multi-level feature pyramid on VGG-16 or ResNet-101, and its Ascend recipe."""

import common  # noqa: F401 before torch, see common/__init__.py
