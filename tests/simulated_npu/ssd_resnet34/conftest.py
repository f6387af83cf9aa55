"""The fixtures of the ordinary tests of ssd_resnet34."""

from tests.ssd_resnet34.conftest import (  # noqa: F401
    filled_model,
    filled_state,
    golden,
    real,
    real_truth,
    recipe,
)
