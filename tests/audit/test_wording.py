import math

import pytest
from audit_sample import make, probes, sample_data

from hf_immunize.audit.result import Utility
from hf_immunize.audit.verdict import sentences


HOSTILE = "<script>alert(1)</script>\n\"'\x1b[31m\u202e\x00"


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
