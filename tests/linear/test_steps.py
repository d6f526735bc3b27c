import pytest
import torch

from hf_immunize.errors import PerfectConditioningError, RankError
from hf_immunize.linear.algorithm import (
    directions,
    feature_spectrum,
    ill_step,
    ill_step_limit,
    ill_weights,
    subtract_,
    tied,
    well_step,
    well_weights,
)


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
        moved = subtract_(theta.clone(), [(step, *directions(theta, [(Z, left, weights)]))])
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


def test_beyond_half_its_range_r_ill_lowers_kappa():
    # Twice the limit brings σ_k back to its size; in between it passes through zero and the rank drops.
    spectrum = [1.1, 1.0, 0.1]
    values = torch.tensor(spectrum, dtype=torch.float64)
    limit = ill_step_limit(values)
    after = step_of(spectrum, ill_weights, limit)
    assert after[-1] < 1e-25
    assert after[0] / after[1] < 11  # κ over what is left is below the former 11
    after = step_of(spectrum, ill_weights, 2 * limit)
    assert float(after[-1]) == pytest.approx(0.1)


def test_a_repeated_top_eigenvalue_moves_as_one():
    values = torch.tensor([5.0, 5.0, 5.0, 1.0], dtype=torch.float64)
    step = well_step(values, 4)
    assert tied(values) == 3 and step > 0
    after = step_of([5.0, 5.0, 5.0, 1.0], lambda v: well_weights(v, 4), step)
    assert after[0] == after[2] < 5 and after[3] > 1


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
    (found,) = directions(fixed, [(X @ fixed, spectrum.left, weights)])
    moved = found.tall @ found.flat
    if rank == 5:
        torch.testing.assert_close(moved, expected, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(X @ moved, X @ expected, rtol=1e-6, atol=1e-9)
    assert found.norm() == pytest.approx(float(moved.norm()))
