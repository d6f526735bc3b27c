import math

import pytest

from hf_immunize.attacks.presets import ATTACKERS
from hf_immunize.audit.names import clean, label, percent, ratio, signed


@pytest.mark.parametrize("character", ["\n", "\r", "\t", "\x00", "\x1b", "\u202e", "\u2028", "\ud800", "\ue000"])
def test_names_keep_no_character_that_acts(character):
    assert character not in clean(f"a{character}b")


def test_names_of_other_scripts_stay():
    assert clean("汽车 чайка") == "汽车 чайка"


@pytest.mark.parametrize("size", [3, 80, 81, 1000])
def test_names_are_short(size):
    assert len(clean("x" * size)) == min(size, 80)


def test_every_attacker_of_the_suite_has_a_name_for_people():
    assert [name for name in ATTACKERS if label(name) == name.replace("_", " ")] == ["conjugate_gradient"]


def test_attackers_without_a_better_name_keep_their_own():
    assert label("sam_l4") == "sam l4"


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_no_number_is_a_dash(value):
    assert percent(value) == "–"


def test_a_loss_has_a_minus():
    assert signed(-0.012) == "−1.2"


@pytest.mark.parametrize(("value", "text"), [(0.5, "0.5"), (12.3, "12"), (123.4, "120"), (math.inf, "infinite")])
def test_ratios_have_two_digits(value, text):
    assert ratio(value) == text
