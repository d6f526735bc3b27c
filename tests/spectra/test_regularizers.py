"""The regularizers against naive references: eigenvalues of the D×D Hessian, with autograd running through them."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matrices import gaussian, geometric, orthonormal, relative_error, value_and_gradient, with_singular_values

from hf_immunize.errors import NonFiniteError, PerfectConditioningError, RankError
from hf_immunize.spectra.conditioning import condition_number
from hf_immunize.spectra.hessian_functions import (
    Hessian,
    hessian_log_kappa,
    hessian_r_ill,
    hessian_r_well,
    r_ill,
    r_well,
    spectral_concentration,
)


FEATURE_FUNCTIONS = [hessian_r_well, hessian_r_ill, spectral_concentration, hessian_log_kappa]
ALL_FUNCTIONS = [r_well, r_ill, *FEATURE_FUNCTIONS]
properties = settings(max_examples=40, deadline=None, derandomize=True)


# The references know the rank by construction and differentiate through svdvals or eigvalsh of the whole matrix.
def well(values, count):
    return 0.5 * values[0] ** 2 - values.square().sum() / (2 * count)


def ill(values):
    return 1 / (values.square().sum() / (2 * len(values)) - 0.5 * values[-1] ** 2)


def hessian_values(z):
    return torch.linalg.eigvalsh(z.mT @ z).flip(0)


NAIVE = {
    r_well: lambda s, rank: well(torch.linalg.svdvals(s), min(s.shape)),
    r_ill: lambda s, rank: ill(torch.linalg.svdvals(s)[:rank]),
    hessian_r_well: lambda z, rank: well(hessian_values(z), z.shape[1]),
    hessian_r_ill: lambda z, rank: ill(hessian_values(z)[:rank]),
    spectral_concentration: lambda z, rank: torch.log(hessian_values(z)[1:].sum() / hessian_values(z)[0]),
    hessian_log_kappa: lambda z, rank: 2 * torch.log(torch.linalg.svdvals(z)[[0, rank - 1]]).diff().neg()[0],
}
# rows, columns, rank, κ(Z)
SMALL = [
    pytest.param(6, 10, 6, 10, id="N<D"),
    pytest.param(10, 6, 6, 10, id="N>D"),
    pytest.param(8, 8, 8, 10, id="N=D"),
    pytest.param(6, 10, 3, 10, id="N<D-rank-3"),
    pytest.param(10, 8, 5, 10, id="N>D-rank-5"),
    pytest.param(12, 20, 12, 1e4, id="N<D-ill"),
    pytest.param(20, 12, 12, 1e4, id="N>D-ill"),
    pytest.param(12, 20, 7, 1e4, id="N<D-ill-rank-7"),
]


@pytest.mark.parametrize("function", ALL_FUNCTIONS)
@pytest.mark.parametrize(("rows", "columns", "rank", "kappa"), SMALL)
def test_value_and_gradient_agree_with_autograd_through_the_full_spectrum(function, rows, columns, rank, kappa):
    matrix = with_singular_values(geometric(kappa, rank), rows, columns, seed=rows)
    value, gradient = value_and_gradient(function, matrix)
    expected, expected_gradient = value_and_gradient(NAIVE[function], matrix, rank=rank)
    assert float(value) == pytest.approx(float(expected), rel=1e-10)
    assert relative_error(gradient, expected_gradient) < 1e-10
    if function in (hessian_r_well, hessian_r_ill):
        value, gradient = value_and_gradient(function, matrix, scale_free=True)
        expected, expected_gradient = value_and_gradient(
            lambda z: NAIVE[function](z * torch.sqrt(z.shape[1] / z.square().sum()), rank), matrix
        )
        assert float(value) == pytest.approx(float(expected), rel=1e-10)
        assert relative_error(gradient, expected_gradient) < 1e-10


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
@pytest.mark.parametrize("function", FEATURE_FUNCTIONS)
def test_float32_features_are_computed_in_float64(function, shape):
    features = gaussian(*shape, dtype=torch.float32)
    value, gradient = value_and_gradient(function, features)
    expected, expected_gradient = value_and_gradient(NAIVE[function], features.double(), rank=40)
    assert float(value) == pytest.approx(float(expected), rel=1.2e-7)
    assert relative_error(gradient, expected_gradient) < 1e-6
    if function in (hessian_r_well, hessian_r_ill):
        _, gradient = value_and_gradient(function, features, scale_free=True)
        for exponent in (-9, -8, 4, 6, 8):
            _, scaled = value_and_gradient(function, 10.0**exponent * features, scale_free=True)
            assert relative_error(10.0**exponent * scaled.double(), gradient) < 1e-5


@pytest.mark.parametrize(("rows", "columns"), [(9, 6), (6, 9)])
@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_extremes_give_the_averaged_subgradients(rows, columns, repeats):
    size = min(rows, columns)
    sigma = torch.linspace(1.5, 0.7, size, dtype=torch.float64)
    sigma[:repeats], sigma[-repeats:] = 2.0, 0.5
    u, v = orthonormal(rows, size, seed=1), orthonormal(columns, size, seed=2)
    top, bottom = ((sigma == end).double() / repeats for end in (2.0, 0.5))
    d, of_hessian = (((s**2).sum() / size - s[-1] ** 2) / 2 for s in (sigma, sigma**2))
    for function, expected in (
        (r_well, 2 * top - sigma / size),
        (r_ill, (0.5 * bottom - sigma / size) / d**2),
        (hessian_r_well, 2 * (4 * top - sigma**2 / columns) * sigma),
        (hessian_r_ill, 2 * (0.25 * bottom - sigma**2 / size) / of_hessian**2 * sigma),
    ):
        _, gradient = value_and_gradient(function, (u * sigma) @ v.mT)
        assert relative_error(gradient, (u * expected) @ v.mT) < 1e-10


seeds = st.integers(0, 2**20)
spectra = st.lists(st.floats(0.01, 100.0), min_size=2, max_size=7)


def spread(values):
    return max(values) > 1.001 * min(values)


@properties
@example(values=[77.0, 0.01171875], zeros=1, exponent=0, seed=0)
@given(values=spectra.filter(spread), zeros=st.integers(1, 6), exponent=st.integers(-6, 6), seed=seeds)
def test_neither_zero_rows_nor_rotations_nor_scale_change_what_they_should_not(values, zeros, exponent, seed):
    # Z is wide, Z with zero rows below is tall: the one goes through ZZᵀ, the other through ZᵀZ.
    features = with_singular_values(values, len(values), len(values) + zeros, seed)
    padded = torch.cat([features, torch.zeros(zeros + 1, features.shape[1], dtype=torch.float64)])
    left, right = (orthonormal(size, size, seed + 1) for size in features.shape)
    for function in FEATURE_FUNCTIONS:
        value, gradient = value_and_gradient(function, features)
        found, changed = value_and_gradient(function, padded)
        assert float(found) == pytest.approx(float(value), rel=1e-9)
        assert relative_error(changed[: len(values)], gradient) < 1e-7
        found, turned = value_and_gradient(function, left @ features @ right)
        assert float(found) == pytest.approx(float(value), rel=1e-8)
        assert relative_error(turned, left @ gradient @ right) < 1e-6
        if function in (hessian_r_well, hessian_r_ill):
            value, gradient = value_and_gradient(function, features, scale_free=True)
            found, scaled = value_and_gradient(function, 10.0**exponent * features, scale_free=True)
            assert float(found) == pytest.approx(float(value), rel=1e-9)
            assert relative_error(10.0**exponent * scaled, gradient) < 1e-8


EQUAL = 3 * orthonormal(6, 4, seed=0)
BAD = [
    (gaussian(5, 7).index_fill(0, torch.tensor([3]), math.inf), NonFiniteError, "row 3, column 0"),
    (torch.zeros(3, 4), RankError, "zero"),
    *[(one, PerfectConditioningError, "equal") for one in (EQUAL, EQUAL.float(), gaussian(1, 4))],
]  # fmt: skip


@pytest.mark.parametrize("function", ALL_FUNCTIONS)
def test_bad_input_is_named(function):
    for matrix, error, found in BAD:
        if (error is PerfectConditioningError and function not in (r_ill, hessian_r_ill)) or (
            error is RankError and function is r_well
        ):
            continue
        with pytest.raises(error, match=found):
            function(matrix)


@properties
@given(values=spectra.filter(spread), extra_rows=st.integers(0, 4), extra_columns=st.integers(0, 4), seed=seeds)
def test_the_regularizers_are_bounds_of_kappa(values, extra_rows, extra_columns, seed):
    matrix = with_singular_values(values, len(values) + extra_rows, len(values) + extra_columns, seed)
    size, largest, smallest = min(matrix.shape), max(values), min(values)
    log_kappa = math.log(condition_number(matrix))
    assert log_kappa <= size * float(r_well(matrix)) / smallest**2 * (1 + 1e-9) + 1e-9
    assert 1 / log_kappa <= largest**2 * float(r_ill(matrix)) * (1 + 1e-9)
    # tr H − σ_1 keeps about eight digits where σ_1 is 1e8 times the rest.
    assert math.log(len(values) - 1) - float(spectral_concentration(matrix)) <= 2 * log_kappa + 1e-6
    assert float(hessian_r_well(matrix)) >= 0 and float(hessian_r_ill(matrix)) > 0


def test_the_bounds_fail_without_their_factors():
    lower, upper = (torch.diag(torch.tensor(values, dtype=torch.float64)) for values in ([0.1, 0.01], [100.0, 1.0]))
    assert float(r_well(lower)) == pytest.approx(0.002475) and float(r_well(lower)) < math.log(condition_number(lower))
    assert float(r_ill(upper)) == pytest.approx(4.0004e-4, rel=1e-4)
    assert float(r_ill(upper)) < 1 / math.log(condition_number(upper))


@properties
@given(columns=st.integers(1, 8), extra=st.integers(0, 5), scale=st.floats(1e-3, 1e3), seed=seeds)
def test_at_perfect_conditioning_hessian_r_well_vanishes_with_full_column_rank_alone(columns, extra, scale, seed):
    features = orthonormal(columns + extra, columns, seed)
    assert float(hessian_r_well(scale * features, scale_free=True)) <= 1e-13
    # Of fewer rows than columns κ is 1 too: ½ − N/(2D).
    assert float(hessian_r_well(features.mT)) == pytest.approx(0.5 * extra / (columns + extra), rel=1e-12, abs=1e-13)
    assert value_and_gradient(hessian_log_kappa, features)[1].abs().max() < 1e-12
    assert not r_well(torch.zeros(columns, 3)) and not value_and_gradient(r_well, torch.zeros(columns, 3))[1].any()


def test_concentration_of_collapsed_features_stays_at_its_floor_with_zero_gradient():
    features = torch.outer(gaussian(1, 20)[0], gaussian(1, 9, seed=1)[0])
    value, gradient = value_and_gradient(spectral_concentration, features)
    assert float(value) == pytest.approx(math.log(64 * torch.finfo(torch.float64).eps))
    assert not gradient.any()


def test_float32_matrices_tell_what_is_well_above_float32_rounding():
    u, v = orthonormal(64, 64, seed=1), orthonormal(64, 64, seed=2)
    sigma = torch.cat([torch.tensor([1.0005]), torch.linspace(1.0, 0.1, 63)]).double()
    along_top = u[:, 0] @ value_and_gradient(r_well, ((u * sigma) @ v.mT).float())[1].double() @ v[:, 0]
    assert float(along_top) == pytest.approx(1.0005 * (1 - 1 / 64), rel=1e-3)
    sigma = geometric(1e4, 64)
    along_bottom = u[:, -1] @ value_and_gradient(r_ill, ((u * sigma) @ v.mT).float())[1].double() @ v[:, -1]
    d = (sigma**2).sum() / 128 - sigma[-1] ** 2 / 2
    assert float(along_bottom) == pytest.approx(float(sigma[-1] * (1 - 1 / 64) / d**2), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
@pytest.mark.parametrize("function", ALL_FUNCTIONS)
def test_value_and_gradient_have_their_dtype_and_depend_on_the_features_alone(function, shape, dtype):
    features = gaussian(*shape, dtype=dtype)
    state, given = torch.get_rng_state(), features.clone()
    value, gradient = value_and_gradient(function, features)
    assert (value.dtype, gradient.dtype) == (torch.promote_types(dtype, torch.float32), dtype)
    assert bool(torch.isfinite(value)) and bool(torch.isfinite(gradient).all())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, again_gradient = value_and_gradient(function, features)
    assert torch.equal(value, again) and torch.equal(gradient, again_gradient)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(features, given)
    if dtype == torch.float64:
        _, weighted = value_and_gradient(lambda z: -3e8 * function(z), features)
        assert relative_error(weighted, -3e8 * gradient) < 1e-14


# ---- the Hessian in the place of the features ----


def by_hessian(function):
    return lambda z: function(Hessian.of(z))


def by_shares(function):
    def value(z):
        shares = [Hessian.of(rows).matrix for rows in z.tensor_split(3)]
        return function(Hessian(sum(shares), rows=len(z), dtype=z.dtype))

    return value


@pytest.mark.parametrize("function", FEATURE_FUNCTIONS)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(9, 6, 6), (6, 9, 6), (9, 6, 4), (6, 9, 3), (400, 330, 330)])
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


@pytest.mark.parametrize("function", FEATURE_FUNCTIONS)
def test_a_bad_hessian_is_named(function):
    for call, error in (
        (lambda: function(Hessian.of(math.nan * gaussian(5, 4))), NonFiniteError),
        (lambda: function(Hessian.of(torch.zeros(5, 4))), RankError),
        (lambda: hessian_r_ill(Hessian.of(gaussian(1, 4))), PerfectConditioningError),
    ):
        with pytest.raises(error):
            call()


def test_each_side_keeps_the_directions_that_it_can_tell():
    features = with_singular_values(geometric(1e10, 8), 30, 8)
    assert float(hessian_log_kappa(features)) == pytest.approx(2 * math.log(1e10), rel=1e-6)
    assert float(hessian_log_kappa(Hessian.of(features))) < 2 * math.log(1e9)
    for features in (1e60 * gaussian(9, 5), Hessian.of(1e-60 * gaussian(9, 5))):  # whose fourth power has no float64
        with pytest.raises(NonFiniteError, match="their scale"):
            hessian_r_well(features, scale_free=True)
    # Below the smallest of six true directions there is nothing but the rounding of the Gram matrix.
    for dtype in (torch.float32, torch.float64):
        found = hessian_log_kappa(Hessian.of(with_singular_values(geometric(1e3, 6), 6, 200).to(dtype)))
        assert float(found) == pytest.approx(2 * math.log(1e3), rel=1e-4)
