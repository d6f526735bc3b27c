import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import gaussian, geometric, orthonormal, with_singular_values

from hf_immunize.errors import ShapeError
from hf_immunize.spectra.conditioning import condition_number, feature_conditioning, rank_cutoff
from hf_immunize.spectra.streaming import FeatureFactor


properties = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**20)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (20, 20)])
@pytest.mark.parametrize("kappa", [1.0, 30.0, 1e7])
def test_kappa_of_the_hessian_is_the_squared_ratio_of_singular_values(shape, kappa):
    features = with_singular_values(3 * geometric(kappa, min(shape)), *shape)
    assert feature_conditioning(features).kappa == pytest.approx(kappa**2, rel=1e-6)
    assert condition_number(features) == pytest.approx(kappa, rel=1e-6)


def test_the_fields_describe_the_features():
    conditioning = feature_conditioning(with_singular_values([4.0, 2.0, 1.0], 9, 5))
    assert (conditioning.rank, conditioning.num_samples, conditioning.dim) == (3, 9, 5)
    assert conditioning.sigma_max == pytest.approx(4.0)
    assert conditioning.sigma_min == pytest.approx(1.0)
    assert conditioning.log_kappa == pytest.approx(math.log(16.0))
    assert conditioning.log10_kappa == pytest.approx(math.log10(16.0))
    assert not conditioning.is_bound and conditioning.reference_rank is None
    shares = np.array([4.0, 2.0, 1.0]) / 7
    assert conditioning.effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    # A share that underflows does not count.
    assert feature_conditioning(torch.diag(torch.tensor([1e10, 5e-324]).double())).effective_rank == 1.0


@properties
@given(rows=st.integers(1, 8), columns=st.integers(1, 8), rank=st.integers(1, 8), e=st.integers(-30, 30), seed=seeds)
def test_kappa_and_rank_do_not_change_with_scale_or_rotations_of_either_side(rows, columns, rank, e, seed):
    features = with_singular_values(geometric(100.0, min(rows, columns, rank)), rows, columns, seed)
    turned = orthonormal(rows, rows, seed + 2) @ features @ orthonormal(columns, columns, seed + 3)
    before, after = feature_conditioning(features), feature_conditioning(10.0**e * turned)
    assert after.kappa == pytest.approx(before.kappa, rel=1e-9)
    assert after.rank == before.rank == min(rows, columns, rank)


# Plain, around a large mean (σ_max far above the rest), and with columns of very different size.
def plain(rows, columns, rank, seed):
    return gaussian(rows, rank, seed) @ gaussian(rank, columns, seed + 1)


def non_centred(rows, columns, rank, seed):
    return plain(rows, columns, rank - 1, seed) + 20 * torch.ones(rows, 1, dtype=torch.float64)


def badly_scaled(rows, columns, rank, seed):
    return plain(rows, columns, rank, seed) * torch.logspace(0, -2, columns, dtype=torch.float64)


@pytest.mark.parametrize("build", [plain, non_centred, badly_scaled])
@pytest.mark.parametrize("shape", [(300, 60), (60, 300), (200, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounded_features_have_the_rank_they_had(build, shape, dtype):
    features = build(*shape, 17, 5)
    assert feature_conditioning(features.to(dtype)).rank == 17


def test_a_cast_to_float64_does_not_hide_where_the_features_come_from():
    cast = plain(300, 60, 17, 5).float().double()
    assert feature_conditioning(cast, produced_dtype=torch.float32).rank == 17
    assert feature_conditioning(cast).rank == 60
    assert feature_conditioning(cast, reference=cast, produced_dtype=torch.float32).reference_rank == 17


def test_the_cut_off_is_ten_times_the_larger_of_features_and_decompositions_rounding():
    noise = torch.finfo(torch.float32).eps * (math.sqrt(100) + math.sqrt(25)) * 7.0 / math.sqrt(2500)
    assert rank_cutoff(1.0, 7.0, 100, 25, torch.float32) == pytest.approx(10 * noise)
    # The rounding of the decomposition grows with the root of the size.
    eps = torch.finfo(torch.float64).eps
    assert rank_cutoff(1.0, 0.01, 100, 100, torch.float64) == pytest.approx(10 * eps, rel=1e-12)
    assert rank_cutoff(1.0, 1.0, 10**4, 10**4, torch.float64) == pytest.approx(100 * eps, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_an_intercept_the_constant_direction_of_a_layer_norm_counts_for_nothing(dtype):
    """It is the smallest singular value of the features, whatever the images; a probe's rank is without it."""
    norm = torch.nn.LayerNorm(16, dtype=dtype)
    torch.nn.init.normal_(norm.weight, 1.0, 0.2, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(norm.bias, 0.0, 1e-4, generator=torch.Generator().manual_seed(1))
    features = norm(gaussian(200, 16, dtype=dtype)).detach()
    plain, found = feature_conditioning(features), feature_conditioning(features, intercept=True)
    assert (plain.rank, found.rank, found.intercept) == (16, 15, True)
    # Which is said, of these alone: not with an intercept, not of features that a norm never touched, nor of few.
    others = found, feature_conditioning(gaussian(50, 16)), feature_conditioning(features[:16])
    assert plain.set_by_norm and not any(each.set_by_norm for each in others)
    assert FeatureFactor().update(features[:20]).update(features[20:]).conditioning().set_by_norm
    values = torch.linalg.svdvals(features.double() - features.double().mean(dim=0))[:15]
    assert found.kappa == pytest.approx(float(values[0] / values[-1]) ** 2, rel=1e-4)
    assert plain.kappa > 1e5 * found.kappa


def test_collapse_is_a_bound_at_the_cut_off_against_a_reference_alone():
    reference = gaussian(50, 6, seed=1)
    features = reference * torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=torch.float64)
    bound = feature_conditioning(features, reference=reference)
    assert (bound.is_bound, bound.rank, bound.reference_rank) == (True, 3, 6)
    assert feature_conditioning(features, reference=feature_conditioning(reference)) == bound
    assert bound.kappa == pytest.approx((bound.sigma_max / bound.cutoff) ** 2)
    assert str(bound).startswith("κ ≥ ") and "rank 3 of 6 before" in str(bound)
    alone = feature_conditioning(features)
    assert not alone.is_bound and alone.kappa == pytest.approx((alone.sigma_max / alone.sigma_min) ** 2)
    # Collapse to one direction does not read as perfect conditioning; the same rank changes nothing.
    one = torch.outer(reference[:, 0], reference[0])
    assert feature_conditioning(one).kappa == pytest.approx(1.0)
    assert feature_conditioning(one, reference=reference).kappa > 1e20
    other = gaussian(50, 6, seed=2)
    assert feature_conditioning(other, reference=reference).kappa == feature_conditioning(other).kappa
    for shape in ((50, 5), (49, 6)):
        with pytest.raises(ShapeError, match=str(shape[0])):
            feature_conditioning(reference, reference=gaussian(*shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_arrays_gradients_and_autocast_change_nothing(dtype):
    features = gaussian(40, 10, dtype=dtype)
    expected = feature_conditioning(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert feature_conditioning(features.clone().requires_grad_()) == expected
    if dtype != torch.bfloat16:
        assert feature_conditioning(features.numpy()) == expected
        assert condition_number(features.numpy()) == condition_number(features)
    assert feature_conditioning(plain(300, 60, 3, 5).to(dtype)).rank == 3
    # Large, and their sum beyond the dtype, but finite.
    assert math.isfinite(feature_conditioning((6e4 * torch.sign(gaussian(64, 8))).to(dtype)).kappa)
