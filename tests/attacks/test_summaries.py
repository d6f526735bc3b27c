import dataclasses
import math

import pytest
from audit_sample import STEPS, attack, lost, make, probes, sample_data
from scipy import stats

from hf_immunize.attacks.outcomes import Outcome
from hf_immunize.attacks.summaries import (
    first_reaching,
    gap,
    gap_of_images,
    late_rise,
    matched,
    mean_interval,
    of_class,
    reached,
    steps_ratios,
    strongest,
    summarize,
    wilson_interval,
)


def test_the_interval_is_students():
    values = [0.1, 0.15, 0.3, 0.22]
    expected = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert mean_interval(values)[1] == pytest.approx(expected)


def test_two_values_have_a_mean_and_no_interval():
    assert mean_interval([0.1, 0.3]) == (pytest.approx(0.2), None)


@pytest.mark.parametrize(("right", "size"), [(0, 30), (7, 30), (30, 30), (500, 1000)])
def test_the_interval_for_test_images_is_wilsons(right, size):
    expected = stats.binomtest(right, size).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right / size, size) == pytest.approx(tuple(expected), abs=1e-12)


def test_no_images_leave_any_accuracy_possible():
    assert wilson_interval(0.5, 0) == (0.0, 1.0)


def test_the_best_along_the_curve_counts():
    run = Outcome("sgd", "head_input", "immunized", "harmful", "l", 0, "float64", accuracy=0.1, steps=[1], curve=[0.4])
    assert reached(run) == 0.4


def test_runs_of_one_attack_are_one_summary_with_its_seeds():
    (one,) = summarize(make(attack("ridge", "head_input", "immunized", 0.4)))
    assert sorted(one.accuracies) == [0, 1, 2, 3, 4]
    assert one.closed_form and one.interval[0] < one.mean < one.interval[1]


def test_the_wider_of_both_intervals_bounds_the_accuracy():
    (one,) = summarize(make(attack("ridge", "head_input", "immunized", 0.4)))
    assert one.upper == one.test_interval[1] > one.interval[1]


def test_an_attack_without_a_result_excludes_no_accuracy():
    (one,) = summarize(make([lost("sgd", "diverged", "NaN", steps=[1, 2], curve=[0.2, 0.1])]))
    assert (one.mean, one.lower, one.upper) == (None, 0.0, 1.0)
    assert (one.diverged, one.notes, one.before_divergence) == (1, ("NaN",), 0.2)


def test_precisions_are_kept_apart():
    runs = [*attack("ridge", "head_input", "immunized", 0.4), *attack("ridge", "head_input", "immunized", 0.3)]
    half = [Outcome(**vars(one) | {"precision": "bfloat16"}) for one in runs[5:]]
    assert [one.precision for one in summarize(make([*runs[:5], *half]))] == ["float64", "bfloat16"]


def test_any_layer_includes_the_head_where_an_earlier_layer_was_probed():
    summaries = summarize(sample_data())
    accesses = {one.access for one in of_class(summaries, "immunized", "harmful", "any_layer")}
    assert accesses == {"any_layer", "head_input"}


def test_any_layer_is_empty_where_only_the_head_was_probed():
    assert of_class(summarize(make(probes("immunized", 0.4))), "immunized", "harmful", "any_layer") == []


def test_the_strongest_has_the_highest_mean():
    summaries = summarize(
        make([*attack("a", "head_input", "immunized", 0.3), *attack("b", "head_input", "immunized", 0.5)])
    )
    assert strongest(summaries).attacker == "b"
    assert strongest([]) is None


def test_attacks_that_are_done_on_both_are_matched():
    summaries = summarize(
        make([*attack("a", "head_input", "reference", 0.3), *attack("b", "head_input", "reference", 0.5)])
    )
    others = summarize(make([*attack("a", "head_input", "immunized", 0.3), lost("b", "diverged", "NaN")]))
    assert [one.attacker for one in matched(summaries, others)] == ["a"]


