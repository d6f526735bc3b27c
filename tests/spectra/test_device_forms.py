"""The route of devices: the numbers of the host's route, and no look at any of them on the way."""

import math

import pytest
import torch
from matrices import gaussian, geometric, orthonormal, relative_error, value_and_gradient, with_singular_values
from torch.utils._python_dispatch import TorchDispatchMode

from hf_immunize.spectra.closed_form import hessian_function
from hf_immunize.spectra.forms import CONCENTRATION, LOG_KAPPA, R_ILL, R_WELL, SCALE_FREE_R_ILL, SCALE_FREE_R_WELL
from hf_immunize.spectra.hessian import Hessian
from hf_immunize.spectra.log_kappa import hessian_log_kappa
from hf_immunize.spectra.regularizers import hessian_r_ill, hessian_r_well, spectral_concentration


FORMS = {
    "r_well": R_WELL,
    "r_ill": R_ILL,
    "scale_free_r_well": SCALE_FREE_R_WELL,
    "scale_free_r_ill": SCALE_FREE_R_ILL,
    "concentration": CONCENTRATION,
    "log_kappa": LOG_KAPPA,
}
BY_NAME = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
PUBLIC = [
    hessian_r_well,
    hessian_r_ill,
    lambda features: hessian_r_well(features, scale_free=True),
    lambda features: hessian_r_ill(features, scale_free=True),
    spectral_concentration,
    hessian_log_kappa,
]


def tied(rows, columns):
    """Two equal values at the top, three at the bottom."""
    return with_singular_values([3.0, 3.0, 2.0, 1.5, 1.0, 1.0, 1.0], rows, columns)


MATRICES = {
    "N<D": gaussian(12, 30),
    "N>D": gaussian(30, 12),
    "N=D": gaussian(12, 12),
    "ill-conditioned": with_singular_values(geometric(1e3, 12), 20, 12),
    "tied N<D": tied(7, 12),
    "tied N>D": tied(12, 7),
    "tied and rank-deficient": tied(12, 15),
    "rank-deficient N<D": with_singular_values(geometric(10.0, 5), 9, 20),
    "rank-deficient N>D": with_singular_values(geometric(10.0, 5), 20, 9),
    "more rows than a chunk": gaussian(1100, 12),
    "beyond the dense limits": gaussian(400, 500),
}


def on_device(form):
    return lambda features: hessian_function(features, form, on_device=True)


def on_host(form):
    return lambda features: hessian_function(features, form, on_device=False)


@BY_NAME
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("by_hessian", [False, True], ids=["features", "Hessian"])
def test_float64_gives_what_the_host_gives(form, name, by_hessian):
    given = Hessian.of if by_hessian else lambda z: z
    value, gradient = value_and_gradient(lambda z: on_device(form)(given(z)), MATRICES[name])
    expected, expected_gradient = value_and_gradient(lambda z: on_host(form)(given(z)), MATRICES[name])
    assert float(value) == pytest.approx(float(expected), rel=1e-11)
    assert relative_error(gradient, expected_gradient) < 1e-9


@BY_NAME
@pytest.mark.parametrize("name", [name for name in MATRICES if "tied" not in name])
def test_float32_gives_what_the_host_gives(form, name):
    features = MATRICES[name].float()
    value, gradient = value_and_gradient(on_device(form), features)
    expected, expected_gradient = value_and_gradient(on_host(form), features)
    assert value.dtype == torch.float32 and gradient.dtype == torch.float32
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert relative_error(gradient, expected_gradient) < 1e-6


@pytest.mark.parametrize("form", [R_WELL, CONCENTRATION], ids=["r_well", "concentration"])
@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_squaring_averages_over_a_repeated_top(form, repeats):
    # H = diag(σ²) to the last bit in float32
    sigma = torch.cat([torch.full((repeats,), 2.0), torch.linspace(1.5, 0.5, 40 - repeats)])
    features = torch.zeros(50, 40)
    features[:40] = torch.diag(sigma)
    value, gradient = value_and_gradient(on_device(form), features)
    expected, expected_gradient = value_and_gradient(on_host(form), features)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert relative_error(gradient, expected_gradient) < 1e-6


