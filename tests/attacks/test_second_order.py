"""Closed forms and second-order methods are what their names say."""

import pytest
import torch
from sklearn.linear_model import Ridge

from hf_immunize.attacks.direct import (
    conjugate_path,
    filter_accuracies,
    ridge,
    whitening,
)
from hf_immunize.attacks.probe_data import Part, decompose


pytest_plugins = ["attack_fixtures"]


@pytest.mark.parametrize("kappa", [4.0, 100.0])
def test_conjugate_gradient_is_at_the_optimum_after_rank_steps(kappa):
    rank = 8
    s = torch.logspace(0, -0.5 * torch.log10(torch.tensor(kappa)).item(), rank, dtype=torch.float64)
    B = torch.randn(rank, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (weight,) = conjugate_path(s, B, [rank])
    assert torch.allclose(weight, B / s[:, None], rtol=1e-10)


def test_ridge_with_an_intercept_is_scikit_learns(features):
    part = features.whole(torch.float64)
    spectrum = decompose(part.Z)
    strength = 5.0
    h = spectrum.s.square() / (spectrum.s.square() + strength)
    targets = torch.nn.functional.one_hot(part.y, 4).double()
    theirs = Ridge(alpha=strength).fit(part.Z.numpy(), targets.numpy()).predict(part.Z_test.numpy()).argmax(1)
    # Accuracy against their answers: 1 means that every answer is the same.
    same = Part(part.Z, part.y, part.Z_test, torch.from_numpy(theirs))
    assert filter_accuracies(same, spectrum, [h], 4) == [1.0]


@pytest.mark.parametrize("attack", [ridge, whitening])
def test_an_invertible_map_changes_nothing_for_closed_forms(attack, features, probe_budget):
    theta = torch.diag(torch.logspace(0, -4, features.Z.shape[1], dtype=torch.float64))
    ill = type(features)(features.Z.double() @ theta, features.y, features.Z_test.double() @ theta, features.y_test, 4)
    found = [attack(data, 0, torch.float64, probe_budget).accuracy for data in (features, ill)]
    assert abs(found[0] - found[1]) <= 0.03
