import math

import pytest
import torch

from hf_immunize import immunize_linear, rir_ceiling
from hf_immunize.linear.optimum import advice, common_basis, map_ratio, null_basis, optimal_map, row_factor


def kappa(Z, rank):
    """Of ZᵀZ, by singular values of Z itself."""
    s = torch.linalg.svdvals(Z)
    return float(s[..., 0] / s[..., rank - 1]) ** 2 if s.ndim == 1 else (s[:, 0] / s[:, rank - 1]) ** 2


def data(seed, rows, dim, rank=None, power=1.5):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(rows, dim, dtype=torch.float64, generator=generator)
    X = X * torch.logspace(0, power, dim, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator)).Q
    X = X @ mix
    return X if rank is None else X @ mix.T[:, :rank] @ mix.T[:, :rank].T


def rir(P, H, theta, rank_p, rank_h):
    harmful = kappa(H @ theta, rank_h) / kappa(H, rank_h)
    return harmful / (kappa(P @ theta, rank_p) / kappa(P, rank_p))


@pytest.mark.parametrize("dim", [2, 5, 9])
def test_no_random_map_exceeds_the_ceiling_and_the_optimum_meets_it(dim):
    P, H = data(dim, 40, dim), data(dim + 100, 30, dim)
    ceiling = rir_ceiling(P, H)
    Q = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64)).Q
    for other in (rir_ceiling(1e-6 * P, 1e6 * H), rir_ceiling(P @ Q, H @ Q)):
        assert other.value == pytest.approx(ceiling.value, rel=1e-8)
    assert ceiling.value == pytest.approx(ceiling.common_value, rel=1e-9) and ceiling.harmful_only == 0
    theta = torch.randn(10_000, dim, dim, dtype=torch.float64)
    # Half of them near the optimum, where a wrong ceiling would show first.
    theta[5000:] = optimal_map(P, H, t=3.0) @ (torch.eye(dim, dtype=torch.float64) + 0.05 * theta[5000:])
    found = kappa(H @ theta, dim) / kappa(P @ theta, dim) * ceiling.benign_kappa / ceiling.harmful_kappa
    assert found.max() <= ceiling.value * (1 + 1e-9)
    assert found.max() >= 0.5 * ceiling.value
    for t in (1.0, 10.0, ceiling.benign_kappa):
        best = optimal_map(P, H, t=t)
        assert rir(P, H, best, dim, dim) == pytest.approx(ceiling.value, rel=1e-8)
        assert kappa(P @ best, dim) == pytest.approx(t, rel=1e-8)
        assert kappa(H @ best, dim) == pytest.approx(ceiling.pencil_kappa * t, rel=1e-8)


@pytest.mark.parametrize(("method", "options"), [
    ("kappa", {"step": "rule"}), ("kappa", {}), ("r_ill", {}), ("r_ill", {"step": "rule"}), ("imma", {}),
    ("opt_kappa", {"lr": 3e-4}), ("kappa", {"step": "rule", "batch_size": 8}), ("optimum", {}),
])  # fmt: skip
def test_no_method_exceeds_the_ceiling(method, options):
    P, H = data(1, 40, 6), data(2, 30, 6)
    limit = rir_ceiling(P, H).value * (1 + 1e-8)
    extra = {} if method == "optimum" else {"epochs": 40, "lr": 1e-4} | options
    found = immunize_linear(P, torch.randn(40), H, method, y_harmful=torch.randn(30), **extra)
    assert all(row["rir"] <= limit for row in found.history)


def test_harmful_directions_inside_the_benign_ones():
    # range(K_H) within range(K_P), both singular: the non-zero spectrum of the pencil, not the projected data.
    P = data(3, 30, 8, rank=6)
    V = row_factor(P).V
    H = torch.randn(30, 4, dtype=torch.float64) @ torch.randn(4, 6, dtype=torch.float64) @ V.T
    ceiling = rir_ceiling(P, H)
    assert (ceiling.benign_rank, ceiling.harmful_rank, ceiling.common_rank, ceiling.harmful_only) == (6, 4, 4, 0)
    assert math.isfinite(ceiling.value) and ceiling.common_value < ceiling.value
    for t in (1.0, 10.0, ceiling.benign_kappa):
        theta = optimal_map(P, H, t=t)
        assert rir(P, H, theta, 6, 4) == pytest.approx(ceiling.value, rel=1e-7)
        assert torch.linalg.matrix_rank(theta) == 8
    theta = torch.randn(10_000, 8, 8, dtype=torch.float64)
    found = kappa(H @ theta, 4) / kappa(P @ theta, 6) * ceiling.benign_kappa / ceiling.harmful_kappa
    assert found.max() <= ceiling.value * (1 + 1e-9)


def test_harmful_directions_of_their_own_make_the_ceiling_infinite():
    P, H = data(4, 30, 8, rank=5), data(5, 30, 8, rank=6)
    ceiling = rir_ceiling(P, H)
    assert (ceiling.value, ceiling.harmful_only, ceiling.common_rank) == (math.inf, 3, 3)
    theta = optimal_map(P, H, t=1.0)
    assert torch.linalg.matrix_rank(theta) == 8
    assert kappa(row_factor(P).rows @ theta, 5) == pytest.approx(1.0, rel=1e-8)
    assert rir(row_factor(P).rows, row_factor(H).rows, theta, 5, 6) > 1e4 * ceiling.common_value
    basis = common_basis(row_factor(P), row_factor(H), ceiling.tolerance)
    theta = optimal_map(P @ basis, H @ basis, t=7.0)
    assert rir(P @ basis, H @ basis, theta, 3, 3) == pytest.approx(ceiling.common_value, rel=1e-8)


