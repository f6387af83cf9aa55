"""SSD300 and SSD512 on VGG16: MMDetection 2.x's detector and recipe, as its Ascend port has it."""

import common  # noqa: F401 before torch, see common/__init__.py
