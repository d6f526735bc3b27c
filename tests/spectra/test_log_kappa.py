import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_immunize.errors import NonFiniteError, RankError
from hf_immunize.spectra.log_kappa import hessian_log_kappa


def random(rows, columns, seed=0, dtype=torch.float64):
    return torch.randn(rows, columns, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_it_is_the_logarithm_of_the_ratio_of_extreme_eigenvalues(shape):
    Z = random(*shape)
    sigma = torch.linalg.svdvals(Z)
    assert hessian_log_kappa(Z).item() == pytest.approx(2 * math.log(sigma[0] / sigma[-1]), abs=1e-10)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_its_gradient_is_that_of_finite_differences(shape):
    Z = random(*shape).requires_grad_()
    assert torch.autograd.gradcheck(hessian_log_kappa, (Z,))


def test_float32_agrees_with_float64():
    Z = random(16, 40, dtype=torch.float32).requires_grad_()
    hessian_log_kappa(Z).backward()
    exact = Z.detach().double().requires_grad_()
    hessian_log_kappa(exact).backward()
    assert torch.allclose(Z.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(0, 100))
def test_scaling_the_features_changes_nothing(scale, seed):
    Z = random(4, 7, seed)
    assert hessian_log_kappa(scale * Z).item() == pytest.approx(hessian_log_kappa(Z).item(), abs=1e-8)


def test_directions_of_no_extent_do_not_count():
    Z = torch.diag(torch.tensor([10.0, 1.0, 0.0], dtype=torch.float64))
    assert hessian_log_kappa(Z).item() == pytest.approx(math.log(100))


def test_equal_singular_values_have_no_gradient():
    Z = torch.eye(4, dtype=torch.float64).requires_grad_()
    hessian_log_kappa(Z).backward()
    assert Z.grad.abs().max() < 1e-12


def test_nan_is_refused():
    with pytest.raises(NonFiniteError):
        hessian_log_kappa(torch.full((3, 4), float("nan")))


def test_dead_features_are_refused():
    with pytest.raises(RankError):
        hessian_log_kappa(torch.zeros(3, 4))
