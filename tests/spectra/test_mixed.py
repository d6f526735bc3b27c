"""The extreme pairs from a Gram matrix in float32: what float64 gives, or not given."""

import math

import pytest
import torch
from matrices import gaussian, geometric, orthonormal, relative_error, value_and_gradient, with_singular_values

from hf_immunize.errors import NonFiniteError, PerfectConditioningError, RankError
from hf_immunize.spectra import mixed
from hf_immunize.spectra.forms import R_ILL, R_WELL
from hf_immunize.spectra.gram import gram_matrix
from hf_immunize.spectra.mixed import estimable, largest_pair_by_features, smallest_pair_by_features
from hf_immunize.spectra.regularizers import hessian_r_ill, hessian_r_well
from hf_immunize.spectra.small_side import single_side


SIZE = 400  # beyond the limit


def with_spectrum(sigma, rows, seed=0):
    return with_singular_values(torch.as_tensor(sigma, dtype=torch.float64), rows, len(sigma), seed).float()


def around_a_mean(rows, columns):
    """Ill-conditioned, with a large gap at the top, as a network's features are."""
    return (2 + gaussian(rows, columns) * torch.arange(1, columns + 1) ** -0.7).float()


def scale_free(function):
    return lambda z: function(z, scale_free=True)


FEATURES = {
    "independent, N > D": gaussian(700, SIZE).float(),
    "independent, N < D": gaussian(SIZE, 700).float(),
    "around a mean, N > D": around_a_mean(700, SIZE),
    "around a mean, N < D": around_a_mean(SIZE, 700),
    "κ(Z) = 1.5": with_spectrum(torch.linspace(1.5, 1.0, SIZE), 700),
    "κ(Z) = 100": with_spectrum(geometric(100.0, SIZE), 700),
    "from half precision": gaussian(700, SIZE).to(torch.bfloat16).float(),
    "more than is kept cast": gaussian(3000, SIZE).float(),
}
FUNCTIONS = {
    "r_well": hessian_r_well,
    "r_ill": hessian_r_ill,
    "scale-free r_well": scale_free(hessian_r_well),
    "scale-free r_ill": scale_free(hessian_r_ill),
}


def assert_as_in_float64(function, features, rounding=1e-6):
    value, gradient = value_and_gradient(function, features)
    expected, expected_gradient = value_and_gradient(function, features.double())
    assert float(value) == pytest.approx(float(expected), rel=1.2e-7)
    assert relative_error(gradient.double(), expected_gradient) < rounding


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", FEATURES)
def test_value_and_gradient_are_those_of_float64_throughout(name, function):
    # Around a mean the scale-free gradient is what is left of a larger one, whose product is rounded in float32.
    left_over = "mean" in name and "scale-free" in function
    assert_as_in_float64(FUNCTIONS[function], FEATURES[name], rounding=1e-5 if left_over else 1e-6)


@pytest.mark.parametrize("name", FEATURES)
def test_the_top_is_found_from_float32(name):
    assert estimable(FEATURES[name], inverse=False)
    refused = {"κ(Z) = 1.5": "cancels", "from half precision": "biased"}
    assert (R_WELL.single(single_side(FEATURES[name])) is None) == (name in refused)


@pytest.mark.parametrize("shape", [(700, SIZE), (SIZE, 700)])
def test_the_bottom_of_independent_features_is_found_from_float32(shape):
    features = gaussian(*shape).float()
    assert estimable(features, inverse=True)
    assert R_ILL.single(single_side(features)) is not None


def test_ill_conditioned_features_are_not_tried_for_the_inverse():
    assert not estimable(around_a_mean(700, SIZE), inverse=True)


@pytest.mark.parametrize(
    "features",
    [
        gaussian(700, SIZE),
        gaussian(700, SIZE).bfloat16(),
        gaussian(700, 300).float(),
        torch.ones(1, 1).expand(20_000, SIZE),
    ],
    ids=["float64", "bfloat16", "small", "long"],
)
def test_other_features_go_without_the_estimate(features):
    assert not estimable(features, inverse=False)


# ---- given only where proved ---------------------------------------------------------------------------------------


def pairs(features):
    single = gram_matrix(features, torch.float32)
    slack = float(single.square().sum() / single.trace()) / SIZE
    return (
        largest_pair_by_features(single, features, 1e-8),
        smallest_pair_by_features(single, features, 1e-8, slack),
    )


