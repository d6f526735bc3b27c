import pytest
import torch

from hf_immunize.errors import NonFiniteError, RankError, ShapeError
from hf_immunize.linear.optimum import null_basis, row_factor


@pytest.mark.parametrize("shape", [(50, 6), (4, 9)])
def test_rows_have_the_gram_matrix_of_the_data(shape):
    X = torch.randn(shape, dtype=torch.float64)
    factor = row_factor(X)
    torch.testing.assert_close(factor.rows.T @ factor.rows, X.T @ X)
    assert factor.rank == min(shape) and factor.dim == shape[1] and factor.num_samples == shape[0]


def test_constant_and_dependent_columns_lower_the_rank():
    X = torch.randn(40, 5, dtype=torch.float64)
    X = torch.cat([X, X[:, :1] + X[:, 1:2], torch.zeros(40, 1, dtype=torch.float64)], 1)
    assert row_factor(X).rank == 5


def test_float32_noise_is_no_direction_even_after_a_cast():
    X = torch.randn(300, 3) @ torch.randn(3, 8)
    assert row_factor(X).rank == 3
    assert row_factor(X.double(), produced_dtype=torch.float32).rank == 3


def test_uncentred_images_do_not_gain_rank_from_rounding():
    # Many equal columns and a dominant mean: the decomposition's own noise exceeds ten units of rounding.
    X = (torch.randint(0, 2, (3000, 60)).double().repeat(1, 4) / 255 - 0.1307) / 0.3081
    assert row_factor(X).rank <= 61


def test_null_basis_completes():
    V = torch.linalg.qr(torch.randn(7, 3, dtype=torch.float64)).Q
    N = null_basis(V)
    assert N.shape == (7, 4) and (V.T @ N).abs().max() < 1e-14
    assert null_basis(torch.zeros(3, 0, dtype=torch.float64)).shape == (3, 3)


@pytest.mark.parametrize(
    ("X", "error", "words"),
    [
        (torch.tensor([[1.0, 2.0], [3.0, float("inf")]]), NonFiniteError, "row 1, column 1"),
        (torch.ones(1, 4), ShapeError, "two rows"),
        (torch.ones(3, 2, 2), ShapeError, "shape"),
        (torch.zeros(3, 2), RankError, "zero"),
    ],
)
def test_bad_data_is_named(X, error, words):
    with pytest.raises(error, match=words):
        row_factor(X)


def test_whole_numbers_are_data_too():
    assert row_factor(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)).rank == 2
