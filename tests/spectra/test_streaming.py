import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import gaussian, geometric, with_singular_values
from safetensors.torch import load_file, save_file

from hf_immunize.errors import ArgumentError, NonFiniteError, RankError, ShapeError
from hf_immunize.spectra.conditioning import feature_conditioning
from hf_immunize.spectra.streaming import FeatureFactor


properties = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 2**20)


def streamed(features, batch=37, block_rows=None):
    factor = FeatureFactor(block_rows)
    for rows in features.split(batch):
        factor.update(rows)
    return factor


def largest_difference(factor, features):
    """Of the singular values, relative to the largest."""
    expected = torch.linalg.svdvals(features.double())
    return float((factor.singular_values() - expected).abs().max() / expected[0])


def test_ill_conditioned_features_keep_their_kappa_where_the_squared_matrix_loses_it():
    features = with_singular_values(geometric(1e7, 48), 3000, 48, seed=1)
    factor = streamed(features, batch=256, block_rows=100)
    assert factor.conditioning().kappa == pytest.approx(1e14, rel=1e-6)
    gram = sum(rows.mT @ rows for rows in features.split(256))
    eigenvalues = torch.linalg.eigvalsh(gram)
    assert float(eigenvalues[-1] / eigenvalues[0]) != pytest.approx(1e14, rel=1e-4)


@properties
@given(rows=st.integers(1, 60), columns=st.integers(1, 12), block=st.integers(1, 40), data=st.data(), seed=seeds)
def test_any_split_of_the_rows_and_any_block_give_the_same_singular_values(rows, columns, block, data, seed):
    features = gaussian(rows, columns, seed)
    cuts = sorted(data.draw(st.sets(st.integers(1, rows), max_size=8)) - {rows})
    factor = FeatureFactor(block)
    for start, stop in zip([0, *cuts], [*cuts, rows], strict=True):
        factor.update(features[start:stop])
    assert factor.num_samples == rows
    assert largest_difference(factor, features) < 1e-12
    centred = torch.linalg.svdvals(features - features.mean(dim=0))[: rows - 1]
    torch.testing.assert_close(factor.singular_values(intercept=True), centred, rtol=0, atol=1e-12)


@properties
@given(parts=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(sum), columns=st.integers(1, 12), seed=seeds)
def test_merged_factors_are_the_factor_of_all_rows(parts, columns, seed):
    features = gaussian(sum(parts), columns, seed)
    whole = FeatureFactor()
    for rows in features.split(parts):
        part = FeatureFactor(block_rows=5)
        whole.merge(part.update(rows) if len(rows) else part)
    assert whole.num_samples == sum(parts)
    assert largest_difference(whole, features) < 1e-12
    if len(features) > columns:
        expected = feature_conditioning(features, intercept=True)
        assert whole.conditioning(intercept=True).kappa == pytest.approx(expected.kappa, rel=1e-9)


def test_a_factor_merged_with_itself_holds_every_row_twice():
    assert FeatureFactor().merge(FeatureFactor()).num_samples == 0
    features = gaussian(50, 6)
    factor, other = streamed(features), streamed(features)
    assert torch.equal(FeatureFactor().merge(other).singular_values(), other.singular_values())
    assert other.num_samples == 50
    factor.merge(factor)
    assert factor.num_samples == 100
    assert largest_difference(factor, torch.cat([features, features])) < 1e-12


def test_thousands_of_folds_do_not_turn_rounding_into_rank():
    features = gaussian(8000, 3) @ gaussian(3, 16, seed=1) + 5.0
    factor = FeatureFactor(block_rows=1).update(features)
    assert factor.conditioning().rank == 4
    assert FeatureFactor.from_state_dict(factor.state_dict()).conditioning().rank == 4
    assert FeatureFactor().merge(factor).conditioning().rank == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_state_survives_safetensors(tmp_path, dtype):
    features = gaussian(90, 6, dtype=dtype)
    factor, found = streamed(features[:4]), streamed(features).conditioning()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert streamed(features).conditioning() == found
    expected = feature_conditioning(features)
    assert (found.rank, found.num_samples, found.dim) == (expected.rank, 90, 6)
    assert (found.kappa, found.cutoff) == pytest.approx((expected.kappa, expected.cutoff), rel=1e-9)
    save_file(factor.state_dict(), tmp_path / "factor.safetensors")
    restored = FeatureFactor.from_state_dict(load_file(tmp_path / "factor.safetensors"))
    assert (restored.produced_dtype, restored.num_samples) == (dtype, 4)
    restored.update(features[4:])
    assert largest_difference(restored, features) < 1e-12
    expected = feature_conditioning(features, intercept=True)
    assert restored.conditioning(intercept=True).kappa == pytest.approx(expected.kappa, rel=1e-9)


def test_a_batch_with_an_entry_that_is_not_finite_is_named_and_not_taken_in():
    features = gaussian(90, 6)
    factor, batch = streamed(features), gaussian(5, 6)
    batch[2, 4] = math.nan
    with pytest.raises(NonFiniteError, match=r"batch after 90 rows.* row 2, column 4 .*Check the data"):
        factor.update(batch)
    assert factor.num_samples == 90
    assert largest_difference(factor, features) < 1e-12
    factor = FeatureFactor()
    with pytest.raises(NonFiniteError):
        factor.update(torch.full((2, 5), math.nan))
    assert factor.update(gaussian(20, 3)).dim == 3


def test_what_was_read_before_does_not_stay_when_rows_follow():
    features = gaussian(60, 6, seed=3)
    factor = streamed(features[:40])
    factor.singular_values().zero_()
    assert largest_difference(factor, features[:40]) < 1e-12
    assert largest_difference(factor.update(features[40:]), features) < 1e-12
    assert largest_difference(factor.merge(streamed(features[:40])), torch.cat([features, features[:40]])) < 1e-12


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: streamed(gaussian(90, 6)).update(gaussian(5, 7)), ShapeError),
        (lambda: streamed(gaussian(90, 6)).merge(gaussian(90, 6)), ArgumentError),
        (lambda: streamed(gaussian(90, 6)).conditioning(streamed(gaussian(80, 6))), ShapeError),
        (lambda: FeatureFactor.from_state_dict({}), ArgumentError),
        (lambda: FeatureFactor().conditioning(), RankError),
    ],
)
def test_what_does_not_fit_is_a_named_error(call, error):
    with pytest.raises(error):
        call()


def test_memory_does_not_grow_with_the_rows_and_long_batches_are_taken_in_parts():
    few, many = streamed(gaussian(100, 8), batch=50), streamed(gaussian(5000, 8), batch=50)
    assert few._buffer.shape == many._buffer.shape
    features = gaussian(2500, 7)
    for block in (None, 3, 1000):
        assert largest_difference(FeatureFactor(block).update(features), features) < 1e-12


def test_the_coarsest_dtype_of_all_batches_decides_the_rank():
    single = (gaussian(900, 11) @ gaussian(11, 40, seed=1)).float()
    assert streamed(single).conditioning().rank == 11
    factor = FeatureFactor()
    for rows in single.double().split(100):
        factor.update(rows, produced_dtype=torch.float32)
    assert factor.conditioning().rank == 11
    assert streamed(single.double()).conditioning().rank == 40
    for order in (1, -1):
        factor = FeatureFactor()
        for dtype in (torch.float64, torch.float32, torch.bfloat16)[::order]:
            factor.update(gaussian(5, 3, dtype=dtype))
        assert factor.produced_dtype == torch.bfloat16
