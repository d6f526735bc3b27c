import math

import pytest
import torch
from matrices import gaussian, geometric, with_singular_values

from hf_immunize.errors import NonFiniteError, ProtocolError, RankError, ShapeError
from hf_immunize.spectra.conditioning import feature_conditioning
from hf_immunize.spectra.ratio import _groups, reference_condition_number, relative_immunization_ratio
from hf_immunize.spectra.streaming import FeatureFactor


NAMES = ("harmful", "harmful_reference", "benign", "benign_reference")
KAPPAS = (1e3, 1e1, 2e1, 1e2)  # of Z: (i) = 1e4, (ii) = 0.04


def tasks(rows=(60, 50), dim=8):
    counts = (rows[0], rows[0], rows[1], rows[1])
    return {
        name: with_singular_values(geometric(kappa, dim), count, dim, seed=index)
        for index, (name, kappa, count) in enumerate(zip(NAMES, KAPPAS, counts, strict=True))
    }


def collapse(features):
    return features * (torch.arange(features.shape[1]) < 3)


def test_exact_is_the_quotient_of_the_two_ratios():
    ratio = relative_immunization_ratio(**tasks())
    assert ratio.harmful_ratio == pytest.approx(1e4, rel=1e-9)
    assert ratio.benign_ratio == pytest.approx(0.04, rel=1e-9)
    assert ratio.rir == pytest.approx(2.5e5, rel=1e-9)
    assert ratio.log10_rir == pytest.approx(math.log10(2.5e5), rel=1e-9)
    assert (ratio.std, ratio.bound, ratio.protocol) == (None, None, "exact")


@pytest.mark.parametrize("scale", [1e-3, 1.5, 1e3])
def test_exact_does_not_change_with_the_scale_of_the_features(scale):
    features = tasks()
    before = relative_immunization_ratio(**features).rir
    features["harmful"] = scale * features["harmful"]
    assert relative_immunization_ratio(**features).rir == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize("convert", [lambda z: FeatureFactor().update(z), feature_conditioning])
@pytest.mark.parametrize("names", [NAMES, ("harmful_reference",)])
def test_features_their_factors_and_conditionings_agree(convert, names):
    features = tasks()
    found = relative_immunization_ratio(**(features | {name: convert(features[name]) for name in names}))
    expected = relative_immunization_ratio(**features)
    assert found.rir == pytest.approx(expected.rir, rel=1e-9)
    assert [getattr(expected, name).kappa for name in NAMES] == [
        feature_conditioning(features[n]).kappa for n in NAMES
    ]


# ---- bounds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensors", "factors"])
@pytest.mark.parametrize(("lost", "bound", "sign"), [(["harmful"], "lower", "RIR ≥"), (["benign"], "upper", "RIR ≤")])
def test_lost_rank_makes_the_ratio_a_bound(lost, bound, sign, kind):
    features = tasks()
    for name in lost:
        features[name] = collapse(features[f"{name}_reference"])
    if kind == "factors":
        features = {name: FeatureFactor().update(z) for name, z in features.items()}
    ratio = relative_immunization_ratio(**features)
    assert ratio.bound == bound
    assert str(ratio).startswith(sign)
    # Lost harmful rank counts for immunization, lost benign rank against it.
    assert ratio.rir > 1e20 if bound == "lower" else ratio.rir < 1e-10


@pytest.mark.parametrize("options", [{}, {"protocol": "groups", "num_groups": 3, "group_size": 20}])
def test_rank_lost_on_both_sides_makes_no_statement(options):
    features = tasks()
    for name in ("harmful", "benign"):
        features[name] = collapse(features[f"{name}_reference"])
    ratio = relative_immunization_ratio(**features, **options)
    assert ratio.bound == "undetermined"
    assert math.isnan(ratio.rir) and math.isnan(ratio.log10_rir)
    assert "undetermined" in str(ratio)


def test_a_bound_in_one_group_makes_the_mean_a_bound():
    features = tasks()
    features["harmful"] = collapse(features["harmful_reference"])
    assert relative_immunization_ratio(**features, protocol="groups", num_groups=3, group_size=20).bound == "lower"


def test_a_conditioning_that_hides_lost_rank_is_refused():
    features = tasks()
    features["harmful"] = feature_conditioning(collapse(features["harmful_reference"]))
    with pytest.raises(ProtocolError, match=r"Call feature_conditioning\(Z, reference="):
        relative_immunization_ratio(**features)


