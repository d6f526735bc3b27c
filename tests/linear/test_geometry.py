import pytest
import torch

from hf_immunize.errors import ArgumentError, ShapeError
from hf_immunize.linear.optimum import principal_angles, proposition_diagonal


def eigenvalues(X, theta):
    return torch.linalg.svdvals(X @ theta).square()


def test_proposition_32_is_the_diagonal_and_not_the_spectrum():
    # The counterexample: a generic 6×6 pair. The diagonal is majorized by the spectrum (Schur–Horn), and differs.
    generator = torch.Generator().manual_seed(0)
    X, theta = (torch.randn(6, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    diagonal, true = proposition_diagonal(X, theta), eigenvalues(X, theta)
    assert diagonal.sum() == pytest.approx(float(true.sum()))
    assert (diagonal.cumsum(0) <= true.cumsum(0) * (1 + 1e-12)).all()
    assert (diagonal / true).max() > 3
    _, _, Vh = torch.linalg.svd(theta)
    H = theta.T @ X.T @ X @ theta
    torch.testing.assert_close((Vh @ H @ Vh.T).diagonal().sort(descending=True).values, diagonal)


def test_the_diagonal_is_the_spectrum_where_the_map_shares_the_eigenvectors():
    X = torch.randn(20, 6, dtype=torch.float64)
    V = torch.linalg.svd(X, full_matrices=False).Vh.T
    theta = V @ torch.diag(torch.rand(6, dtype=torch.float64) + 0.5) @ torch.linalg.qr(torch.randn(6, 6).double()).Q
    torch.testing.assert_close(proposition_diagonal(X, theta), eigenvalues(X, theta))


def test_angles_between_known_planes():
    angle = torch.tensor(0.3, dtype=torch.float64)
    e = torch.eye(4, dtype=torch.float64)
    P = torch.stack([2 * e[0], e[1]])
    H = torch.stack([2 * e[0], angle.cos() * e[1] + angle.sin() * e[2]])
    found = torch.deg2rad(principal_angles(P, H))
    assert found.tolist() == pytest.approx([0.0, 0.3], abs=1e-12)
    assert torch.rad2deg(angle) == pytest.approx(float(principal_angles(P, H, leading=2)[1]))


def test_small_and_right_angles_keep_their_digits():
    e = torch.eye(3, dtype=torch.float64)
    tilted = torch.stack([e[0] + 1e-9 * e[1], 1e-3 * e[2]])
    plain = torch.stack([e[0], 1e-3 * e[2]])
    assert float(torch.deg2rad(principal_angles(plain, tilted, leading=1))[0]) == pytest.approx(1e-9, rel=1e-6)
    assert float(principal_angles(plain, torch.stack([e[1], 0 * e[1]]))[0]) == 90.0


def test_bad_input_is_named():
    with pytest.raises(ShapeError, match="3 and 2"):
        principal_angles(torch.ones(3, 3), torch.ones(3, 2))
    with pytest.raises(ArgumentError, match="leading"):
        principal_angles(torch.eye(3), torch.eye(3), leading=0)
    with pytest.raises(ShapeError, match="3 rows"):
        proposition_diagonal(torch.eye(3), torch.eye(2))