def test_the_gap_is_paired_by_seed():
    (ours,) = summarize(make(attack("ridge", "head_input", "immunized", 0.3)))
    (theirs,) = summarize(make(attack("ridge", "head_input", "reference", 0.5)))
    difference, (low, high) = gap(theirs, ours)
    # The seeds' noise is the same on both sides, and goes.
    assert difference == pytest.approx(0.2) and high - low < 1e-9


def test_the_gap_of_few_shared_seeds_has_no_interval():
    (ours,) = summarize(make(attack("ridge", "head_input", "immunized", 0.3, seeds=2)))
    (theirs,) = summarize(make(attack("ridge", "head_input", "reference", 0.5)))
    assert gap(theirs, ours)[1] is None


def test_a_flat_curve_does_not_rise():
    assert late_rise([1, 10, 100], [0.1, 0.5, 0.5]) == 0


def test_a_curve_of_one_point_is_not_known_to_rise():
    assert late_rise([100], [0.5]) == 0


def test_a_target_never_met_is_reached_at_no_step():
    assert first_reaching([1, 2], [0.1, 0.2], 0.3) is None


def test_step_zero_counts_as_one():
    assert first_reaching([0, 2], [0.3, 0.4], 0.2) == 1


def ratio_of(immunized_half, reference_half, **kwargs):
    runs = [
        *attack("gd", "head_input", "immunized", 0.5, half=immunized_half, **kwargs),
        *attack("gd", "head_input", "reference", 0.5, half=reference_half, **kwargs),
    ]
    return next(one for one in steps_ratios(make(runs)) if one.share == 0.9)


def test_an_equal_model_takes_equal_steps():
    one = ratio_of(10, 10)
    assert (one.ratio, one.is_bound, one.interval) == (1.0, False, (1.0, 1.0))


def test_a_slower_model_takes_more_steps():
    assert ratio_of(300, 3).ratio == pytest.approx(100)


def test_a_model_never_read_gives_a_bound_at_the_budget():
    one = ratio_of(1e6, 3)
    assert one.is_bound and one.immunized == STEPS[-1] and one.ratio == pytest.approx(STEPS[-1] / one.reference)


def test_the_target_is_a_share_of_what_the_reference_gives_above_chance():
    assert ratio_of(10, 10).target == pytest.approx(0.01 + 0.9 * 0.49, abs=0.005)


def test_few_seeds_give_a_ratio_without_interval():
    assert ratio_of(300, 3, seeds=2).interval is None


def test_an_attack_that_cannot_read_the_reference_has_no_ratio():
    runs = [one for s in ("immunized", "reference") for one in attack("gd", "head_input", s, 0.02, half=10)]
    assert steps_ratios(make(runs)) == []


def test_the_mean_ratio_is_geometric():
    slow = attack("gd", "head_input", "immunized", 0.5, half=300, seeds=2)[:1]
    fast = attack("gd", "head_input", "immunized", 0.5, half=3, seeds=2)[1:]
    reference = attack("gd", "head_input", "reference", 0.5, half=3, seeds=2)
    one = next(one for one in steps_ratios(make([*slow, *fast, *reference])) if one.share == 0.9)
    assert one.ratio == pytest.approx(math.sqrt(100))


def test_the_gap_of_images_is_newcombes():
    """56/70 against 48/80: Newcombe's Table II, method 10, gives 0.0524 to 0.3339."""
    (theirs,) = summarize(
        make([Outcome("a", "head_input", "reference", "harmful", "l", 0, "float64", accuracy=56 / 70)])
    )
    (ours,) = summarize(
        make([Outcome("a", "head_input", "immunized", "harmful", "l", 0, "float64", accuracy=48 / 80)])
    )
    theirs = dataclasses.replace(theirs, test_interval=wilson_interval(56 / 70, 70))
    ours = dataclasses.replace(ours, test_interval=wilson_interval(48 / 80, 80))
    assert gap_of_images(theirs, ours) == pytest.approx((0.0524, 0.3339), abs=5e-5)