def test_a_conditioning_taken_against_a_reference_of_lower_rank_is_refused():
    features = tasks()
    lost = collapse(features["harmful_reference"])
    features["harmful"] = feature_conditioning(lost, reference=lost)
    with pytest.raises(ProtocolError, match=r"Call feature_conditioning\(Z, reference="):
        relative_immunization_ratio(**features)


def test_a_conditioning_taken_with_its_reference_carries_the_bound():
    features = tasks()
    lost = collapse(features["harmful_reference"])
    features["harmful"] = feature_conditioning(lost, reference=features["harmful_reference"])
    assert relative_immunization_ratio(**features).bound == "lower"


# ---- groups --------------------------------------------------------------------------------------------------------


def test_groups_are_the_mean_and_deviation_over_the_same_rows_of_both():
    # One group of all rows is a permutation of them: κ is that of all rows.
    features = tasks(rows=(40, 40))
    exact = relative_immunization_ratio(**features)
    ratio = relative_immunization_ratio(**features, protocol="groups", num_groups=2, group_size=40)
    assert ratio.rir == pytest.approx(exact.rir, rel=1e-9)
    assert ratio.std == pytest.approx(0.0, abs=1e-6 * exact.rir)


def test_groups_draw_the_same_rows_of_features_and_reference():
    # Were the rows different ones, features equal to their reference would not have ratio one in every group.
    harmful, benign = gaussian(90, 6), gaussian(80, 6, seed=1)
    ratio = relative_immunization_ratio(
        harmful=harmful, harmful_reference=harmful, benign=benign, benign_reference=benign, protocol="groups",
        group_size=20,
    )  # fmt: skip
    assert (ratio.rir, ratio.std) == (1.0, 0.0)


def test_groups_do_not_overlap_while_the_rows_last():
    groups = _groups(rows=43, num_groups=4, group_size=10, seed=0)
    assert len(torch.cat(groups).unique()) == 40


def test_there_may_be_more_groups_than_the_rows_last_for():
    groups = _groups(rows=43, num_groups=9, group_size=10, seed=0)
    assert [len(rows.unique()) for rows in groups] == [10] * 9


def test_groups_are_drawn_by_the_seed_alone():
    features = tasks()
    options = {"protocol": "groups", "num_groups": 5, "group_size": 20}
    torch.manual_seed(1)
    first = relative_immunization_ratio(**features, **options, seed=7)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert relative_immunization_ratio(**features, **options, seed=7) == first
    assert relative_immunization_ratio(**features, **options, seed=8) != first
    assert torch.equal(torch.get_rng_state(), state)


# ---- reference protocol --------------------------------------------------------------------------------------------


def wide_pair():
    """Two 100×512 feature sets with κ(H) of 9e2 and 9e8, and largest eigenvalue 1.3e4."""
    return [
        math.sqrt(1.29e4) * with_singular_values(geometric(math.sqrt(kappa), 100), 100, 512, seed=int(kappa) % 97)
        for kappa in (9e2, 9e8)
    ]


def test_the_reference_protocol_reads_its_own_floor_where_the_gram_matrix_is_singular():
    readings = [reference_condition_number(z) for z in wide_pair()]
    assert readings == pytest.approx([1.29e10, 1.29e10], rel=0.02)


def test_exact_tells_apart_what_the_reference_protocol_does_not():
    assert [feature_conditioning(z).kappa for z in wide_pair()] == pytest.approx([9e2, 9e8], rel=1e-6)


def test_the_reference_protocol_is_right_where_the_gram_matrix_is_well_above_its_floor():
    features = 100 * with_singular_values(geometric(10.0, 8), 50, 8)
    assert reference_condition_number(features) == pytest.approx(100.0, rel=1e-6)


def test_the_reference_protocol_changes_with_scale_where_exact_does_not():
    z, _ = wide_pair()
    options = {"harmful": 1.5 * z, "harmful_reference": z, "benign": z, "benign_reference": z}
    reference = relative_immunization_ratio(**options, protocol="reference")
    assert reference.rir == pytest.approx(2.25, rel=0.02)
    assert relative_immunization_ratio(**options).rir == pytest.approx(1.0, rel=1e-9)


