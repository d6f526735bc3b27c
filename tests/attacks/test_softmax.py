"""Softmax regression by L-BFGS, against scikit-learn's."""

import pytest
import torch

from hf_immunize.attacks.descent import standardize_part
from hf_immunize.attacks.direct import lbfgs, logistic_regression, softmax_path
from hf_immunize.attacks.presets import ProbeBudget


pytest_plugins = ["attack_fixtures"]


@pytest.mark.outcome
def test_lbfgs_is_as_good_as_scikit_learns_logistic_regression(features):
    budget = ProbeBudget(iterations=100)
    ours, theirs = (attack(features, 0, torch.float64, budget).accuracy for attack in (lbfgs, logistic_regression))
    assert ours >= theirs - 0.02


@pytest.mark.outcome
def test_penalties_are_a_path_from_strong_to_weak(features):
    part = standardize_part(features.whole(torch.float64))
    assert softmax_path(part, (1e-3,), 4, 50)[0] > 0.9
