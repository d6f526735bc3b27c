import pytest
import torch
from matrices import gaussian, geometric, orthonormal, with_singular_values

from hf_immunize.errors import NonFiniteError, RankError
from hf_immunize.spectra import extremes
from hf_immunize.spectra.extremes import hessian_spectrum, top_eigenspace
from hf_immunize.spectra.krylov import tie_tolerance
from hf_immunize.spectra.small_side import small_gram, small_side


def psd(values, seed=0):
    """A random positive semi-definite matrix with these eigenvalues, and its eigenvectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    vectors = orthonormal(len(values), len(values), seed)
    return (vectors * values) @ vectors.mT, vectors


@pytest.fixture
def decompositions(monkeypatch):
    """Sizes of the symmetric eigenproblems solved."""
    sizes, solve = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: sizes.append(a.shape[0]) or solve(a))
    return sizes


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_the_small_gram_matrix_shares_the_spectrum(shape):
    features = gaussian(*shape)
    gram = small_gram(features)
    assert gram.shape == (min(shape), min(shape))
    expected = torch.linalg.svdvals(features).square().flip(0)
    assert torch.allclose(torch.linalg.eigvalsh(gram), expected, rtol=1e-10)


@pytest.mark.parametrize(("second", "accuracy"), [(0.8, 1e-8), (0.6, 1e-12), (0.1, 1e-12)])
def test_a_large_matrix_with_a_gap_needs_no_full_decomposition(decompositions, second, accuracy):
    gram, vectors = psd(torch.cat([torch.tensor([1.0]), torch.linspace(second, 0.0, 399)]))
    value, basis = top_eigenspace(gram, accuracy)
    assert max(decompositions) < 100
    assert value == pytest.approx(1.0, rel=1e-12)
    assert float((basis[:, 0] - vectors[:, 0] * (vectors[:, 0] @ basis[:, 0])).norm()) < max(accuracy, 1e-13)


def test_features_around_a_mean_need_no_full_decomposition(decompositions):
    top_eigenspace(small_gram((2 + gaussian(700, 768) * geometric(1e3, 768)).float()))
    assert max(decompositions) < 100


@pytest.mark.parametrize("size", [40, 400], ids=["dense", "beyond the dense limit"])
@pytest.mark.parametrize("repeats", [2, 3, 4, 7])
def test_a_repeated_top_value_gives_its_whole_eigenspace(size, repeats):
    values = torch.cat([torch.ones(repeats), torch.linspace(0.8, 0.0, size - repeats)])
    gram, vectors = psd(values)
    value, basis = top_eigenspace(gram)
    assert value == pytest.approx(1.0, rel=1e-12)
    assert basis.shape == (size, repeats)
    expected = vectors[:, :repeats] @ vectors[:, :repeats].mT
    assert float((basis @ basis.mT - expected).norm()) < 1e-10


@pytest.mark.parametrize("gap", [1e-4, 1e-8, 1e-11])
def test_a_tiny_gap_gives_the_one_vector(gap):
    values = torch.cat([1 - gap * torch.tensor([0.0, 1, 1]).double(), torch.linspace(0.8, 0.0, 397).double()])
    _, basis = top_eigenspace(torch.diag(values))
    assert basis.shape == (400, 1)
    assert float(basis[1:].norm()) < 1e-8


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.3])
@pytest.mark.parametrize("size", [10, 400])
def test_the_identity_has_one_eigenspace(size, scale):
    _, basis = top_eigenspace(scale * torch.eye(size, dtype=torch.float64))
    assert basis.shape == (size, size)


@pytest.mark.parametrize("rank", [1, 2, 5, 11, 12, 13])
def test_a_matrix_of_lower_rank_than_the_krylov_space(rank):
    values = torch.zeros(400, dtype=torch.float64)
    values[:rank] = torch.linspace(2.0, 1.0, rank)
    gram, vectors = psd(values)
    value, basis = top_eigenspace(gram)
    assert value == pytest.approx(2.0, rel=1e-12)
    assert float((basis @ basis.mT - torch.outer(vectors[:, 0], vectors[:, 0])).norm()) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_the_hessian_spectrum_has_the_rank_and_the_eigenvectors(shape, dtype):
    features = with_singular_values([5.0, 3.0, 2.0, 0.5], *shape).to(dtype)
    values, vectors = hessian_spectrum(small_side(features))
    assert values == pytest.approx([25.0, 9.0, 4.0, 0.25], rel=1e-5)
    gram = small_gram(features)
    kept = vectors[:, :4]
    assert float((gram @ kept - kept * torch.tensor(values)).norm()) < 1e-6 * values[0]


def test_float64_features_keep_directions_that_the_gram_matrix_loses():
    features = with_singular_values(geometric(1e10, 8), 30, 8)
    values, _ = hessian_spectrum(small_side(features))
    assert len(values) == 8
    assert values[-1] == pytest.approx(1e-20, rel=1e-4)


def test_the_tolerance_for_ties_is_that_of_the_decomposition():
    values = torch.linalg.eigvalsh(psd(torch.ones(300))[0])
    assert float(values[-1] - values[0]) < tie_tolerance(300, 1.0)


def test_zero_features_are_refused():
    with pytest.raises(RankError, match="Check that the network is not dead"):
        small_side(torch.zeros(3, 4))


def test_features_that_overflow_when_squared_are_refused():
    with pytest.raises(NonFiniteError, match="Divide them by their scale"):
        small_side(torch.full((3, 4), 1e160, dtype=torch.float64))


def test_the_result_does_not_depend_on_the_global_generator():
    gram, _ = psd(torch.linspace(1.0, 0.0, 400))
    torch.manual_seed(1)
    _, first = extremes.top_eigenspace(gram)
    torch.manual_seed(2)
    _, second = extremes.top_eigenspace(gram)
    assert torch.equal(first, second)
