"""Probing time against the iterations themselves, and the fitted fraction against autograd through them."""

import itertools
import math

import mpmath
import pytest
import torch
from matrices import gaussian, geometric, orthonormal, relative_error, with_singular_values

from hf_immunize.errors import ArgumentError, RankError
from hf_immunize.features.extract import Measurement, probing_steps, spectral_metrics
from hf_immunize.linear.algorithm import immunize_linear
from hf_immunize.linear.time import (
    component_spectra,
    fitted_fraction,
    probing_time,
    target_spectrum,
    time_map,
    time_of_spectrum,
)


def features_and_targets(rows=30, columns=12, kappa=20.0, seed=0):
    Z = with_singular_values(geometric(kappa, min(rows, columns)), rows, columns, seed) + gaussian(1, columns, seed)
    return Z, gaussian(rows, 3, seed + 7)


def run(Z, Y, method, steps):
    """The iteration itself on the centred problem, and the fitted share after each step."""
    Z, Y = Z - Z.mean(0), Y - Y.mean(0)
    W, energy = torch.zeros(Z.shape[1], Y.shape[1], dtype=Z.dtype), Y.square().sum()
    H, b = Z.mT @ Z, Z.mT @ Y
    residual = b.clone()
    direction, fitted = residual.clone(), []
    top = torch.linalg.eigvalsh(H)[-1]
    for _ in range(steps):
        gradient = b - H @ W
        if method == "fixed_step":
            W = W + gradient / top
        elif method == "line_search":
            W = W + gradient.square().sum() / (gradient * (H @ gradient)).sum() * gradient
        else:
            image = H @ direction
            alpha = residual.square().sum() / (direction * image).sum()
            W, before = W + alpha * direction, residual.square().sum()
            residual = residual - alpha * image
            direction = residual + residual.square().sum() / before * direction
        fitted.append(1 - (Y - Z @ W).square().sum() / energy)
    return torch.stack(fitted)


METHODS = ["line_search", "fixed_step", "conjugate_gradient"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "columns"), [(30, 12), (12, 30)])
def test_the_curve_is_that_of_the_iteration(method, rows, columns):
    Z, Y = features_and_targets(rows, columns, kappa=5.0)
    steps = 9 if method == "conjugate_gradient" else 200
    found = probing_time(Z, Y, method=method, fractions=(1.0,), attainable=1.0, max_steps=steps).curve
    expected = run(Z, Y, method, len(found))
    assert torch.allclose(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_what_is_streamed_has_the_spectrum_of_the_whole(scale):
    Z, _ = features_and_targets(40, 12)
    Z, y = scale * (Z + 3 * gaussian(1, 12, 5)), torch.arange(40) % 3
    parts = [Measurement(), Measurement()]
    for rows, part in zip(torch.arange(40).split(7), parts * 3, strict=True):
        part.update(Z[rows], torch.zeros(len(rows), 1, 2, 2), y[rows])
    parts[0].merge(parts[1])
    restored = Measurement.from_state_dict(parts[0].state_dict())
    values, shares = restored.spectrum()
    for found, expected in zip((values / values[0], shares), target_spectrum(Z, y), strict=True):
        assert torch.allclose(found, expected / expected[0] if found[0] == 1 else expected, rtol=1e-8, atol=1e-10)
    parts[0].update(Z[:3], torch.zeros(3, 1, 2, 2))  # without classes
    assert parts[0].spectrum() is None


@pytest.mark.parametrize("kappa", [1e1, 1e3, 1e6])
def test_conjugate_gradient_fits_what_the_best_polynomial_does(kappa):
    values = geometric(kappa, 12)
    shares = gaussian(12, 1, 5).flatten().square()
    curve = time_of_spectrum(values, shares / shares.sum(), "conjugate_gradient", (1.0,), 1.0, 14).curve
    with mpmath.workdps(120):
        lam, weights = ([mpmath.mpf(float(x)) for x in of] for of in (values, shares / shares.sum()))
        for degree, found in enumerate(curve, start=1):  # the least Σ w_i p(λ_i)² over polynomials with p(0) = 1
            powers = mpmath.matrix(12, min(degree, 12))
            for i, j in itertools.product(range(12), range(min(degree, 12))):
                powers[i, j] = mpmath.sqrt(weights[i]) * lam[i] ** (j + 1)
            b = mpmath.matrix([mpmath.sqrt(weight) for weight in weights])
            fitted = powers * mpmath.lu_solve(powers.T * powers, powers.T * b)
            assert abs(float((fitted.T * b)[0]) - float(found)) < 1e-8


def measured_in_parts(Z, order, parts=2):
    """Features of images without labels, in batches dealt to processes and merged; pixels tell the images apart."""
    found = [Measurement() for _ in range(parts)]
    for number, rows in enumerate(order.split(7)):
        found[number % parts].update(Z[rows], (rows + 1.0).sqrt().reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2))
    for other in found[1:]:
        found[0].merge(Measurement.from_state_dict(other.state_dict()))
    return Measurement.from_state_dict(found[0].state_dict())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("columns", [12, 8])
