import math

import pytest
from audit_sample import make, probes, sample_data

from hf_immunize.attacks.outcomes import Utility
from hf_immunize.attacks.wording import clean, label, percent, ratio, sentences, signed


HOSTILE = "<script>alert(1)</script>\n\"'\x1b[31m\u202e\x00"


@pytest.mark.parametrize("character", ["\n", "\r", "\t", "\x00", "\x1b", "\u202e", "\u2028", "\ud800", "\ue000"])
def test_names_keep_no_character_that_acts(character):
    assert character not in clean(f"a{character}b")


def test_names_of_other_scripts_stay():
    assert clean("汽车 чайка") == "汽车 чайка"


@pytest.mark.parametrize("size", [3, 80, 81, 1000])
def test_names_are_short(size):
    assert len(clean("x" * size)) == min(size, 80)


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


@pytest.mark.parametrize("bound", ["lower", "upper"])
def test_a_bound_on_the_ratio_says_its_direction(bound):
    text = " ".join(sentences(sample_data(rir={"rir": 3e9, "bound": bound})))
    assert f"ratio is {'at least' if bound == 'lower' else 'at most'} 3.0e9" in text


def test_an_undetermined_ratio_is_no_number():
    text = " ".join(sentences(sample_data(rir={"rir": math.nan, "bound": "undetermined"})))
    assert "immunization ratio is undetermined" in text and "nan" not in text


def test_sentences_are_sentences():
    for one in sentences(sample_data()):
        assert one[0].isupper() and one.endswith(".") and "None" not in one and "\n" not in one


def test_hostile_names_stay_within_their_line():
    runs = [*probes("immunized", 0.4, layer=HOSTILE), *probes("reference", 0.486, layer=HOSTILE)]
    for one in sentences(make(runs, model=HOSTILE)):
        assert "\n" not in one and "\x1b" not in one


def test_a_gain_of_benign_accuracy_has_its_sign():
    text = sentences(sample_data(utility=Utility(900, 0.76, 0.75, 0.01, (-0.004, 0.024))))[0]
    assert "a difference of +1.0 points, 95% interval −0.4 to +2.4" in text
