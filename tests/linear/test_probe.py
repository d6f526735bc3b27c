import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_immunize import probe_convergence
from hf_immunize.errors import ArgumentError, NonFiniteError, RankError, ShapeError
from hf_immunize.linear.probe import least_squares_probe, probe_accuracy, probe_loss_curve, probe_path


def plain_descent(Z, Y, steps):
    """The iteration as a textbook writes it, on Z itself."""
    W, star = torch.zeros(Z.shape[1], Y.shape[1], dtype=Z.dtype), torch.linalg.pinv(Z) @ Y
    for _ in range(steps):
        G = Z.T @ (Z @ W - Y)
        W = W - G.square().sum() / (Z @ G).square().sum() * G
        yield W, (W - star).square().sum() / star.square().sum()


@pytest.mark.parametrize("shape", [(30, 7), (7, 30), (12, 12)])
@pytest.mark.parametrize("targets", [(), (4,)])
def test_same_path_as_the_textbook_iteration(shape, targets):
    Z, y = torch.randn(shape, dtype=torch.float64), torch.randn((shape[0], *targets), dtype=torch.float64)
    expected = list(plain_descent(Z, y.reshape(shape[0], -1), 25))
    torch.testing.assert_close(probe_convergence(Z, y, 25), torch.stack([c for _, c in expected]))
    for probe, (W, _) in zip(probe_path(Z, y, 25), expected, strict=True):
        torch.testing.assert_close(probe.weight, W)
        assert not probe.bias.any()