def test_without_labels_the_targets_are_the_leading_components_of_the_starting_features(method, columns):
    Z, _ = features_and_targets(40, columns)
    now = torch.tanh(Z @ gaussian(columns, 12, 3) / 3) + gaussian(1, 12, 4)
    U = torch.linalg.svd(Z - Z.mean(0), full_matrices=False)[0][:, :10]
    orders = [torch.arange(40), torch.arange(40).flip(0)]
    merged = [measured_in_parts(of, order) for of, order in zip((Z, now), orders, strict=True)]
    spectra = component_spectra(*(part for one in merged for part in (one.factor, one.rows())))
    for features, spectrum in zip((Z, now), spectra, strict=True):
        steps = 7 if method == "conjugate_gradient" else 200
        found = time_of_spectrum(*spectrum, method, (1.0,), 1.0, steps).curve
        assert torch.allclose(found, run(features, U, method, len(found)), rtol=0, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_steps_without_labels_are_of_both_methods_whatever_the_scale_and_the_rotation(scale):
    Z, _ = features_and_targets(40, 12)
    now, order = Z @ torch.diag(torch.logspace(0, -2, 12).double()), torch.arange(40)
    U = torch.linalg.svd(Z - Z.mean(0), full_matrices=False)[0][:, :10]
    Q, found = orthonormal(12, 12, seed=3), [measured_in_parts(of, order) for of in (Z, now)]
    turned = [measured_in_parts(scale * of @ Q, order.flip(0)) for of in (Z, now)]
    steps = probing_steps(found[1], found[0])
    assert probing_steps(turned[1], turned[0]) == steps and steps.targets == "components"
    for method, taken in (("line_search", steps[:2]), ("conjugate_gradient", steps[-2:])):
        expected = (probing_time(of, U, method=method, attainable=0.8, fractions=(1.0,)).steps[1.0] for of in (Z, now))
        assert tuple(expected) == taken
    assert steps.conjugate_after < steps.after / 10
    found[1].update(Z[:3], torch.zeros(3, 1, 2, 2), torch.arange(3))  # some have classes
    found[0].update(Z[:3], torch.zeros(3, 1, 2, 2), torch.arange(3))
    assert probing_steps(found[1], found[0]) is None


def test_of_many_images_without_labels_a_sample_is_compared_whatever_their_order_and_processes(monkeypatch):
    Z, _ = features_and_targets(400, 12)
    now = Z @ torch.diag(torch.logspace(0, -2, 12).double())
    (known, _), *_ = measured_in_parts(Z, torch.arange(400)).by_image
    monkeypatch.setattr("hf_immunize.features.extract._SAMPLE", 60)
    ways = (1, torch.arange(400)), (3, torch.arange(400).flip(0))
    found = [[measured_in_parts(of, order, parts) for of in (Z, now)] for parts, order in ways]
    ((numbers, rows),) = found[0][0].by_image
    chosen = torch.isin(known, numbers)
    assert len(rows) == 60 and torch.equal(Z[chosen], rows)
    assert 150 < float(chosen.nonzero().double().mean()) < 250  # bright images and dark ones
    alone = [measured_in_parts(of[chosen], torch.arange(60)) for of in (Z, now)]
    steps = [probing_steps(after, before) for before, after in (*found, alone)]
    assert steps[0] == steps[1] == steps[2] is not None


def test_the_ratio_of_probing_times_is_of_the_steps_that_a_probe_takes():
    Z, _ = features_and_targets(60, 8)
    y = torch.arange(60) % 4
    slow = (Z - Z.mean(0)) @ torch.diag(torch.logspace(0, -2, 8).double())

    def measured(features, labels=y):
        found = Measurement()
        found.update(features, torch.zeros(60, 1, 2, 2), labels)
        return found

    start, now = measured(Z), measured(slow)
    goal = 0.8 * probing_time(Z, y).attainable
    steps = [probing_time(of, y, attainable=goal, fractions=(1.0,)).steps[1.0] for of in (Z, slow)]
    found = spectral_metrics(start, start, now, start)
    assert [found["benign_probing_steps"], found["harmful_probing_steps"]] == steps and steps[1] > 2 * steps[0]
    assert found["probing_time_ratio"] == steps[1] / steps[0] and not found["probing_time_ratio_is_lower_bound"]
    flat = spectral_metrics(start, start, measured(slow * torch.tensor([1.0] + [0.0] * 7)), start)
    assert flat["harmful_probing_steps"] == 10_000 and flat["harmful_probing_is_lower_bound"] == 1.0
    assert flat["probing_time_ratio_is_lower_bound"] == 1.0
    assert not any("probing" in name for name in spectral_metrics(measured(Z, None), None, None, None))


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_the_first_that_reach_each_share(method):
    Z, Y = features_and_targets(kappa=30.0)
    found = probing_time(Z, Y, method=method)
    for fraction, steps in found.steps.items():
        expected = run(Z, Y, method, steps)
        assert float(expected[-1]) >= fraction * found.attainable - 1e-9
        assert steps == 1 or float(expected[-2]) < fraction * found.attainable


def test_attainable_is_what_least_squares_attains_and_class_numbers_are_one_column_a_class():
    Z, Y = features_and_targets()
    labels = torch.arange(30) % 4
    assert probing_time(Z, 10 * labels).steps == probing_time(Z, torch.nn.functional.one_hot(labels).double()).steps
    centred, targets = Z - Z.mean(0), Y - Y.mean(0)
    left = targets - centred @ torch.linalg.lstsq(centred, targets).solution
    expected = 1 - left.square().sum() / targets.square().sum()
    assert probing_time(Z, Y).attainable == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e100])