def test_the_reference_protocol_over_groups_has_a_deviation():
    ratio = relative_immunization_ratio(**tasks(), protocol="reference", num_groups=4, group_size=20)
    assert ratio.std > 0 and ratio.protocol == "reference"
    assert "noise-floored" in str(ratio) and f"± {ratio.std:.3g}" in str(ratio)
    assert relative_immunization_ratio(**tasks(), protocol="groups", num_groups=1, group_size=20).std is None


# ---- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["exact", "groups", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_works_and_autocast_changes_nothing(protocol, dtype):
    features = {name: gaussian(60, 8, seed=i, dtype=dtype) for i, name in enumerate(NAMES)}
    options = {"protocol": protocol, "num_groups": 3, "group_size": 30}
    expected = relative_immunization_ratio(**features, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = relative_immunization_ratio(**features, **options)
    assert math.isfinite(expected.rir)
    assert found == expected


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["groups", "reference"])
@pytest.mark.parametrize(
    "options", [{"group_size": 55}, {"group_size": 1}, {"num_groups": 0}, {"num_groups": -1}], ids=str
)
def test_impossible_groups_are_refused(protocol, options):
    with pytest.raises(ProtocolError, match="group"):
        relative_immunization_ratio(**tasks(), protocol=protocol, **{"num_groups": 3, "group_size": 20, **options})


@pytest.mark.parametrize("protocol", ["groups", "reference"])
@pytest.mark.parametrize("convert", [lambda z: FeatureFactor().update(z), feature_conditioning])
def test_groups_need_the_rows(protocol, convert):
    features = tasks()
    features["benign"] = convert(features["benign"])
    with pytest.raises(ProtocolError, match="Pass the features"):
        relative_immunization_ratio(**features, protocol=protocol)


@pytest.mark.parametrize("protocol", ["exact", "groups", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_features_and_reference_of_another_shape_are_refused(protocol, name):
    features = tasks()
    features[name] = features[name][:-1]
    with pytest.raises(ShapeError, match="Pass the same images"):
        relative_immunization_ratio(**features, protocol=protocol, group_size=20)


@pytest.mark.parametrize("convert", [lambda z: FeatureFactor().update(z), feature_conditioning])
def test_a_summary_of_other_data_than_its_reference_is_refused(convert):
    features = tasks()
    features["harmful"] = convert(features["harmful"][:-1])
    with pytest.raises(ShapeError, match="Pass the same images"):
        relative_immunization_ratio(**features)


@pytest.mark.parametrize("protocol", ["exact", "groups", "reference"])
def test_an_entry_that_is_not_finite_is_named(protocol):
    features = tasks()
    features["benign"][4, 2] = math.nan
    with pytest.raises(NonFiniteError, match="row 4, column 2"):
        relative_immunization_ratio(**features, protocol=protocol)


@pytest.mark.parametrize("protocol", ["exact", "groups", "reference"])
def test_zero_features_are_refused(protocol):
    features = tasks()
    features["harmful_reference"] = torch.zeros_like(features["harmful_reference"])
    with pytest.raises(RankError, match="Check that the network is not dead"):
        relative_immunization_ratio(**features, protocol=protocol, group_size=20)


# ---- rank gained ---------------------------------------------------------------------------------------------------


def two_directions(second):
    return torch.diag(torch.tensor([1.0, second], dtype=torch.float32))


def test_a_reference_that_is_a_bound_bounds_the_ratio():
    full, lost = two_directions(1e-1), two_directions(1e-9)
    before = feature_conditioning(lost, reference=full)
    ratio = relative_immunization_ratio(harmful=full, harmful_reference=before, benign=BENIGN, benign_reference=BENIGN)
    assert ratio.bound == "upper"


BENIGN = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float32))


def test_rank_gained_bounds_the_ratio_the_other_way():
    gained = two_directions(1e-3), two_directions(1e-9)
    harmful, benign = (
        relative_immunization_ratio(harmful=h, harmful_reference=h0, benign=b, benign_reference=b0)
        for (h, h0), (b, b0) in ((gained, (BENIGN, BENIGN)), ((BENIGN, BENIGN), gained))
    )
    assert (harmful.bound, benign.bound) == ("upper", "lower") and harmful.rir < 1


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ProtocolError, match="exakt"):
        relative_immunization_ratio(**tasks(), protocol="exakt")
