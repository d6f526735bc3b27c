"""What is measured of features: images that share the fate of harmful ones are set apart."""

import pytest
import torch

from examples.networks.measure import ratios


@pytest.fixture
def sides():
    draw = torch.Generator().manual_seed(0)
    before = {side: torch.randn(30, 60, generator=draw) for side in ("benign", "harmful")}
    after = {side: features.clone() for side, features in before.items()}
    after["benign"][:2] *= 1e-3
    return before, after


def test_lost_benign_images_are_counted(sides):
    assert ratios(*sides)["without_lost"]["lost"] == 2


def test_without_them_benign_kappa_is_as_before(sides):
    found = ratios(*sides)
    assert found["exact"]["benign_ratio"] > 1e4 and found["without_lost"]["benign_ratio"] == pytest.approx(1)


def test_where_none_is_lost_nothing_is_added(sides):
    before, _ = sides
    assert ratios(before, before)["without_lost"] == {"lost": 0}
