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


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_an_attacker_that_conditioning_cannot_slow(name):
    assert "ridge" in PRESETS[name].probes
