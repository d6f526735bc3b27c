import dataclasses

import pytest
from audit_sample import attack, lost, make, probes, sample_data

from hf_immunize.audit.result import Outcome
from hf_immunize.audit.statistics import (
    gap,
    gap_of_images,
    gap_of_seeds,
    matched,
    of_class,
    reached,
    strongest,
    summarize,
)


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


def pair(ours, theirs, seeds=5, images=2000):
    data = make(
        [
            *attack("ridge", "head_input", "immunized", ours, seeds=seeds),
            *attack("ridge", "head_input", "reference", theirs),
        ]
    )
    data.tasks["harmful"] = dataclasses.replace(data.tasks["harmful"], test_size=images)
    immunized, reference = summarize(data)
    return reference, immunized


def test_a_gap_that_every_seed_gives_has_no_interval_over_seeds_and_one_over_images():
    # The seeds' noise is the same on both sides, and goes.
    difference, interval = gap(*pair(0.3, 0.5))
    assert difference == pytest.approx(0.2) and gap_of_seeds(*pair(0.3, 0.5)) is None
    assert interval == gap_of_images(*pair(0.3, 0.5)) and interval[1] - interval[0] > 0.05


def test_the_gap_holds_the_interval_over_seeds_where_seeds_differ():
    theirs, ours = pair(0.3, 0.5, images=10**9)
    noisy = dataclasses.replace(ours, accuracies={0: 0.2, 1: 0.3, 2: 0.4, 3: 0.3, 4: 0.3})
    assert gap(theirs, noisy)[1] == gap_of_seeds(theirs, noisy)


def test_the_gap_of_few_shared_seeds_has_no_interval_over_seeds():
    assert gap_of_seeds(*pair(0.3, 0.5, seeds=2)) is None


def test_the_gap_of_images_is_newcombes():
    """56/70 against 48/80: Newcombe's Table II, method 10, gives 0.0524 to 0.3339."""
    theirs, ours = pair(0.3, 0.5)
    theirs = dataclasses.replace(theirs, mean=56 / 70, test_size=70)
    ours = dataclasses.replace(ours, mean=48 / 80, test_size=80)
    assert gap_of_images(theirs, ours) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_fine_tuning_has_the_interval_of_the_images_it_was_measured_on():
    runs = [one for name in ("whole_network", "restore_swap") for one in attack(name, "fine_tuning", "immunized", 0.4)]
    tuned, restored = summarize(make(runs, budget={"fine_tuning_test_images": 100}))
    assert (tuned.test_size, restored.test_size) == (100, 2000)
    assert tuned.upper - tuned.lower > 4 * (restored.upper - restored.lower)


def test_a_rise_of_a_single_test_image_is_not_still_rising():
    curve = {"steps": [1, 2], "curve": [0.3, 0.31], "accuracy": 0.31}
    runs = [Outcome("sgd", "head_input", "immunized", "harmful", "l", seed, "float64", **curve) for seed in range(3)]
    few, many = make(runs), make(runs)
    few.tasks["harmful"] = dataclasses.replace(few.tasks["harmful"], test_size=100)
    assert [summarize(data)[0].still_rising for data in (few, many)] == [False, True]