def test_equal_data_on_both_sides_cannot_be_immunized():
    X = data(6, 50, 7)
    ceiling = rir_ceiling(X, X[torch.randperm(50)])
    assert ceiling.value == pytest.approx(1.0, rel=1e-9)
    theta = torch.randn(7, 7, dtype=torch.float64)
    assert rir(X, X, theta, 7, 7) == 1.0
    # κ(M) = 1: the dial would be 0/0, whitening is what is left, whatever t.
    for t in (1.0, 50.0):
        assert kappa(X @ optimal_map(X, 3 * X, t=t), 7) == pytest.approx(1.0, rel=1e-6)


def test_frontier_of_singular_harmful_data_inside_the_benign_ones_ends_at_the_ceiling():
    P = data(11, 40, 5)
    H = torch.randn(30, 2, dtype=torch.float64) @ torch.randn(2, 5, dtype=torch.float64)
    ceiling = rir_ceiling(P, H)
    assert ceiling.harmful_only == 0 and ceiling.common_value < 0.9 * ceiling.value
    for t, benign, harmful in ceiling.frontier(4):
        best = optimal_map(P, H, t=t)
        assert kappa(P @ best, 5) / kappa(P, 5) == pytest.approx(benign, rel=1e-7)
        assert kappa(H @ best, 2) / kappa(H, 2) == pytest.approx(harmful, rel=1e-7)
    assert ceiling.frontier()[-1] == pytest.approx((ceiling.benign_kappa, 1, ceiling.value))
    # One harmful direction has κ = 1 under every map.
    flat = rir_ceiling(torch.diag(torch.tensor([3.0, 1.0])), torch.ones(4, 2)).frontier(3)
    assert [point[2] for point in flat] == [1, 1, 1] and flat[0][1] == pytest.approx(1 / 9)


X3 = torch.diag(torch.tensor([3.0, 2.0, 1.0]))


@pytest.mark.parametrize(
    ("P", "H", "said"),
    [
        (X3, X3, "the same directions in the same"),
        (X3, torch.diag(torch.tensor([1.0, 2.0, 9.0])), "can immunize here"),
        (torch.eye(4)[[0, 1, 0, 1]], torch.eye(4)[[2, 3]], "share no direction"),
        (data(0, 3, 8), data(1, 20, 8), "add benign data"),
    ],
)
def test_advice_is_one_sentence_for_every_kind_of_pair(P, H, said):
    text = advice(rir_ceiling(P, H))
    assert said in text and text.endswith(".") and "\n" not in text


@pytest.mark.parametrize("shape", [(50, 6), (4, 9)])
def test_a_factor_has_the_gram_matrix_and_the_rank_of_the_data(shape):
    X = torch.randn(shape, dtype=torch.float64)
    factor = row_factor(X)
    torch.testing.assert_close(factor.rows.T @ factor.rows, X.T @ X)
    assert (factor.rank, factor.dim, factor.num_samples) == (min(shape), shape[1], shape[0])
    N = null_basis(factor.V)
    assert N.shape == (shape[1], shape[1] - factor.rank) and (factor.V.T @ N).abs().sum() < 1e-12
    dependent = torch.cat([X, X[:, :1] + X[:, 1:2], torch.zeros(shape[0], 1, dtype=torch.float64)], 1)
    assert row_factor(dependent).rank == min(shape)


def test_rounding_is_no_direction():
    X = torch.randn(300, 3) @ torch.randn(3, 8)
    assert row_factor(X).rank == row_factor(X.double(), produced_dtype=torch.float32).rank == 3
    ceiling = rir_ceiling(X, torch.randn(200, 8) @ X[:8].T @ X[:8])
    assert ceiling.common_rank == 3 and math.isfinite(ceiling.value)
    # Many equal columns and a dominant mean: the decomposition's own noise exceeds ten units of rounding.
    images = (torch.randint(0, 2, (3000, 60)).double().repeat(1, 4) / 255 - 0.1307) / 0.3081
    assert row_factor(images).rank <= 61
    assert row_factor(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)).rank == 2


def test_tasks_without_a_shared_direction_and_of_one_harmful_direction():
    P, H = torch.zeros(9, 6, dtype=torch.float64), torch.zeros(9, 6, dtype=torch.float64)
    P[:, :3], H[:, 3:] = torch.randn(9, 3), torch.randn(9, 3)
    ceiling = rir_ceiling(P, H)
    assert (ceiling.value, ceiling.common_rank, ceiling.harmful_only) == (math.inf, 0, 3)
    assert math.isnan(ceiling.common_value) and ceiling.frontier() == []
    assert torch.linalg.matrix_rank(optimal_map(P, H)) == 6
    # κ of rank one is 1 under every map, so only the benign side can gain, even where the direction is its own.
    H[:, 4:] = 0
    ceiling = rir_ceiling(P, H)
    assert ceiling.harmful_only == 1 and ceiling.value == pytest.approx(ceiling.benign_kappa)
    assert rir(P, H, optimal_map(P, H, t=1.0), 3, 1) == pytest.approx(ceiling.value)


def test_the_ratio_of_a_map_is_exact_and_says_when_rank_was_lost():
    P, H = data(0, 50, 5), data(1, 40, 5)
    factors = row_factor(P), row_factor(H)
    for theta in (torch.eye(5, dtype=torch.float64), torch.eye(5, 7, dtype=torch.float64)):
        assert map_ratio(*factors, theta).rir == pytest.approx(1.0)
    found = map_ratio(*factors, optimal_map(P, H))
    assert found.rir == pytest.approx(rir_ceiling(P, H).value) and found.benign_ratio == pytest.approx(1.0)
    assert map_ratio(*factors, torch.diag(torch.tensor([1.0, 1, 1, 1, 0]).double())).bound == "undetermined"
