"""The fixtures of the ordinary tests of m2det."""

from tests.m2det.conftest import filled_model, golden, recipe  # noqa: F401
