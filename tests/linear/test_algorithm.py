from itertools import pairwise

import pytest
import torch

from hf_immunize import immunize_linear, rir_ceiling
from hf_immunize.errors import ArgumentError, NonFiniteError, PerfectConditioningError, RankError, ShapeError
from hf_immunize.linear.algorithm import (
    METHODS,
    adapted_loss,
    direction,
    feature_spectrum,
    ill_step,
    ill_step_limit,
    ill_weights,
    log_kappa_gradient,
    subtract,
    tied,
    well_step,
    well_weights,
)


def tasks(seed=0, dim=6):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, 1.2, dim, dtype=torch.float64)
    P = torch.randn(40, dim, dtype=torch.float64, generator=generator) * scale
    H = torch.randn(30, dim, dtype=torch.float64, generator=generator) * scale.flip(0)
    y = P @ torch.randn(dim, dtype=torch.float64, generator=generator) / 10
    return P / 5, y, H / 5, H.sum(1) / 5


@pytest.mark.parametrize("method", METHODS)
def test_every_method_returns_a_map_and_its_history(method):
    P, y, H, y_h = tasks()
    closed = method in ("optimum", "time")
    options = {} if closed else {"epochs": 5, "seed": 3}
    found = immunize_linear(P, y, H, method, y_harmful=y_h, **options)
    assert found.theta.shape == (6, 6) and torch.isfinite(found.theta).all()
    last = found.history[-1]
    assert last["rir"] == pytest.approx(last["harmful_ratio"] / last["benign_ratio"])
    assert found.rir == last["rir"] and found.method == method
    if not closed:
        assert [row["epoch"] for row in found.history] == [0, 1, 2, 3, 4, 5]
        assert found.history[0]["rir"] == pytest.approx(1.0)  # θ starts at the identity
        assert found.omega.shape == (6, 1)
        again = immunize_linear(P, y, H, method, y_harmful=y_h, **options)
        assert torch.equal(found.theta, again.theta)


def test_fixed_weights_are_plain_gradient_descent():
    P, y, H, _ = tasks()
    options = {"epochs": 1, "lr": 1e-3, "benign_weight": 0.0, "harmful_weight": 0.0}
    found = immunize_linear(P, y, H, "kappa", **options)
    theta = torch.eye(6, dtype=torch.float64, requires_grad=True)
    omega = immunize_linear(P, y, H, "kappa", epochs=1, lr=1e-30).omega
    ((P @ theta @ omega)[:, 0] - y).square().mean().backward()
    torch.testing.assert_close(found.theta, (theta - 1e-3 * theta.grad).detach())


def test_balanced_weights_have_the_norm_of_the_task_gradient():
    P, y, H, _ = tasks()
    options = {"epochs": 1, "lr": 1e-4}
    none = {"benign_weight": 0.0, "harmful_weight": 0.0}
    eye = torch.eye(6, dtype=torch.float64)
    task = immunize_linear(P, y, H, "r_ill", **options, harmful_weight=0.0).theta - eye
    both = immunize_linear(P, y, H, "r_ill", **options).theta - eye
    assert (both - task).norm() == pytest.approx(float(task.norm()), rel=1e-6)
    assert torch.equal(immunize_linear(P, y, H, "kappa", **options, **none).theta - eye, task)


@pytest.mark.parametrize("shape", [(12, 5), (4, 7)])
def test_log_kappa_gradient_agrees_with_autograd(shape):
    X = torch.randn(shape, dtype=torch.float64)
    theta = torch.randn(shape[1], shape[1], dtype=torch.float64, requires_grad=True)
    s = torch.linalg.svdvals(X @ theta)
    expected = torch.autograd.grad(2 * (s[0].log() - s[-1].log()), theta)[0]
    found = log_kappa_gradient(X, (X @ theta).detach())
    torch.testing.assert_close(found, expected)


