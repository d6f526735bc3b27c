"""The one route: the Hessian in the place of the features, no look at a value, NaN where nothing is raised."""

import math
import re
from functools import partial
from pathlib import Path

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


scale_free_r_well = partial(hessian_r_well, scale_free=True)
scale_free_r_ill = partial(hessian_r_ill, scale_free=True)
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


def by_shares(function):
    def value(z):
        shares = [Hessian.of(rows).matrix for rows in z.tensor_split(3)]
        return function(Hessian(sum(shares), rows=len(z), dtype=z.dtype))

    return value


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_hessian_of_all_rows_or_of_shares_gives_value_and_gradient_of_the_features(
    function, rows, columns, rank, dtype
):
    features = with_singular_values(geometric(10.0, rank), rows, columns).to(dtype)
    value, gradient = value_and_gradient(function, features)
    for other in (by_hessian(function), by_shares(function)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, found_gradient = value_and_gradient(other, features)
        assert found.dtype == value.dtype
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        assert float(found) == pytest.approx(float(value), rel=tolerance)
        assert relative_error(found_gradient, gradient) < tolerance
    matrix = Hessian.of(features).matrix.requires_grad_()
    function(Hessian(matrix, rows=rows, dtype=dtype)).backward()
    assert matrix.grad.dtype == torch.float64
    assert torch.allclose(matrix.grad, matrix.grad.mT, rtol=1e-13, atol=1e-13 * float(matrix.grad.abs().max()))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)])
def test_gradcheck_through_the_hessian(function, shape):
    assert torch.autograd.gradcheck(by_hessian(function), (gaussian(*shape, seed=3).requires_grad_(),))


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(12, 30), (700, 12)])
def test_nothing_is_read_back(form, dtype, shape):
    with NoLook():
        unseen(form)(gaussian(*shape, dtype=dtype).requires_grad_()).backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoLook():
        hessian_r_well(gaussian(12, 30))


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_no_value_gives_nan_and_a_zero_gradient(form, dtype):
    bad = [gaussian(9, 5).index_fill(1, torch.tensor([2]), value) for value in (math.nan, math.inf)]
    if dtype == torch.float64:
        bad.append(1e300 * gaussian(9, 5))
    bad.append(torch.zeros(9, 5))
    if form[0] is ill_form:  # perfect conditioning
        bad += [3 * orthonormal(6, 4, seed=0), gaussian(1, 4)]
    for features in bad:
        value, gradient = value_and_gradient(unseen(form), features.to(dtype))
        assert math.isnan(value)
        assert not gradient.any() or not torch.isfinite(features).all()


def test_each_side_keeps_the_directions_that_it_can_tell():
    features = with_singular_values(geometric(1e10, 8), 30, 8)
    assert float(hessian_log_kappa(features)) == pytest.approx(2 * math.log(1e10), rel=1e-6)
    assert float(hessian_log_kappa(Hessian.of(features))) < 2 * math.log(1e9)
    huge = Hessian.of(1e60 * gaussian(9, 5))  # whose fourth power has no float64
    assert float(hessian_r_well(huge, scale_free=True)) == pytest.approx(float(scale_free_r_well(gaussian(9, 5))))
    # Below the smallest of six true directions there is nothing but the rounding of the Gram matrix.
    for dtype in (torch.float32, torch.float64):
        found = hessian_log_kappa(Hessian.of(with_singular_values(geometric(1e3, 6), 6, 200).to(dtype)))
        assert float(found) == pytest.approx(2 * math.log(1e3), rel=1e-4)


DIM = 64


def resident_bytes(name):
    """ "VmRSS", what the process holds, or "VmHWM", the most it held since `reset_peak`."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def reset_peak():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("resetting the peak of resident memory needs Linux")


def features_of(rows, dtype):
    return (torch.randn(rows, DIM) * torch.linspace(1.0, 3.0, DIM)).to(dtype).requires_grad_()


@pytest.mark.parametrize(
    "function", [hessian_r_ill, spectral_concentration, hessian_log_kappa, by_hessian(hessian_r_well)]
)
# float32: the gradient, and the same scaled by what comes from above; bfloat16: the first in float32, twice as large
@pytest.mark.parametrize(("dtype", "multiple"), [(torch.float32, 2.0), (torch.bfloat16, 3.0)])
@pytest.mark.parametrize("rows", [50_000, 200_000])
def test_many_rows_take_two_or_three_times_their_own_memory_and_no_more(function, dtype, multiple, rows):
    torch.autograd.grad(function(small := features_of(600, dtype)), small)  # what is loaded once is loaded
    features = features_of(rows, dtype)
    reset_peak()
    before = resident_bytes("VmRSS")
    torch.autograd.grad(function(features), features)
    extra = resident_bytes("VmHWM") - before
    assert extra < multiple * features.nbytes + 4 * 2**20
