"""The fixtures of the ordinary tests of ssd_mmdet."""

from tests.ssd_mmdet.conftest import (  # noqa: F401
    filled_model,
    filled_state,
    golden,
    real,
    recipe,
)
