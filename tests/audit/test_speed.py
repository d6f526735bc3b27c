import math

import numpy as np
import pytest
from audit_sample import STEPS, attack, make

from hf_immunize.audit.result import Outcome, TaskSummary
from hf_immunize.audit.statistics import first_reaching, late_rise, steps_ratios
from hf_immunize.audit.verdict import Kind, judge


def test_a_flat_curve_does_not_rise():
    assert late_rise([1, 10, 100], [0.1, 0.5, 0.5]) == 0


def test_a_curve_of_one_point_is_not_known_to_rise():
    assert late_rise([100], [0.5]) == 0


def test_a_target_never_met_is_reached_at_no_step():
    steps, reached = first_reaching([1, 2], [[0.1, 0.2]], [0.3])
    assert (steps, reached) == (2, False)


def test_step_zero_counts_as_one():
    assert first_reaching([0, 2], [[0.3, 0.4]], [0.2])[0] == 1


def ratio_of(immunized_half, reference_half, **kwargs):
    runs = [
        *attack("gd_line_search", "head_input", "immunized", 0.5, half=immunized_half, **kwargs),
        *attack("gd_line_search", "head_input", "reference", 0.5, half=reference_half, **kwargs),
    ]
    return next(one for one in steps_ratios(make(runs)) if one.share == 0.9)


def test_an_equal_model_takes_equal_steps():
    one = ratio_of(10, 10)
    assert (one.ratio, one.is_bound) == (1.0, False)
    assert one.interval[0] <= 1 <= one.interval[1]


def test_a_slower_model_takes_more_steps():
    assert ratio_of(300, 3).ratio == pytest.approx(100)


def test_a_model_never_read_gives_a_bound_at_the_budget():
    one = ratio_of(1e6, 3)
    assert one.is_bound and one.immunized == STEPS[-1] and one.ratio == pytest.approx(STEPS[-1] / one.reference)


def test_the_target_is_a_share_of_what_the_reference_gives_above_chance():
    assert ratio_of(10, 10).target == pytest.approx(0.01 + 0.9 * 0.49, abs=0.005)


def test_one_test_image_makes_no_ratio():
    """Both are at 65 or 66 of 100 at the same step, and the target lies between."""
    steps = [1, 10, 240, 1000]
    curves = {"reference": [0.2, 0.66, 0.66, 0.722], "immunized": [0.2, 0.65, 0.67, 0.72]}
    runs = [
        Outcome(
            "gd_line_search", "head_input", s, "harmful", "l", seed, "float64", accuracy=c[-1], steps=steps, curve=c
        )
        for s, c in curves.items()
        for seed in range(3)
    ]
    data = make(runs)
    data.tasks["harmful"] = TaskSummary("harmful", "digits", 300, 100, 10, 0.1)
    (one,) = [one for one in steps_ratios(data) if one.share == 0.9]
    assert one.ratio == pytest.approx(24) and one.interval[0] <= 1
    assert not {found.kind for found in judge(data)} & {Kind.SLOWED, Kind.MAYBE_SLOWED}


def test_the_interval_of_equal_speeds_holds_one_nineteen_times_in_twenty():
    """Test images drawn anew for each model, of which every one is learned at a step of its own."""
    generator = np.random.default_rng(0)
    steps = np.unique(np.logspace(0, 4, 30).round().astype(int)).tolist()
    held = 0
    for _ in range(200):
        runs = []
        for subject in ("reference", "immunized"):
            learned = np.exp(generator.normal(5, 2, 100))
            curve = [float(np.mean(learned <= step)) for step in steps]
            runs += [
                Outcome(
                    "sgd", "head_input", subject, "harmful", "l", seed, "float64", "done", "", curve[-1], steps, curve
                )
                for seed in range(3)
            ]
        data = make(runs)
        data.tasks["harmful"] = TaskSummary("harmful", "digits", 300, 100, 10, 0.1)
        (one,) = [one for one in steps_ratios(data) if one.share == 0.9]
        held += one.interval[0] <= 1 <= one.interval[1]
    assert held >= 184  # 190 in the mean, less two standard deviations


def test_few_seeds_give_a_ratio_without_interval():
    assert ratio_of(300, 3, seeds=2).interval is None


def test_an_attack_that_cannot_read_the_reference_has_no_ratio():
    runs = [
        one for s in ("immunized", "reference") for one in attack("gd_line_search", "head_input", s, 0.02, half=10)
    ]
    assert steps_ratios(make(runs)) == []


def given_ratios(accuracy):
    runs = [
        *attack("gd_line_search", "head_input", "immunized", 0.5, half=300),
        *attack("gd_line_search", "head_input", "reference", 0.5, half=3),
    ]
    return [one for one in steps_ratios(make(runs, accuracies=[accuracy])) if one.share is None]


def test_steps_to_a_given_accuracy_are_counted():
    (one,) = given_ratios(0.4)
    assert (one.target, one.immunized, one.reference) == (0.4, 1000, 10)
    assert one.ratio == pytest.approx(100)


def test_a_given_accuracy_that_the_reference_never_has_is_left_out():
    assert given_ratios(0.99) == []


def test_the_mean_ratio_is_geometric():
    slow = attack("gd_line_search", "head_input", "immunized", 0.5, half=300, seeds=2)[:1]
    fast = attack("gd_line_search", "head_input", "immunized", 0.5, half=3, seeds=2)[1:]
    reference = attack("gd_line_search", "head_input", "reference", 0.5, half=3, seeds=2)
    one = next(one for one in steps_ratios(make([*slow, *fast, *reference])) if one.share == 0.9)
    assert one.ratio == pytest.approx(math.sqrt(100))
