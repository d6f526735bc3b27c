"""What the log history says is read as it was written."""

import math

import pytest

from hf_immunize.errors import ArgumentError
from hf_immunize.training.checkpoints import benign_drops, by_step, rir_successes


def accuracies(*values):
    return [{"step": step, "eval_accuracy": value} for step, value in enumerate(values)]


def rirs(*values, lower=0.0, upper=0.0):
    bounds = {"eval_rir_is_lower_bound": lower, "eval_rir_is_upper_bound": upper}
    return [{"step": step, "eval_log10_rir": value} | bounds for step, value in enumerate(values)]


def test_of_several_values_at_one_step_the_last_counts():
    assert by_step([{"step": 2, "x": 1.0}, {"step": 2, "x": 3.0}, {"x": 5.0}], "x") == {2: 3.0}


def test_drops_are_counted_from_the_first_evaluation():
    assert benign_drops(accuracies(0.9, 0.88, 0.95)) == {0: 0.0, 1: 2.0, 2: -5.0}


def test_drops_are_counted_from_a_given_baseline():
    assert benign_drops(accuracies(0.5), baseline=0.75) == {0: 25.0}


def test_drops_of_percentages_are_in_points_too():
    assert benign_drops(accuracies(90.0, 88.5), percent=True) == {0: 0.0, 1: 1.5}


def test_percentages_taken_for_fractions_are_refused():
    with pytest.raises(ArgumentError, match=r"between 0 and 1, found 90.*percent=True"):
        benign_drops(accuracies(90.0))


def test_an_accuracy_that_is_not_a_number_is_a_loss_without_limit():
    assert benign_drops(accuracies(0.9, math.nan))[1] == math.inf


def test_nothing_is_lost_where_nothing_was_evaluated():
    assert benign_drops([{"step": 1, "loss": 0.5}]) == {}


@pytest.mark.parametrize(("lower", "upper", "counts"), [(0, 0, True), (1, 0, True), (0, 1, False), (1, 1, False)])
def test_a_lower_bound_counts_and_an_upper_bound_does_not(lower, upper, counts):
    assert rir_successes(rirs(3.5, lower=lower, upper=upper), 1000.0) == {0: counts}


def test_the_target_itself_is_enough():
    assert rir_successes(rirs(2.9, 3.0), 1000.0) == {0: False, 1: True}


def test_an_rir_that_is_not_a_number_does_not_count():
    assert rir_successes(rirs(math.nan), 1000.0) == {0: False}
