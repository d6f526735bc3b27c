import pytest
from scipy import stats

from hf_immunize.audit.statistics import accuracy_interval, mean_interval, wilson_interval


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


def test_what_does_not_depend_on_the_seed_has_no_interval_over_seeds():
    assert mean_interval([0.65] * 5) == (pytest.approx(0.65), None)
    assert mean_interval([0.1 + 0.2, 0.3, 0.3])[1] is None  # but for rounding


def test_a_deterministic_accuracy_has_the_interval_of_its_test_images():
    assert accuracy_interval([0.65] * 5, 100)[1] == pytest.approx(wilson_interval(0.65, 100))


def test_no_images_leave_any_accuracy_possible():
    assert wilson_interval(0.5, 0) == (0.0, 1.0)