def test_scale_rotation_and_a_constant_direction_of_any_size_change_nothing(method, scale):
    Z, Y = features_and_targets()
    turned = scale * ((Z + 1e4 * torch.ones(12, dtype=Z.dtype)) @ orthonormal(12, 12, seed=3))
    assert probing_time(turned, Y, method=method).steps == probing_time(Z, Y, method=method).steps


def test_features_that_hold_too_little_never_get_there():
    Z, Y = features_and_targets()
    collapsed = Z.mean(dim=1, keepdim=True) * torch.ones(1, 12, dtype=Z.dtype)
    reference = probing_time(Z, Y)
    assert probing_time(collapsed, Y).steps[0.9] == 1
    assert probing_time(collapsed, Y, attainable=reference.attainable, max_steps=50).steps[0.9] == math.inf
    assert set(probing_time(torch.ones(6, 3), torch.arange(6) % 2, max_steps=5).steps.values()) == {math.inf}
    with pytest.raises(RankError):  # nothing to learn
        fitted_fraction(Z, torch.zeros(30, dtype=torch.long), 3)
    with pytest.raises(ArgumentError):
        probing_time(Z, Y, fractions=(1.5,))


# ---- the differentiable form ---------------------------------------------------------------------------------------


def naive_fraction(Z, Y, steps):
    Z, Y = Z - Z.mean(0), Y - Y.mean(0)
    values, vectors = torch.linalg.eigh(Z @ Z.mT)
    left = (1 - values / values[-1])[:, None] ** steps * (vectors.mT @ Y)
    return 1 - left.square().sum() / Y.square().sum()


@pytest.mark.parametrize(("rows", "columns"), [(9, 14), (14, 9)])
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_value_and_gradient_agree_with_autograd_through_the_spectrum(rows, columns, steps):
    Z, Y = features_and_targets(rows, columns, kappa=8.0)
    Z = Z.requires_grad_()
    found, expected = fitted_fraction(Z, Y, steps), naive_fraction(Z, Y, steps)
    assert found.item() == pytest.approx(expected.item(), abs=1e-10)
    gradient, expected_gradient = (torch.autograd.grad(value, Z)[0] for value in (found, expected))
    assert relative_error(gradient, expected_gradient) < 1e-6


