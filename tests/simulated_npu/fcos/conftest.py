"""The fixtures of the ordinary tests of fcos."""

from tests.fcos.conftest import (  # noqa: F401
    filled_model,
    filled_state,
    golden,
    real_truth,
    recipe,
)