@pytest.mark.parametrize("repeats", [2, 3, 4, 7])
def test_repeated_extremes_are_not_taken_for_simple_ones(repeats):
    # With H diagonal the repetition is one to the last bit.
    middle = torch.linspace(2.0, 0.6, SIZE - 2 * repeats)
    sigma = torch.cat([torch.full((repeats,), 3.0), middle, torch.full((repeats,), 0.5)])
    assert pairs(torch.diag(sigma)) == (None, None)


@pytest.mark.parametrize("gap", [0.1, 1e-3, 1e-6])
def test_extremes_of_a_small_gap_are_right_or_not_given(gap):
    sigma = torch.linspace(2.0, 1.0, SIZE, dtype=torch.float64)
    sigma[0], sigma[-1] = sigma[1] * (1 + gap), sigma[-2] * (1 - gap)
    features = with_spectrum(sigma, 700)
    values, vectors = torch.linalg.eigh(features.double().mT @ features.double())
    for found, place in zip(pairs(features), (-1, 0), strict=True):
        if found is None:
            assert gap < 0.05
            continue
        assert found.value == pytest.approx(float(values[place]), rel=1e-10)
        error = found.vector[:, 0] - vectors[:, place] * (vectors[:, place] @ found.vector[:, 0])
        assert float(error.norm()) < 1e-6


def test_a_gram_matrix_that_float32_makes_singular_has_no_pair_at_the_bottom():
    assert pairs(with_spectrum(geometric(1e5, SIZE), 700))[1] is None


def test_an_inverse_that_float32_does_not_hold_has_no_pair_at_the_bottom():
    assert pairs(with_spectrum(geometric(1e3, SIZE), 700))[1] is None


@pytest.mark.parametrize(
    ("rank", "function"), [(1, "r_well"), *((rank, function) for rank in (3, SIZE - 1) for function in FUNCTIONS)]
)
def test_rank_deficient_features_give_what_float64_gives(rank, function, monkeypatch):
    u, v = orthonormal(700, rank, seed=1), orthonormal(SIZE, rank, seed=2)
    features = ((u * torch.linspace(2.0, 1.0, rank).double()) @ v.mT).float()
    value, gradient = value_and_gradient(FUNCTIONS[function], features)
    monkeypatch.setattr(mixed, "SINGLE_LIMIT", SIZE)
    expected, expected_gradient = value_and_gradient(FUNCTIONS[function], features)
    assert float(value) == pytest.approx(float(expected), rel=1.2e-7)
    assert relative_error(gradient.double(), expected_gradient.double()) < 6e-7


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3])
def test_r_well_near_perfect_conditioning_loses_nothing_by_cancellation(spread):
    features = with_spectrum(1 + spread * torch.linspace(0.0, 1.0, SIZE).double().flip(0), 700)
    assert_as_in_float64(hessian_r_well, features)


# ---- range and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-9, -6, 5, 8])
@pytest.mark.parametrize("function", ["scale-free r_well", "scale-free r_ill"])
def test_features_of_any_scale_are_served(exponent, function):
    features = 10.0**exponent * FEATURES["independent, N > D"]
    value, gradient = value_and_gradient(FUNCTIONS[function], features)
    expected, expected_gradient = value_and_gradient(FUNCTIONS[function], features.double())
    assert float(value) == pytest.approx(float(expected), rel=1.2e-7)
    assert relative_error(10.0**exponent * gradient.double(), 10.0**exponent * expected_gradient) < 6e-7


def test_squares_that_overflow_in_float32_alone_are_no_error():
    features = 1e20 * FEATURES["independent, N > D"]
    value = hessian_r_well(features.double())
    assert math.isfinite(float(value))
    assert float(hessian_r_well(features, scale_free=True)) == pytest.approx(
        float(hessian_r_well(features.double(), scale_free=True)), rel=1.2e-7
    )


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_entry_that_is_not_finite_is_named(function, bad):
    features = FEATURES["independent, N > D"].clone()
    features[3, 2] = bad
    with pytest.raises(NonFiniteError, match=r"row 3, column 2"):
        FUNCTIONS[function](features)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_features_of_zeros_are_refused(function):
    with pytest.raises(RankError, match="Check that the network is not dead"):
        FUNCTIONS[function](torch.zeros(700, SIZE))


def test_r_ill_at_perfect_conditioning_is_refused():
    with pytest.raises(PerfectConditioningError):
        hessian_r_ill(3 * orthonormal(700, SIZE, seed=0).float())


def test_features_are_left_as_they_were():
    features = FEATURES["independent, N > D"].clone()
    for function in FUNCTIONS.values():
        value_and_gradient(function, features)
    assert torch.equal(features, FEATURES["independent, N > D"])
