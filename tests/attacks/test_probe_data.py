"""The split, the cache and the checks of features under attack."""

import pytest
import torch

from hf_immunize.attacks.probe_data import ProbeData, decompose, log_steps, stratified_split
from hf_immunize.errors import DataError, NonFiniteError


pytest_plugins = ["attack_fixtures"]


def test_split_takes_from_every_class_with_two_images():
    labels = torch.tensor([0] * 10 + [1] * 2 + [2])
    _, validation = stratified_split(labels, 0.2, seed=0)
    assert sorted(labels[validation].tolist()) == [0, 0, 1]


def test_split_is_the_same_for_features_of_another_model():
    labels = torch.arange(30) % 3
    assert torch.equal(stratified_split(labels, 0.2, 4)[0], stratified_split(labels, 0.2, 4)[0])


def test_classes_of_one_image_each_are_fitted_and_chosen_on():
    fit, validation = stratified_split(torch.arange(5), 0.2, seed=0)
    assert torch.equal(fit, validation)


def test_decomposition_is_made_once(features):
    part = features.whole(torch.float64)
    assert features.spectrum(part, None, torch.float64) is features.spectrum(part, None, torch.float64)


def test_decomposition_restores_tall_features():
    Z = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, s, V = decompose(Z)
    assert torch.allclose(U @ torch.diag(s) @ V.T, Z)


def test_features_that_are_not_finite_are_one_sentence():
    Z = torch.full((4, 2), torch.nan)
    with pytest.raises(NonFiniteError, match="finite training features"):
        ProbeData(Z, torch.tensor([0, 1, 0, 1]), Z, torch.tensor([0, 1, 0, 1]), 2)


def test_labels_that_do_not_fit_are_one_sentence():
    with pytest.raises(DataError, match="one label a row"):
        ProbeData(torch.zeros(4, 2), torch.tensor([0, 1]), torch.zeros(1, 2), torch.tensor([0]), 2)


def test_steps_reach_the_last():
    assert log_steps(100_000)[-1] == 100_000
