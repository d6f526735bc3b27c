import math

import pytest
import torch
from matrices import gaussian, geometric, with_singular_values

from hf_immunize.errors import ArgumentError, ProtocolError, ShapeError
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
    scaled = tasks() | {"harmful": 1e-3 * tasks()["harmful"]}
    assert relative_immunization_ratio(**scaled).rir == pytest.approx(ratio.rir, rel=1e-9)


@pytest.mark.parametrize("protocol", ["exact", "intercept"])
@pytest.mark.parametrize("kind", ["factor", "conditioning"])
@pytest.mark.parametrize("names", [NAMES, ("harmful_reference",)])
def test_features_their_factors_and_conditionings_agree(kind, names, protocol):
    features, intercept = tasks(), protocol == "intercept"

    def convert(rows):
        return FeatureFactor().update(rows) if kind == "factor" else feature_conditioning(rows, intercept=intercept)

    given = features | {name: convert(features[name]) for name in names}
    found = relative_immunization_ratio(**given, protocol=protocol)
    expected = relative_immunization_ratio(**features, protocol=protocol)
    assert found.rir == pytest.approx(expected.rir, rel=1e-9)
    kappas = [feature_conditioning(features[name], intercept=intercept).kappa for name in NAMES]
    assert [getattr(expected, name).kappa for name in NAMES] == kappas
    if kind == "conditioning":
        with pytest.raises(ProtocolError, match="intercept"):
            relative_immunization_ratio(**given, protocol="exact" if intercept else "intercept")


def test_a_constant_added_to_all_features_is_nothing_to_a_probe_with_an_intercept():
    """It rules the ratio of the paper's definition, and immunizes against nothing."""
    shift = 100 * torch.ones(tasks()["harmful"].shape[1], dtype=torch.float64)
    plain = tasks() | {"harmful": tasks()["harmful_reference"], "benign": tasks()["benign_reference"]}
    moved = plain | {"harmful": plain["harmful"] + shift}
    assert relative_immunization_ratio(**moved).rir > 100
    assert relative_immunization_ratio(**moved, protocol="intercept").rir == pytest.approx(1.0, rel=1e-6)


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
    if kind == "tensors":
        groups = relative_immunization_ratio(**features, protocol="groups", num_groups=3, group_size=20)
        assert groups.bound == bound


@pytest.mark.parametrize("options", [{}, {"protocol": "groups", "num_groups": 3, "group_size": 20}])
def test_rank_lost_on_both_sides_makes_no_statement(options):
    features = tasks()
    for name in ("harmful", "benign"):
        features[name] = collapse(features[f"{name}_reference"])
    ratio = relative_immunization_ratio(**features, **options)
    assert ratio.bound == "undetermined"
    assert math.isnan(ratio.rir) and math.isnan(ratio.log10_rir)
    assert "undetermined" in str(ratio)


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


def wide_pair():
    """Two 100×512 feature sets with κ(H) of 9e2 and 9e8, and largest eigenvalue 1.3e4."""
    return [
        math.sqrt(1.29e4) * with_singular_values(geometric(math.sqrt(kappa), 100), 100, 512, seed=int(kappa) % 97)
        for kappa in (9e2, 9e8)
    ]


def two_directions(second):
    return torch.diag(torch.tensor([1.0, second], dtype=torch.float32))


BENIGN = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float32))


def test_rank_gained_bounds_the_ratio_the_other_way():
    gained = two_directions(1e-3), two_directions(1e-9)
    harmful, benign = (
        relative_immunization_ratio(harmful=h, harmful_reference=h0, benign=b, benign_reference=b0)
        for (h, h0), (b, b0) in ((gained, (BENIGN, BENIGN)), ((BENIGN, BENIGN), gained))
    )
    assert (harmful.bound, benign.bound) == ("upper", "lower") and harmful.rir < 1
    # So does a reference that is a bound itself.
    full, lost = two_directions(1e-1), two_directions(1e-9)
    before = feature_conditioning(lost, reference=full)
    ratio = relative_immunization_ratio(harmful=full, harmful_reference=before, benign=BENIGN, benign_reference=BENIGN)
    assert ratio.bound == "upper"


def test_a_conditioning_carries_its_bound_and_may_not_hide_lost_rank():
    features = tasks()
    reference, lost = features["harmful_reference"], collapse(features["harmful_reference"])
    features["harmful"] = feature_conditioning(lost, reference=reference)
    assert relative_immunization_ratio(**features).bound == "lower"
    for hidden in (feature_conditioning(lost), feature_conditioning(lost, reference=lost)):
        with pytest.raises(ProtocolError, match=r"Call feature_conditioning\(Z, reference="):
            relative_immunization_ratio(**features | {"harmful": hidden})


def test_groups_are_the_same_rows_of_both_and_do_not_overlap_while_the_rows_last():
    features = tasks(rows=(40, 40))
    exact = relative_immunization_ratio(**features)
    # One group of all rows is a permutation of them: κ is that of all rows.
    ratio = relative_immunization_ratio(**features, protocol="groups", num_groups=2, group_size=40)
    assert ratio.rir == pytest.approx(exact.rir, rel=1e-9)
    assert ratio.std == pytest.approx(0.0, abs=1e-6 * exact.rir)
    # Were the rows different ones, features equal to their reference would not have ratio one in every group.
    same = {name: gaussian(90, 6, seed=int(name.startswith("benign"))) for name in NAMES}
    ratio = relative_immunization_ratio(**same, protocol="groups", group_size=20)
    assert (ratio.rir, ratio.std) == (1.0, 0.0)
    few, many = (_groups(rows=43, num_groups=count, group_size=10, seed=0) for count in (4, 9))
    assert len(torch.cat(few).unique()) == 40
    assert [len(rows.unique()) for rows in many] == [10] * 9


def test_the_reference_protocol_reads_its_own_floor_and_changes_with_scale_where_exact_does_not():
    pair = wide_pair()
    assert [reference_condition_number(z) for z in pair] == pytest.approx([1.29e10, 1.29e10], rel=0.02)
    assert [feature_conditioning(z).kappa for z in pair] == pytest.approx([9e2, 9e8], rel=1e-6)
    well_above = 100 * with_singular_values(geometric(10.0, 8), 50, 8)
    assert reference_condition_number(well_above) == pytest.approx(100.0, rel=1e-6)
    options = dict.fromkeys(NAMES, pair[0]) | {"harmful": 1.5 * pair[0]}
    assert relative_immunization_ratio(**options, protocol="reference").rir == pytest.approx(2.25, rel=0.02)
    assert relative_immunization_ratio(**options).rir == pytest.approx(1.0, rel=1e-9)
    ratio = relative_immunization_ratio(**tasks(), protocol="reference", num_groups=4, group_size=20)
    assert ratio.std > 0 and "noise-floored" in str(ratio) and f"± {ratio.std:.3g}" in str(ratio)
    assert relative_immunization_ratio(**tasks(), protocol="groups", num_groups=1, group_size=20).std is None


def factor_of(z):
    return FeatureFactor().update(z)


@pytest.mark.parametrize("convert", [factor_of, feature_conditioning])
def test_summaries_have_no_rows_and_are_of_the_same_data(convert):
    features = tasks()
    for protocol in ("groups", "reference"):
        with pytest.raises(ArgumentError, match="benign features"):
            relative_immunization_ratio(**features | {"benign": convert(features["benign"])}, protocol=protocol)
    with pytest.raises(ShapeError, match="Pass the same images"):
        relative_immunization_ratio(**features | {"harmful": convert(features["harmful"][:-1])})
