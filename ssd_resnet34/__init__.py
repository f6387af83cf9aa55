"""SSD300 with a ResNet-34 backbone: MLPerf v0.7's detector and its Ascend recipe."""

import common  # noqa: F401 before torch, see common/__init__.py
