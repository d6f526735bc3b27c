import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_immunize import probe_convergence
from hf_immunize.linear.probe import least_squares_probe, probe_accuracy


def plain_descent(Z, Y, steps):
    """The iteration as a textbook writes it, on Z itself."""
    W, star = torch.zeros(Z.shape[1], Y.shape[1], dtype=Z.dtype), torch.linalg.pinv(Z) @ Y
    for _ in range(steps):
        G = Z.T @ (Z @ W - Y)
        W = W - G.square().sum() / (Z @ G).square().sum() * G
        yield W, (W - star).square().sum() / star.square().sum()


def with_ones(Z):
    return torch.cat([Z, torch.ones(len(Z), 1, dtype=Z.dtype)], 1)


@pytest.mark.parametrize("shape", [(30, 7), (7, 30), (12, 12)])
@pytest.mark.parametrize("targets", [(), (4,)])
def test_same_path_as_the_textbook_iteration(shape, targets):
    Z, y = torch.randn(shape, dtype=torch.float64), torch.randn((shape[0], *targets), dtype=torch.float64)
    expected = torch.stack([c for _, c in plain_descent(Z, y.reshape(shape[0], -1), 25)])
    torch.testing.assert_close(probe_convergence(Z, y, 25), expected)
    torch.testing.assert_close(probe_convergence(Z, y, 9, intercept=True), probe_convergence(with_ones(Z), y, 9))


def test_accuracy_is_that_of_the_textbook_probe():
    Z, test = torch.randn(60, 5, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    labels, wanted = torch.randint(0, 3, (60,)), torch.randint(0, 3, (40,))
    path = plain_descent(with_ones(Z), torch.nn.functional.one_hot(labels).double(), 12)
    expected = [((with_ones(test) @ W).argmax(1) == wanted).double().mean() for W, _ in path]
    assert probe_accuracy(Z, labels, test, wanted, 12).tolist() == pytest.approx([float(one) for one in expected])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 6))
def test_curve_falls_under_the_rate_of_the_condition_number(seed, rows, columns):
    generator = torch.Generator().manual_seed(seed)
    Z = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    curve = probe_convergence(Z, torch.randn(rows, dtype=torch.float64, generator=generator), 20)
    s = torch.linalg.svdvals(Z)
    kappa = (s[0] / s[-1]) ** 2
    # Kantorovich: each exact step multiplies the excess loss by at most ((κ−1)/(κ+1))², and κ bounds it by the error.
    rates = ((kappa - 1) / (kappa + 1)) ** (2 * torch.arange(1, 21))
    assert (curve <= kappa * rates + 1e-12).all() and (curve.diff() <= 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_orthogonal_up_to_rounding_are_at_their_optimum(dtype):
    Z, y = torch.randn(400, 6, dtype=dtype), torch.randn(400, 2, dtype=dtype)
    U = torch.linalg.qr(Z).Q
    for _ in range(2):
        y = y - U @ (U.T @ y)
    assert (U.T @ y).any()
    assert probe_convergence(Z, y, 3).tolist() == [0, 0, 0]
    # What is small but above rounding is a signal.
    assert probe_convergence(Z, y + (1e-3 if dtype == torch.float32 else 1e-12) * U[:, :2], 3)[0] > 0


def test_ridge_agrees_with_the_normal_equations():
    Z, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    expected = torch.linalg.solve(Z.T @ Z + 0.7 * torch.eye(4, dtype=torch.float64), Z.T @ y)
    torch.testing.assert_close(least_squares_probe(Z, y, 0.7).weight, expected)
    probe = least_squares_probe(Z + 5, y + 3, intercept=True)
    assert (y + 3 - probe.predict(Z + 5)).mean(0).abs().max() < 1e-12


def test_rank_deficient_features_converge_to_the_minimum_norm_solution():
    Z = torch.randn(20, 3, dtype=torch.float64) @ torch.randn(3, 8, dtype=torch.float64)
    y = torch.randn(20, dtype=torch.float64)
    assert probe_convergence(Z, y, 3000)[-1] < 1e-20
    *_, (last, _) = plain_descent(Z, y[:, None], 3000)
    torch.testing.assert_close(last, least_squares_probe(Z, y).weight)
    assert probe_convergence(Z.float(), y, 2000)[-1] < 1e-12  # whose noise is no direction
    assert probe_convergence(torch.eye(5), torch.randn(5), 1)[0] < 1e-12  # κ = 1
