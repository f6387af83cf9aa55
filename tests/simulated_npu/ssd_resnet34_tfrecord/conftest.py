"""The fixtures of the ordinary tests of the TFRecord recipe."""

from tests.ssd_resnet34_tfrecord.conftest import (  # noqa: F401
    filled_model,
    filled_state,
    golden,
    recipe,
)
