"""Extreme pairs without a full decomposition: right where they are given, not given where nothing proves them."""

import pytest
import torch
from matrices import gaussian, geometric, orthonormal, relative_error, value_and_gradient, with_singular_values

from hf_immunize.spectra import extremes, krylov, mixed
from hf_immunize.spectra.extremes import bottom_of_full_rank, hessian_spectrum
from hf_immunize.spectra.krylov import cholesky, largest_pair, smallest_pair
from hf_immunize.spectra.log_kappa import hessian_log_kappa
from hf_immunize.spectra.regularizers import hessian_r_ill, hessian_r_well, spectral_concentration
from hf_immunize.spectra.small_side import small_gram, small_side


SIZE = 400  # beyond the sizes up to which the full decomposition is used


def psd(values, seed=0):
    values = torch.as_tensor(values, dtype=torch.float64)
    vectors = orthonormal(len(values), len(values), seed)
    return (vectors * values) @ vectors.mT, vectors


def sine(found, true):
    return float((found[:, 0] - true * (true @ found[:, 0])).norm())


# From wide spectra to near repetitions; the last entry is the smallest.
BOTTOMS = {
    "gap of a tenth": [0.5, 0.45],
    "gap of a millionth": [0.5, 0.5 - 1e-6],
    "three within a millionth": [0.5 + 1e-6, 0.5 + 5e-7, 0.5],
    "five within a thousandth": [0.5 + i * 2e-4 for i in range(4, -1, -1)],
}


@pytest.mark.parametrize("name", BOTTOMS)
@pytest.mark.parametrize("accuracy", [1e-8, 1e-12])
def test_the_smallest_pair_is_right_or_not_given(name, accuracy):
    bottom = torch.tensor(BOTTOMS[name], dtype=torch.float64)
    values = torch.cat([torch.linspace(3.0, 0.6, SIZE - len(bottom), dtype=torch.float64), bottom])
    matrix, vectors = psd(values)
    found = smallest_pair(matrix, accuracy)
    if found is None:
        assert name != "gap of a tenth" or accuracy < 1e-10
    else:
        assert found.value == pytest.approx(float(bottom[-1]), rel=1e-12)
        gap = float(bottom[-2] - bottom[-1])
        assert sine(found.vector, vectors[:, -1]) < max(2 * accuracy, 1e-13 / gap)


@pytest.mark.parametrize("repeats", [2, 3, 4, 7])
def test_a_repeated_smallest_value_is_not_taken_for_a_simple_one(repeats):
    values = torch.cat([torch.linspace(3.0, 0.6, SIZE - repeats), torch.full((repeats,), 0.5)])
    assert smallest_pair(psd(values)[0], 1e-8) is None


@pytest.mark.parametrize("repeats", [2, 3, 4, 7])
def test_a_repeated_largest_value_is_not_taken_for_a_simple_one(repeats):
    values = torch.cat([torch.full((repeats,), 3.0), torch.linspace(2.0, 0.5, SIZE - repeats)])
    assert largest_pair(psd(values)[0], 1e-8) is None


@pytest.mark.parametrize("second", [2.99, 2.999, 2.99999])
@pytest.mark.parametrize("accuracy", [1e-8, 1e-12])
def test_a_largest_pair_of_a_small_gap_is_right_or_not_given(second, accuracy):
    matrix, vectors = psd(torch.cat([torch.tensor([3.0]), torch.linspace(second, 0.5, SIZE - 1)]))
    found = largest_pair(matrix, accuracy)
    if found is not None:
        assert found.value == pytest.approx(3.0, rel=1e-12)
        assert sine(found.vector, vectors[:, 0]) < max(2 * accuracy, 1e-13 / (3.0 - second))


@pytest.mark.parametrize("seed", range(3))
def test_independent_gaussian_features_need_no_full_decomposition(seed, monkeypatch):
    sizes, solve = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: sizes.append(a.shape[0]) or solve(a))
    features = gaussian(700, 512, seed, dtype=torch.float32).requires_grad_()
    (hessian_r_well(features) + hessian_r_ill(features)).backward()
    assert max(sizes) < 100


@pytest.mark.parametrize("matrix", [torch.eye(SIZE).double(), torch.zeros(SIZE, SIZE).double()], ids=["I", "0"])
def test_matrices_with_one_eigenvalue_give_no_pair(matrix):
    assert largest_pair(matrix, 1e-8) is None
    assert smallest_pair(matrix, 1e-8) is None


def test_an_indefinite_matrix_has_no_smallest_pair():
    assert smallest_pair(psd(torch.linspace(3.0, -0.1, SIZE))[0], 1e-8) is None


