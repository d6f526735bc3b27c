"""Relative fine-tuning deviation and the paired interval."""

import math

import pytest
import torch
from audit_sample import make
from scipy import stats

from hf_immunize.audit.result import Outcome
from hf_immunize.audit.statistics import deviations, paired_utility, relative_deviation
from hf_immunize.errors import ShapeError


def test_signed_deviation_is_negative_where_the_immunized_model_learns_better():
    assert relative_deviation([0.5], [0.75]) == (50.0, -50.0)


def test_deviation_of_a_reference_that_reads_nothing_is_no_number():
    assert all(math.isnan(value) for value in relative_deviation([0.0], [0.5]))


def test_deviation_of_unequal_curves_is_refused():
    with pytest.raises(ShapeError, match="same steps"):
        relative_deviation([0.5], [0.5, 0.6])


def test_pairing_narrows_the_interval():
    ours, theirs = torch.arange(100) >= 50, torch.arange(100) >= 48
    low, high = paired_utility(ours, theirs).interval
    assert high - low < 0.08  # unpaired it is 0.28


def test_equal_answers_leave_open_what_another_draw_would_give():
    same = torch.ones(300, dtype=torch.bool)
    half = 1.959964 * math.sqrt(2 / 302 / 302)  # Bonett and Price's, without a difference: close to 3/300
    assert paired_utility(same, same).interval == pytest.approx((-half, half), rel=1e-6)


@pytest.mark.parametrize(("lost", "significant"), [(4, False), (5, False), (6, True), (9, True)])
def test_a_few_images_that_changed_are_a_difference_where_mcnemars_exact_test_says_so(lost, significant):
    ours = torch.arange(100) >= lost
    _, high = paired_utility(ours, torch.ones(100, dtype=torch.bool)).interval
    assert (high < 0) == significant == (stats.binomtest(0, lost).pvalue < 0.05)


def test_interval_covers_the_truth_nineteen_times_in_twenty():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        draw = torch.rand(200, generator=generator)
        low, high = paired_utility(draw < 0.7, (draw < 0.6) | (draw > 0.9)).interval
        covered += low <= 0.0 <= high
    assert 0.92 <= covered / 400 <= 0.98


def tuned(subject, seed, curve, **kwargs):
    values = {"accuracy": curve[-1], "steps": [0, 10, 100][: len(curve)], "curve": curve} | kwargs
    return Outcome("lora_r8", "fine_tuning", subject, "harmful", "adapters", seed, "float32", **values)


def test_deviation_pairs_seeds_and_leaves_the_untrained_point_out():
    runs = [tuned("reference", seed, [0.01, 0.2, 0.4]) for seed in range(3)]
    runs += [tuned("immunized", seed, [0.9, 0.1, 0.5 + 0.1 * seed]) for seed in range(3)]
    (found,) = deviations(make(runs))
    # 50 % less after 10 steps; 25, 50 and 75 % more after 100.
    assert (found.absolute, found.signed) == pytest.approx((50.0, 0.0))
    assert found.signed_interval[0] < 0 < found.signed_interval[1]


def test_deviation_of_too_few_seeds_has_no_interval():
    (found,) = deviations(make([tuned("reference", 0, [0.0, 0.5]), tuned("immunized", 0, [0.0, 0.25])]))
    assert (found.absolute, found.signed, found.signed_interval, found.seeds) == (50.0, 50.0, None, 1)


def test_an_attack_that_diverged_has_no_deviation():
    runs = [tuned("reference", 0, [0.0, 0.5]), tuned("immunized", 0, [0.0], status="diverged", accuracy=None)]
    assert deviations(make(runs)) == []
