import pytest
import torch

from hf_immunize.errors import NonFiniteError
from hf_immunize.linear.inputs import standardize


def test_columns_have_mean_zero_and_deviation_one():
    scaled, constant = standardize(3 + 5 * torch.randn(100, 4, dtype=torch.float64))
    assert constant == [] and scaled.mean(0).abs().max() < 1e-12
    torch.testing.assert_close(scaled.std(0), torch.ones(4, dtype=torch.float64))


def test_constant_columns_are_zero_and_reported():
    X = torch.randn(50, 3, dtype=torch.float64)
    X[:, 1] = 0.1  # its mean rounds
    scaled, constant = standardize(X)
    assert constant == [1] and not scaled[:, 1].any() and torch.isfinite(scaled).all()


def test_a_missing_cell_is_named():
    with pytest.raises(NonFiniteError, match="row 2, column 0"):
        standardize(torch.tensor([[1.0], [2.0], [float("nan")]]))
