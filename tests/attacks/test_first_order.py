"""Gradient descent in the eigenbasis is gradient descent; ill-conditioning slows it and nothing closed-form."""

import pytest
import torch

from hf_immunize.attacks.descent import descent_factors, gd_line_search, minibatches, standardize_part
from hf_immunize.attacks.direct import ridge
from hf_immunize.attacks.presets import ProbeBudget
from hf_immunize.attacks.probe_data import Part, ProbeData, decompose
from hf_immunize.spectra.ratio import relative_immunization_ratio


pytest_plugins = ["attack_fixtures"]


def with_spectrum(n, d, kappa, seed=0):
    """Features with κ(ZᵀZ) = kappa."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(n, d, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    return U @ torch.diag(torch.logspace(0, -0.5 * torch.log10(torch.tensor(kappa)).item(), d).double()) @ V.T


@pytest.mark.parametrize("kappa", [10.0, 1e4])
def test_descent_in_the_eigenbasis_is_descent_on_the_features(kappa):
    Z = with_spectrum(40, 8, kappa)
    Y = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    W = torch.zeros(8, 3, dtype=torch.float64)
    direct = []
    for _ in range(50):
        gradient = Z.T @ (Z @ W - Y)
        W = W - gradient.square().sum() / (Z @ gradient).square().sum() * gradient
        direct.append(W)
    spectrum = decompose(Z)
    optimum = spectrum.U.T @ Y / spectrum.s[:, None]
    factors = descent_factors(spectrum.s, optimum.square().sum(1), list(range(1, 51)))
    ours = [spectrum.V @ (factor[:, None] * optimum) for factor in factors]
    assert max(float((a - b).abs().max()) for a, b in zip(direct, ours, strict=True)) < 1e-10


def immunized_by_a_linear_map():
    """Harmful features whose class lies in one direction, and the same behind a map that shrinks it."""
    generator = torch.Generator().manual_seed(3)
    draws = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (400, 200, 400)]
    train, test, benign = draws
    benign = benign * torch.tensor([100.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    theta = torch.diag(torch.tensor([0.01, 1, 1, 1, 1, 1], dtype=torch.float64))
    labels = [(part[:, 0] > 0).long() for part in (train, test)]
    rir = relative_immunization_ratio(
        harmful=train @ theta, harmful_reference=train, benign=benign @ theta, benign_reference=benign
    ).rir
    before = ProbeData(train, labels[0], test, labels[1], 2)
    after = ProbeData(train @ theta, labels[0], test @ theta, labels[1], 2)
    return before, after, rir


def steps_to(finding, target):
    return next(step for step, value in zip(finding.steps, finding.curve, strict=True) if value >= target)


@pytest.mark.outcome
def test_on_a_linear_map_with_rir_above_1e4_descent_takes_a_hundred_times_the_steps():
    before, after, rir = immunized_by_a_linear_map()
    budget = ProbeBudget(descent_steps=100_000)
    slow, fast = (gd_line_search(data, 0, torch.float64, budget) for data in (after, before))
    assert rir > 1e4
    assert steps_to(slow, 0.9) >= 100 * steps_to(fast, 0.9)


def test_on_a_linear_map_with_rir_above_1e4_least_squares_is_unaffected():
    before, after, _ = immunized_by_a_linear_map()
    found = [ridge(data, 0, torch.float64, ProbeBudget()).accuracy for data in (before, after)]
    assert abs(found[0] - found[1]) <= 0.01


def test_descent_stops_where_validation_says(features, probe_budget):
    found = gd_line_search(features, 0, torch.float64, probe_budget)
    assert found.accuracy == found.curve[found.steps.index(found.settings["stop"])]


def test_minibatches_of_a_pass_hold_every_row_once():
    rows = torch.cat(minibatches(10, 5, 2, seed=0))
    assert sorted(rows.tolist()) == list(range(10))


def test_a_constant_feature_is_standardized_to_zero():
    Z = torch.tensor([[1.0, 7.0], [3.0, 7.0]])
    part = standardize_part(Part(Z, torch.tensor([0, 1]), Z, torch.tensor([0, 1])))
    assert part.Z[:, 1].tolist() == [0.0, 0.0]