def test_it_is_the_share_that_fixed_steps_have_fitted():
    Z, Y = features_and_targets()
    curve = probing_time(Z, Y, method="fixed_step", fractions=(1.0,), attainable=1.0, max_steps=40).curve
    for steps in (1, 7, 40):
        assert float(fitted_fraction(Z, Y, steps)) == pytest.approx(float(curve[steps - 1]), abs=1e-10)


def test_equal_eigenvalues_have_a_finite_gradient():
    Z = torch.cat([torch.eye(5), -torch.eye(5)]).double().requires_grad_()
    fitted_fraction(Z, gaussian(10, 2), 4).backward()
    assert bool(torch.isfinite(Z.grad).all())


def test_it_is_invariant_to_scale_rotation_and_shift():
    Z, Y = features_and_targets()
    value = float(fitted_fraction(Z, Y, 6))
    moved = 1e-3 * (Z @ orthonormal(12, 12, seed=1)) + 5.0
    assert float(fitted_fraction(moved, Y, 6)) == pytest.approx(value, abs=1e-9)


def test_float32_and_bfloat16_are_computed_in_float64():
    Z, Y = features_and_targets()
    single = Z.float()
    assert float(fitted_fraction(single, Y, 6)) == pytest.approx(
        float(fitted_fraction(single.double(), Y, 6)), rel=1e-6
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = fitted_fraction(single, Y, 6)
    assert torch.equal(again, fitted_fraction(single, Y, 6))


# ---- the map -------------------------------------------------------------------------------------------------------


def task_data(rows, columns, read, seed):
    """Features of κ 30² with targets that read some of their singular directions alike."""
    rank = min(rows - 1, columns)
    U, V = orthonormal(rows, rank + 1, seed), orthonormal(columns, rank, seed + 1)
    U = torch.linalg.qr(U - U.mean(0)).Q[:, :rank] * rows**0.5
    return (U * geometric(30.0, rank)) @ V.mT, U[:, read] + 0.01 * gaussian(rows, len(read), seed)


def centred_kappa(Z):
    return float(torch.linalg.cond(Z - Z.mean(0))) ** 2


@pytest.mark.parametrize("delta", [1.0, 0.1, 1e-3])
def test_the_benign_condition_number_after_the_map_is_that_of_the_dial(delta):
    X, benign = task_data(120, 16, [2, 14], seed=0)
    assert centred_kappa(X @ time_map(X, benign, delta=delta)) == pytest.approx(delta**-2, rel=1e-8)
    assert centred_kappa(X @ time_map(X, benign)) == pytest.approx(centred_kappa(X), rel=1e-8)  # by default as before


@pytest.mark.parametrize("rows", [120, 12])
def test_the_map_is_invertible_so_that_least_squares_attains_the_same(rows):
    X, benign = task_data(rows, 16, [2, 5], seed=0)
    theta = immunize_linear(X, benign, X, "time", delta=0.05).theta
    assert torch.equal(theta, time_map(X, benign, delta=0.05))
    assert int(torch.linalg.matrix_rank(theta)) == 16
    for targets in (benign, gaussian(rows, 2, seed=9)):
        before = probing_time(X, targets).attainable
        assert probing_time(X @ theta, targets).attainable == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_benign_probing_is_faster_and_that_of_other_data_slower(method, seed):
    X, benign = task_data(120, 16, [2, 14], seed)
    X_other, other = task_data(120, 16, [1, 3, 6], seed + 5)
    theta = time_map(X, benign, delta=0.01)
    for features, targets, slower in ((X, benign, False), (X_other, other, True)):
        before, after = (probing_time(Z, targets, method=method).steps[0.9] for Z in (features, features @ theta))
        assert after > 3 * before if slower else after < before


def test_one_shrinking_factor_does_not_slow_conjugate_gradient_on_data_like_the_benign():
    # Whitened data with one factor for all that is shrunk have two eigenvalues: two steps solve any task of them.
    X, benign = task_data(120, 16, [2, 14], seed=0)
    other = X @ gaussian(16, 3, seed=4)
    Z = X @ time_map(X, benign, delta=0.01)
    assert probing_time(Z, other, method="conjugate_gradient").steps[0.99] <= 2


def test_scale_and_shift_of_the_data_change_nothing_but_the_scale_of_the_map():
    X, benign = task_data(120, 16, [2, 14], seed=0)
    theta = time_map(X, benign)
    assert relative_error(1e-3 * time_map(1e-3 * X + 7.0, benign), theta) < 1e-6