def test_adapted_loss_is_what_an_attacker_reaches_and_differentiable_through_every_step():
    X, targets = torch.randn(10, 3, dtype=torch.float64), torch.randn(10, 2, dtype=torch.float64)
    theta = torch.randn(3, 3, dtype=torch.float64)
    losses = [float(adapted_loss(theta, X, targets, steps)) for steps in (1, 3, 30, 3000)]
    assert losses == sorted(losses, reverse=True)
    best = (X @ torch.linalg.lstsq(X, targets).solution - targets).square().sum() / 10
    assert losses[-1] == pytest.approx(float(best), rel=1e-6)
    # The inner rate is a constant of the outer gradient.
    rate = len(X) / (2 * torch.linalg.matrix_norm(X @ theta, 2).square())

    def fixed_rate(value):
        Z, w = X @ value, torch.zeros(3, 2, dtype=torch.float64)
        for _ in range(3):
            w = w - rate * 2 / 10 * Z.T @ (Z @ w - targets)
        return (Z @ w - targets).square().sum() / 10

    leaf = theta.requires_grad_(True)
    found, expected = (
        torch.autograd.grad(f(leaf), leaf)[0] for f in (lambda v: adapted_loss(v, X, targets, 3), fixed_rate)
    )
    torch.testing.assert_close(found, expected)


P, y, H, y_h = tasks()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: immunize_linear(P, y, H, "newton"), ArgumentError, "newton"),
        (lambda: immunize_linear(P, y, H, "kappa", epoch=3), ArgumentError, "epoch"),
        (lambda: immunize_linear(P, y, H, "imma", y_harmful=y_h, step="rule"), ArgumentError, "proved"),
        (lambda: immunize_linear(P, y, H, "imma"), ArgumentError, "y_harmful"),
        (lambda: immunize_linear(P, None, H, "kappa"), ArgumentError, "y_benign"),
        (lambda: immunize_linear(P, y, torch.eye(6), "kappa"), PerfectConditioningError, "κ = 1"),
        (lambda: immunize_linear(P, y, H, "opt_kappa", lr=1e200, epochs=4), NonFiniteError, "finite"),
        (lambda: immunize_linear(P, -torch.ones(40, dtype=torch.long), H, "kappa"), ShapeError, "class numbers"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])


@SEEDS
def test_rules_move_both_condition_numbers_the_right_way_in_every_epoch(seed):
    P, y, H, _ = tasks(seed)
    found = immunize_linear(P, y, H, "kappa", step="rule", epochs=60, lr=1e-12)
    benign = [row["kappa_benign"] for row in found.history]
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(benign))
    harmful = [row["kappa_harmful"] for row in immunize_linear(P, y, H, "r_ill", step="rule", lr=1e-12).history]
    assert all(b == pytest.approx(1.2 * a) for a, b in pairwise(harmful))  # by growth=


@pytest.mark.outcome
@SEEDS
def test_rules_come_close_to_the_ceiling(seed):
    P, y, H, _ = tasks(seed)
    close = 0.9 * rir_ceiling(P, H).value
    assert immunize_linear(P, y, H, "kappa", step="rule", epochs=200).rir > close
    assert immunize_linear(P, y, H, "kappa", step="fixed", epochs=200).rir < close


@pytest.mark.outcome
@SEEDS
@pytest.mark.parametrize("options", [{}, {"batch_size": 16}, {"classes": True}])
def test_the_benign_task_is_learnt_too(options, seed):
    P, y, H, _ = tasks(seed)
    options = dict(options)
    targets = (y > 0).long() if options.pop("classes", False) else y

    def fall(lr):
        history = immunize_linear(P, targets, H, "kappa", epochs=100, lr=lr, seed=seed, **options).history
        return history[-1]["loss"] / history[0]["loss"]

    assert fall(0.02) < 0.5 < fall(1e-9)


def test_targets_settings_and_records():
    P, y, H, _ = tasks()
    # One digit's images have one label; that is a task too, if a dull one.
    for targets in ((y > 0).long(), torch.stack([y, -y], 1), torch.zeros(40, dtype=torch.long)):
        assert immunize_linear(P, targets, H, "kappa", epochs=2).omega.shape == (6, 2)
    for every, records in ((0, 2), (4, 4)):
        found = immunize_linear(P, y, H, "kappa", epochs=9, seed=5, record_every=every)
        assert len(found.history) == records
        assert (found.settings["epochs"], found.settings["seed"]) == (9, 5)


# ---- single updates ----


def kappa(Z, rank):
    s = torch.linalg.svdvals(Z)
    return float(s[0] / s[rank - 1]) ** 2


def trial(seed):
    """A random task and map; every third has a singular K, every fifth fewer samples than columns."""
    generator = torch.Generator().manual_seed(seed)
    dim = int(torch.randint(3, 9, (), generator=generator))
    rows = 2 if seed % 5 == 0 else dim + 4
    X = torch.randn(rows, dim, dtype=torch.float64, generator=generator)
    if seed % 3 == 0:
        X[:, -1] = X[:, 0] - X[:, 1]
    theta = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    rank = int(torch.linalg.matrix_rank(X))
    return X, theta, rank, float(torch.rand((), generator=generator).clamp(min=0.01)), dim


