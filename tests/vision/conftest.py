"""Fixtures shared with the tests of the neighbouring rooms."""

from vision_fixtures import *  # noqa: F403
