"""Presets are named, and what is asked for by name is what runs."""

import pytest

from hf_immunize.attacks.presets import PRESETS, find_preset
from hf_immunize.errors import ArgumentError


def test_unknown_preset_lists_the_known():
    with pytest.raises(ArgumentError, match="quick, standard, full"):
        find_preset("fast")


def test_unknown_attacker_is_named():
    with pytest.raises(ArgumentError, match="found magic"):
        find_preset("quick").only(["ridge", "magic"])


def test_only_keeps_what_is_asked_for():
    chosen = find_preset("standard").only(["adam", "lora_r2"])
    assert (chosen.probes, chosen.fine_tuning, chosen.restoring) == (("adam",), ("lora_r2",), ())


def test_a_changed_budget_is_in_the_name():
    changed = find_preset("quick").changed(seconds=5, steps=40, seeds=4)
    assert changed.name == "quick, changed"
    assert (changed.probe_budget.seconds, changed.tuning_budget.seconds) == (5, 5)
    assert (changed.probe_budget.steps, changed.tuning_budget.steps, changed.tuning_budget.trial_steps) == (40, 40, 10)
    assert (changed.probe_seeds, changed.layer_seeds, changed.tuning_seeds) == (4, 4, 4)


def test_a_budget_that_is_not_changed_keeps_its_name():
    assert find_preset("full").changed() is find_preset("full")


@pytest.mark.parametrize("given", [{"seconds": 0.0}, {"steps": -1}, {"seeds": 0}])
def test_a_budget_of_nothing_is_one_sentence(given):
    with pytest.raises(ArgumentError, match="above 0"):
        find_preset("quick").changed(**given)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_an_attacker_that_conditioning_cannot_slow(name):
    assert "ridge" in PRESETS[name].probes