@pytest.mark.parametrize("form", [R_WELL, CONCENTRATION], ids=["r_well", "concentration"])
@pytest.mark.parametrize("gap", [1e-2, 1e-4, 3e-6])
def test_squaring_tells_values_apart_that_float32_tells_apart(form, gap):
    sigma = torch.cat([torch.tensor([1.0, 1.0 - gap]), torch.linspace(0.7, 0.1, 38)])
    features = torch.zeros(50, 40)
    features[:40] = torch.diag(sigma)
    _, gradient = value_and_gradient(on_device(form), features)
    _, expected = value_and_gradient(on_host(form), features)
    assert relative_error(gradient, expected) < 1e-6


def test_concentration_of_collapsed_features_stays_at_its_floor_with_zero_gradient():
    features = torch.outer(gaussian(1, 20)[0], gaussian(1, 9, seed=1)[0])
    value, gradient = value_and_gradient(on_device(CONCENTRATION), features)
    assert float(value) == pytest.approx(math.log(64 * torch.finfo(torch.float64).eps))
    assert not gradient.any()


# ---- no look at a value ---------------------------------------------------------------------------------------------


class NoLook(TorchDispatchMode):
    """Fails where a value would be read back, or a new one sent; keeps the names of all operations."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        self.seen.add(name)
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}, name
        assert not name.startswith("lift_fresh"), "torch.tensor of a value copies it to the device"
        return function(*arguments, **(options or {}))


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(12, 30), (700, 12)])
def test_nothing_is_read_back(form, dtype, shape):
    features = gaussian(*shape, dtype=dtype).requires_grad_()
    with NoLook():
        on_device(form)(features).backward()


def test_the_watch_for_values_read_back_sees_the_hosts_route_read_them():
    features = gaussian(12, 30).requires_grad_()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoLook():
        on_host(R_WELL)(features).backward()


@pytest.mark.parametrize("form", [R_WELL, SCALE_FREE_R_WELL, CONCENTRATION])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_top_alone_needs_no_decomposition_whose_status_torch_would_read(form, dtype):
    features = gaussian(12, 30, dtype=dtype).requires_grad_()
    with NoLook() as watch:
        on_device(form)(features).backward()
    assert not any(name.startswith(("linalg", "_linalg")) and "norm" not in name for name in watch.seen)


@pytest.mark.parametrize("function", PUBLIC)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("by_hessian", [False, True], ids=["features", "Hessian"])
def test_on_the_meta_device_where_no_value_exists_value_and_gradient_have_their_shapes(function, dtype, by_hessian):
    features = torch.empty(20, 12, dtype=dtype, device="meta", requires_grad=True)
    value = function(Hessian.of(features) if by_hessian else features)
    value.backward()
    assert value.shape == () and value.dtype == torch.promote_types(dtype, torch.float32)
    assert features.grad.shape == features.shape and features.grad.dtype == dtype


# ---- what the host's route raises -----------------------------------------------------------------------------------


@BY_NAME
@pytest.mark.parametrize(
    ("dtype", "bad"),
    [(torch.float32, math.nan), (torch.float32, math.inf), (torch.float64, math.nan), (torch.float64, 1e300)],
)
def test_features_that_are_not_finite_or_whose_squares_overflow_give_nan(form, dtype, bad):
    features = gaussian(9, 5, dtype=dtype)
    features[3, 2] = bad
    assert math.isnan(on_device(form)(features))


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_of_zero_give_nan_with_a_zero_gradient(form, dtype):
    value, gradient = value_and_gradient(on_device(form), torch.zeros(9, 5, dtype=dtype))
    assert math.isnan(value)
    assert not gradient.any()


@pytest.mark.parametrize("form", [R_ILL, SCALE_FREE_R_ILL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [3 * orthonormal(6, 4, seed=0), gaussian(1, 4)], ids=["equal", "one sample"])
def test_r_ill_at_perfect_conditioning_is_nan_with_a_zero_gradient(form, dtype, features):
    value, gradient = value_and_gradient(on_device(form), features.to(dtype))
    assert math.isnan(value)
    assert not gradient.any()