@pytest.mark.parametrize("size", [1, 127, 128, 129, 300])
def test_the_cholesky_factor_by_blocks_is_the_factor(size):
    matrix = psd(torch.linspace(3.0, 0.5, size))[0]
    assert relative_error(cholesky(matrix.clone()).tril(), torch.linalg.cholesky(matrix)) < 1e-13


@pytest.mark.parametrize("place", [0, 127, 128, 299])
def test_a_matrix_that_is_indefinite_in_any_block_has_no_cholesky_factor(place):
    matrix = torch.eye(300, dtype=torch.float64)
    matrix[place, place] = -1e-3
    assert cholesky(matrix) is None


@pytest.mark.parametrize("seed", range(2))
def test_a_bottom_too_close_for_one_space_is_found_by_shifts(seed, monkeypatch):
    # A thousandth of the spread lies between the smallest values: 28 steps on the inverse do not tell them apart.
    values = torch.cat([torch.linspace(3.0, 0.503, SIZE - 1).double(), torch.tensor([0.5]).double()])
    matrix, vectors = psd(values, seed)
    factors, factorize = [], krylov.cholesky
    monkeypatch.setattr(krylov, "cholesky", lambda a: factors.append(a) or factorize(a))
    found = smallest_pair(matrix, 1e-8)
    assert len(factors) > 1
    assert found is not None
    assert found.value == pytest.approx(0.5, rel=1e-12)
    assert sine(found.vector, vectors[:, -1]) < 2e-8


# ---- the rank decides whether the smallest value is σ_k -------------------------------------------------------------


FAMILIES = {
    "independent, N > D": (gaussian(900, SIZE), SIZE),
    "independent, N < D": (gaussian(SIZE, 900), SIZE),
    "independent, N = D": (gaussian(SIZE, SIZE), SIZE),
    "κ = 1e2": (with_singular_values(geometric(1e2, SIZE), 500, SIZE), SIZE),
    "κ = 1e4": (with_singular_values(geometric(1e4, SIZE), 500, SIZE), SIZE),
    "κ = 1e2, rank deficient by one": (with_singular_values(geometric(1e2, SIZE - 1), 500, SIZE), SIZE - 1),
    "rank of a half": (with_singular_values(geometric(1e2, SIZE // 2), 500, SIZE), SIZE // 2),
    "a repeated sample": (torch.cat([gaussian(SIZE - 1, 900), gaussian(SIZE - 1, 900)[:1]]), SIZE - 1),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bottom_pair_of_a_gram_matrix_is_that_of_the_singular_values(name):
    features, rank = FAMILIES[name]
    features = features.float()
    side = small_side(features)
    found = bottom_of_full_rank(side, 1e-8)
    assert len(hessian_spectrum(side).values) == rank
    if rank < SIZE:
        assert found is None
    elif found is not None:
        expected = torch.linalg.svdvals(features.double())[rank - 1].square()
        assert found.value == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("function", [hessian_r_well, hessian_r_ill, spectral_concentration, hessian_log_kappa])
@pytest.mark.parametrize("name", FAMILIES)
def test_float32_features_give_what_the_full_decomposition_gives(function, name, monkeypatch):
    features = FAMILIES[name][0].float()
    value, gradient = value_and_gradient(function, features)
    monkeypatch.setattr(extremes, "TOP_DENSE_LIMIT", SIZE)
    monkeypatch.setattr(extremes, "BOTTOM_DENSE_LIMIT", SIZE)
    monkeypatch.setattr(mixed, "SINGLE_LIMIT", SIZE)
    expected, expected_gradient = value_and_gradient(function, features)
    assert float(value) == pytest.approx(float(expected), rel=1.2e-7)
    assert relative_error(gradient, expected_gradient.double()) < 1e-6


def test_a_value_below_the_rounding_of_float32_features_is_not_a_bottom():
    sigma = geometric(1e2, SIZE)
    sigma[-1] = 3e-7
    features = with_singular_values(sigma, 900, SIZE)
    side = small_side(features)._replace(dtype=torch.float32)
    assert smallest_pair(side.gram, 1e-8, slack=1.0) is not None
    assert bottom_of_full_rank(side, 1e-8, slack=1.0) is None


def test_the_slack_of_r_ill_costs_its_gradient_nothing():
    # The smallest value is a millionth of the mean, where the vector may be 1e-5 off.
    features = with_singular_values(geometric(2e3, SIZE), 500, SIZE).float()
    squares = small_gram(features).square().sum()
    side = small_side(features)
    slack = float(squares / side.gram.trace()) / SIZE
    assert bottom_of_full_rank(side, 1e-8, slack) is not None
    _, gradient = value_and_gradient(hessian_r_ill, features)
    _, expected = value_and_gradient(hessian_r_ill, features.double())
    assert relative_error(gradient, expected) < 1e-6
