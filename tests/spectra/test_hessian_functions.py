"""The one route: the Hessian in the place of the features, no look at a value, NaN where nothing is raised."""

import math

import pytest
import torch
from matrices import gaussian, geometric, orthonormal, relative_error, value_and_gradient, with_singular_values
from torch.utils._python_dispatch import TorchDispatchMode

from hf_immunize.errors import ArgumentError, NonFiniteError, PerfectConditioningError, RankError, ShapeError
from hf_immunize.spectra.hessian_functions import Hessian, hessian_function
from hf_immunize.spectra.regularizers import (
    concentration_form,
    hessian_log_kappa,
    hessian_r_ill,
    hessian_r_well,
    ill_form,
    log_kappa_form,
    spectral_concentration,
    well_form,
)


def scale_free_r_well(features):
    return hessian_r_well(features, scale_free=True)


def scale_free_r_ill(features):
    return hessian_r_ill(features, scale_free=True)


FUNCTIONS = [
    hessian_r_well,
    hessian_r_ill,
    scale_free_r_well,
    scale_free_r_ill,
    spectral_concentration,
    hessian_log_kappa,
]
# rows, columns, rank
SHAPES = [(9, 6, 6), (6, 9, 6), (7, 7, 7), (9, 6, 4), (6, 9, 3), (330, 340, 330), (400, 330, 330)]


def by_hessian(function):
    return lambda z: function(Hessian.of(z))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_the_hessian_gives_the_value_and_gradient_of_the_features(function, rows, columns, rank):
    features = with_singular_values(geometric(10.0, rank), rows, columns)
    value, gradient = value_and_gradient(function, features)
    found, found_gradient = value_and_gradient(by_hessian(function), features)
    assert float(found) == pytest.approx(float(value), rel=1e-12)
    assert relative_error(found_gradient, gradient) < 1e-12


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("rows", "columns"), [(40, 60), (60, 40), (400, 500), (500, 400)])
def test_float32_features_agree_to_their_own_precision(function, rows, columns):
    features = gaussian(rows, columns, dtype=torch.float32)
    value, gradient = value_and_gradient(function, features)
    found, found_gradient = value_and_gradient(by_hessian(function), features)
    assert found.dtype == value.dtype
    assert float(found) == pytest.approx(float(value), rel=1e-6)
    assert relative_error(found_gradient, gradient) < 1e-6


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_sum_over_shares_of_rows_is_the_hessian_of_all_rows(function):
    features = gaussian(24, 7)
    value, gradient = value_and_gradient(function, features)

    def by_shares(z):
        shares = [Hessian.of(rows).matrix for rows in z.split([3, 10, 11])]
        return function(Hessian(sum(shares), rows=24, dtype=z.dtype))

    found, found_gradient = value_and_gradient(by_shares, features)
    assert float(found) == pytest.approx(float(value), rel=1e-12)
    assert relative_error(found_gradient, gradient) < 1e-12


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_gradient_at_the_hessian_is_symmetric_and_in_float64(function):
    matrix = Hessian.of(gaussian(12, 8, dtype=torch.float32)).matrix.requires_grad_()
    function(Hessian(matrix, rows=12, dtype=torch.float32)).backward()
    assert matrix.grad.dtype == torch.float64
    assert torch.allclose(matrix.grad, matrix.grad.mT, rtol=1e-13, atol=1e-13 * float(matrix.grad.abs().max()))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)])
