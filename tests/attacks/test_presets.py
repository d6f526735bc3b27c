"""Presets are named, what is asked for by name is what runs, and a budget is a positive number."""

import math
from dataclasses import replace

import pytest

from hf_immunize.attacks.attacker import ProbeBudget, TuningBudget
from hf_immunize.attacks.presets import PRESETS, find_preset
from hf_immunize.errors import ArgumentError


QUICK = find_preset("quick")


@pytest.mark.parametrize(
    ("ask", "named"),
    [
        (lambda: find_preset("fast"), "quick, standard, full"),
        (lambda: QUICK.only(["ridge", "magic"]), "magic"),
        (lambda: replace(QUICK, probes=("magic",)), "magic"),
    ],
)
def test_an_unknown_name_is_named(ask, named):
    with pytest.raises(ArgumentError, match=named):
        ask()


def test_only_keeps_what_is_asked_for():
    chosen = find_preset("standard").only(["adam", "lora_r2", "restore_swap"])
    assert (chosen.probes, chosen.fine_tuning, chosen.restoring) == (("adam",), ("lora_r2",), ("restore_swap",))
    assert chosen.attackers == ("adam", "lora_r2", "restore_swap")


def test_a_changed_budget_is_in_the_name():
    changed = QUICK.changed(steps=40, seeds=4)
    assert changed.name == "quick, changed"
    assert (changed.probe_budget.steps, changed.tuning_budget.steps, changed.tuning_budget.trial_steps) == (40, 40, 10)
    assert (changed.probe_seeds, changed.layer_seeds, changed.tuning_seeds) == (4, 4, 4)
    assert QUICK.changed() is QUICK


COUNTS = [
    lambda value: ProbeBudget(steps=value),
    lambda value: TuningBudget(max_test_images=value),
    lambda value: replace(QUICK, probe_seeds=value),
    lambda value: replace(QUICK, tuning_seeds=value),
    lambda value: QUICK.changed(steps=value),
    lambda value: QUICK.changed(seeds=value),
]


@pytest.mark.parametrize("value", [0, -1, 2.5, "3", True, math.nan, math.inf, 10**20])
def test_a_budget_is_a_positive_number(value):
    for make in COUNTS:
        with pytest.raises(ArgumentError):
            make(value)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_every_preset_has_an_attacker_that_conditioning_cannot_slow(preset):
    assert "ridge" in preset.probes
    assert set(QUICK.attackers) <= set(preset.attackers) and set(preset.benign_attackers) <= set(preset.attackers)