def test_intercept_is_a_column_of_ones():
    Z, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    ones = torch.cat([Z, torch.ones(20, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(probe_convergence(Z, y, 9, intercept=True), probe_convergence(ones, y, 9))
    *_, probe = probe_path(Z, y, 9, intercept=True)
    *_, joint = probe_path(ones, y, 9)
    torch.testing.assert_close(probe.predict(Z), joint.predict(ones))


def test_rank_deficient_features_converge_to_the_minimum_norm_solution():
    Z = torch.randn(20, 3, dtype=torch.float64) @ torch.randn(3, 8, dtype=torch.float64)
    y = torch.randn(20, dtype=torch.float64)
    assert probe_convergence(Z, y, 3000)[-1] < 1e-20
    *_, last = probe_path(Z, y, 3000)
    torch.testing.assert_close(last.weight, least_squares_probe(Z, y).weight)


def test_float32_noise_is_not_taken_for_a_direction():
    Z = (torch.randn(200, 3) @ torch.randn(3, 8)).float()
    assert probe_convergence(Z, torch.randn(200), 2000)[-1] < 1e-12


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 6))
def test_curve_falls_under_the_rate_of_the_condition_number(seed, rows, columns):
    generator = torch.Generator().manual_seed(seed)
    Z = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    y = torch.randn(rows, dtype=torch.float64, generator=generator)
    loss = probe_loss_curve(Z, y, 20)
    best = (y - least_squares_probe(Z, y).predict(Z)[:, 0]).square().sum() / (2 * rows)
    s = torch.linalg.svdvals(Z)
    kappa = (s[0] / s[-1]) ** 2
    excess = loss - best
    # Kantorovich: each exact step multiplies the excess loss by at most ((κ−1)/(κ+1))².
    assert (excess[1:] <= ((kappa - 1) / (kappa + 1)) ** 2 * excess[:-1] + 1e-12 * loss[0]).all()
    assert (probe_convergence(Z, y, 20).diff() <= 1e-12).all()


def test_perfect_conditioning_is_solved_in_one_step():
    assert probe_convergence(torch.eye(5), torch.randn(5), 1)[0] < 1e-12


def test_targets_orthogonal_to_the_features_are_at_their_optimum():
    Z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert probe_convergence(Z, torch.tensor([0.0, 0.0, 1.0]), 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_orthogonal_up_to_rounding_are_at_their_optimum(dtype):
    Z, y = torch.randn(400, 6, dtype=dtype), torch.randn(400, 2, dtype=dtype)
    U = torch.linalg.qr(Z).Q
    for _ in range(2):
        y = y - U @ (U.T @ y)
    assert (U.T @ y).any()
    assert probe_convergence(Z, y, 3).tolist() == [0, 0, 0]
    assert probe_loss_curve(Z, y, 3).unique().numel() == 1
    # What is small but above rounding is a signal.
    assert probe_convergence(Z, y + (1e-3 if dtype == torch.float32 else 1e-12) * U[:, :2], 3)[0] > 0


def test_logistic_loss_falls_to_the_optimum_found_otherwise():
    torch.manual_seed(3)
    Z, y = torch.randn(60, 2, dtype=torch.float64), torch.randint(0, 3, (60,))
    curve = probe_loss_curve(Z, y, 60, loss="logistic", intercept=True)
    assert curve.shape == (61,) and (curve.diff() <= 1e-12).all()
    torch.testing.assert_close(curve[0], torch.tensor(3.0, dtype=torch.float64).log())
    weight = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(Z @ weight[:2] + weight[2], y)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(curve[-1], closure().detach(), rtol=1e-8, atol=0)


def test_logistic_loss_of_separable_classes_ends():
    Z, y = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
    curve = probe_loss_curve(Z, y, 5, loss="logistic")
    assert torch.isfinite(curve).all() and curve[-1] < 1e-4


def test_accuracy_of_separable_classes_reaches_one():
    Z, labels = torch.randn(90, 6), torch.arange(90) % 3
    Z[torch.arange(90), labels] += 6
    for loss in ("squared", "logistic"):
        curve = probe_accuracy(Z, labels, Z, labels, 15, loss=loss)
        assert curve.shape == (15,) and curve[-1] == 1


def test_ridge_agrees_with_the_normal_equations():
    Z, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    expected = torch.linalg.solve(Z.T @ Z + 0.7 * torch.eye(4, dtype=torch.float64), Z.T @ y)
    torch.testing.assert_close(least_squares_probe(Z, y, 0.7).weight, expected)
    probe = least_squares_probe(Z + 5, y + 3, intercept=True)
    assert (y + 3 - probe.predict(Z + 5)).mean(0).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: probe_convergence(torch.tensor([[1.0], [float("nan")]]), torch.ones(2), 1), NonFiniteError, "row 1"),
        (lambda: probe_convergence(torch.ones(3, 2), torch.ones(4), 1), ShapeError, "3 rows"),
        (lambda: probe_convergence(torch.ones(3, 2) * 1j, torch.ones(3), 1), ArgumentError, "real numbers in Z"),
        (lambda: probe_convergence(torch.ones(3, 2), torch.ones(3) * 1j, 1), ArgumentError, "real numbers in y"),
        (lambda: probe_convergence(torch.ones(1, 2), torch.ones(1), 1), ShapeError, "two rows"),
        (lambda: probe_convergence(torch.ones(6), torch.ones(6), 1), ShapeError, "shape"),
        (lambda: probe_convergence(torch.zeros(3, 2), torch.ones(3), 1), RankError, "zero"),
        (lambda: probe_convergence(torch.ones(3, 2), torch.ones(3), 0), ArgumentError, "at least 1"),
        (lambda: list(probe_path(torch.ones(3, 2), torch.ones(3), 1, loss="hinge")), ArgumentError, "hinge"),
        (lambda: probe_loss_curve(torch.ones(3, 2), torch.ones(3), 1, loss="hinge"), ArgumentError, "hinge"),
        (lambda: probe_loss_curve(torch.ones(3, 2), torch.rand(3), 1, loss="logistic"), ShapeError, "class numbers"),
        (lambda: probe_loss_curve(torch.ones(2, 2), torch.zeros(2), 1, loss="logistic"), ShapeError, "two classes"),
        (lambda: least_squares_probe(torch.ones(3, 2), torch.ones(3), -1.0), ArgumentError, "ridge"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