def test_gradcheck_through_the_hessian(function, shape):
    assert torch.autograd.gradcheck(by_hessian(function), (gaussian(*shape, seed=3).requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rank_is_at_most_the_number_of_rows(dtype):
    # Below the smallest of the six true directions there is nothing but the rounding of the Gram matrix.
    features = with_singular_values(geometric(1e3, 6), 6, 200).to(dtype)
    found = hessian_log_kappa(Hessian.of(features))
    assert float(found) == pytest.approx(2 * math.log(1e3), rel=1e-4)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_autocast_changes_nothing(function):
    features = gaussian(20, 12, dtype=torch.bfloat16)
    value, gradient = value_and_gradient(by_hessian(function), features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, found_gradient = value_and_gradient(by_hessian(function), features)
    assert torch.equal(found, value)
    assert torch.equal(found_gradient, gradient)


def hessian(matrix, rows=5, dtype=torch.float32):
    return Hessian(matrix, rows=rows, dtype=dtype)


EYE = torch.eye(4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "found"),
    [
        (lambda: hessian(torch.ones(4, 3, dtype=torch.float64)), ShapeError, r"\(4, 3\)"),
        (lambda: hessian(torch.eye(3)), ArgumentError, "float32"),
        (lambda: hessian(EYE, rows=0), ShapeError, "found 0"),
        (lambda: hessian(EYE, rows=-2), ShapeError, "found -2"),
        (lambda: hessian(EYE, dtype=None), ArgumentError, "None"),
        *[(lambda f=f: f(hessian(EYE * math.nan)), NonFiniteError, "row 0, column 0") for f in FUNCTIONS],
        *[(lambda f=f: f(hessian(0 * EYE)), RankError, "zero") for f in FUNCTIONS],
        *[
            (lambda f=f, z=z: f(Hessian.of(z)), PerfectConditioningError, "equal")
            for f in (hessian_r_ill, scale_free_r_ill)
            for z in (3 * orthonormal(6, 4, seed=0).float(), gaussian(1, 4))
        ],
    ],
)
def test_bad_input_is_named(call, error, found):
    with pytest.raises(error, match=found):
        call()


# ---- no look at a value ---------------------------------------------------------------------------------------------


FORMS = {
    "r_well": (well_form, 2, False),
    "r_ill": (ill_form, -2, False),
    "scale_free_r_well": (well_form, 2, True),
    "scale_free_r_ill": (ill_form, -2, True),
    "concentration": (concentration_form, 0, False),
    "log_kappa": (log_kappa_form, 0, False),
}
BY_NAME = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def unseen(form):
    function, degree, scale_free = form
    return lambda z: hessian_function(z, function, degree, scale_free=scale_free, raises=False)


class NoLook(TorchDispatchMode):
    """Fails where a value would be read back, or a new one sent."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}, name
        assert not name.startswith("lift_fresh"), "torch.tensor of a value copies it to the device"
        return function(*arguments, **(options or {}))


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(12, 30), (700, 12)])
def test_nothing_is_read_back(form, dtype, shape):
    features = gaussian(*shape, dtype=dtype).requires_grad_()
    with NoLook():
        unseen(form)(features).backward()


def test_the_watch_sees_the_host_read_a_value():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoLook():
        hessian_r_well(gaussian(12, 30))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("by_hessian", [False, True], ids=["features", "Hessian"])
def test_on_the_meta_device_where_no_value_exists_value_and_gradient_have_their_shapes(function, dtype, by_hessian):
    features = torch.empty(20, 12, dtype=dtype, device="meta", requires_grad=True)
    value = function(Hessian.of(features) if by_hessian else features)
    value.backward()
    assert value.shape == () and value.dtype == torch.promote_types(dtype, torch.float32)
    assert features.grad.shape == features.shape and features.grad.dtype == dtype


@BY_NAME
@pytest.mark.parametrize(
    ("dtype", "bad"),
    [(torch.float32, math.nan), (torch.float32, math.inf), (torch.float64, math.nan), (torch.float64, 1e300)],
)
def test_features_that_are_not_finite_or_whose_squares_overflow_give_nan(form, dtype, bad):
    features = gaussian(9, 5, dtype=dtype)
    features[3, 2] = bad
    assert math.isnan(unseen(form)(features))


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_of_zero_give_nan_with_a_zero_gradient(form, dtype):
    value, gradient = value_and_gradient(unseen(form), torch.zeros(9, 5, dtype=dtype))
    assert math.isnan(value)
    assert not gradient.any()


@pytest.mark.parametrize("form", [FORMS["r_ill"], FORMS["scale_free_r_ill"]], ids=["r_ill", "scale_free_r_ill"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [3 * orthonormal(6, 4, seed=0), gaussian(1, 4)], ids=["equal", "one sample"])
def test_r_ill_at_perfect_conditioning_is_nan_with_a_zero_gradient(form, dtype, features):
    value, gradient = value_and_gradient(unseen(form), features.to(dtype))
    assert math.isnan(value)
    assert not gradient.any()


def test_float64_features_keep_directions_that_their_gram_matrix_loses():
    features = with_singular_values(geometric(1e10, 8), 30, 8)
    assert float(hessian_log_kappa(features)) == pytest.approx(2 * math.log(1e10), rel=1e-6)
    assert float(hessian_log_kappa(Hessian.of(features))) < 2 * math.log(1e9)