@pytest.mark.parametrize("well", [True, False])
def test_steps_within_the_provable_range_move_kappa_the_right_way(well):
    for seed in range(500):
        X, theta, rank, part, dim = trial(seed)
        Z = X @ theta
        values, left = feature_spectrum(Z)
        step = part * well_step(values, dim) if well else 0.999 * part * ill_step_limit(values)
        weights = well_weights(values, dim) if well else ill_weights(values)
        moved = subtract(theta, (Z, left, step * weights))
        before, after = kappa(Z, rank), kappa(X @ moved, rank)
        assert after < before if well else after > before


def step_of(values, weights, step):
    """Eigenvalues after an update of a diagonal H."""
    values = torch.tensor(values, dtype=torch.float64)
    return values * (1 - 2 * step * weights(values) * values).square()


def test_the_papers_range_for_r_well_has_a_hole():
    # η < min{1/((1−1/D)σ_1), (√(σ_1σ_2) − σ_2)D/(2σ_2²)} allows η near 1/(2(1−1/D)σ_1), where σ_1 is annihilated.
    values, dim = [10.0, 1.0, 0.5], 3
    limit = min(1 / ((1 - 1 / dim) * 10), ((10 * 1) ** 0.5 - 1) * dim / 2)
    eta = 0.999 / (2 * (1 - 1 / dim) * 10)
    assert eta < limit
    after = step_of(values, lambda v: well_weights(v, dim), eta)
    assert after.max() / after.min() > 1000 * (10 / 0.5)
    # The step of this library stays clear of it.
    safe = well_step(torch.tensor(values, dtype=torch.float64), dim)
    after = step_of(values, lambda v: well_weights(v, dim), safe)
    assert safe < eta and after.max() / after.min() < 10 / 0.5


def test_small_singular_values_come_from_the_features():
    # σ_min²/σ_max² = 1e-24 is lost in the Gram matrix.
    Z = (
        torch.diag(torch.tensor([1.0, 1e-3, 1e-12], dtype=torch.float64))
        @ torch.linalg.qr(torch.randn(3, 3).double()).Q
    )
    assert float(feature_spectrum(Z).values[-1]) == pytest.approx(1e-24, rel=1e-3)
    with pytest.raises(RankError):
        feature_spectrum(torch.zeros(2, 3, dtype=torch.float64))


def test_steps_have_ends():
    ones = torch.ones(3, dtype=torch.float64)
    assert well_step(ones, 3) == 0  # nothing to gain at perfect conditioning
    for call in (lambda: ill_weights(ones), lambda: ill_step_limit(ones[:1])):
        with pytest.raises(PerfectConditioningError):
            call()
    values = [7.0, 3.0, 2.0, 0.5]
    for growth in (1.01, 1.5, 100.0):
        after = step_of(values, ill_weights, ill_step(torch.tensor(values).double(), growth))
        assert float(after[0] / after[-1]) == pytest.approx(growth * 14)


@pytest.mark.parametrize("rank", [5, 3])
@pytest.mark.parametrize("well", [True, False])
def test_the_preconditioner_cancels(well, rank):
    # With K singular K⁻¹ does not exist; what H sees of the direction is the pseudo-inverse's.
    X = torch.randn(9, rank, dtype=torch.float64) @ torch.randn(rank, 5, dtype=torch.float64)
    theta = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    H = theta.T @ (X.T @ X) @ theta
    sigma = torch.linalg.svdvals(H)[:rank]
    if well:
        value = sigma[0].square() / 2 - H.square().sum() / 10
    else:
        value = 1 / (H.square().sum() / (2 * rank) - sigma[-1].square() / 2)
    expected = torch.linalg.pinv(X.T @ X, rcond=1e-12) @ torch.autograd.grad(value, theta)[0]
    fixed = theta.detach()
    spectrum = feature_spectrum(X @ fixed)
    assert tied(spectrum.values) == 1
    weights = well_weights(spectrum.values, 5) if well else ill_weights(spectrum.values)
    moved = direction(fixed, X @ fixed, spectrum.left, weights)
    if rank == 5:
        torch.testing.assert_close(moved, expected, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(X @ moved, X @ expected, rtol=1e-6, atol=1e-9)
