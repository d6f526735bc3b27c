import dataclasses
import json
import math

import numpy as np
import pytest
from audit_sample import attack, lost, make, sample_data

from hf_immunize.audit.result import check, from_json, to_json
from hf_immunize.errors import DataError


def test_nothing_is_lost_on_the_way():
    data = sample_data()
    assert from_json(to_json(data)) == data


def test_infinite_numbers_come_back_and_the_json_is_finite():
    data = sample_data(rir={"rir": math.inf, "log10_rir": -math.inf, "bound": "lower"})
    text = to_json(data)
    assert from_json(text).rir == data.rir

    def refuse(name):
        raise AssertionError(name)

    json.loads(text, parse_constant=refuse)


def test_numbers_that_are_none_come_back_as_such():
    text = to_json(sample_data(rir={"rir": math.nan}))
    assert math.isnan(from_json(text).rir["rir"])


def test_numbers_of_numpy_become_plain():
    data = make([], budget={"steps": np.int64(5), "rate": np.float32(0.5)})
    assert from_json(to_json(data)).budget == {"steps": 5, "rate": 0.5}


def test_hostile_names_come_back_unchanged():
    name = '"</script>\n\u202e\x00'
    assert from_json(to_json(make([], model=name))).model == name


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "not JSON"),
        ("[]", "other content"),
        ('{"format": "else"}', "other content"),
        ('{"format": "hf_immunize.audit", "format_version": 99}', "found 99"),
        ('{"format": "hf_immunize.audit", "format_version": 1}', "'data'"),
        ('{"format": "hf_immunize.audit", "format_version": 1, "data": {"tasks": {}}}', "'outcomes'"),
        ('{"format": "hf_immunize.audit", "format_version": 1, "data": []}', "fields of an audit"),
    ],
)
def test_other_content_is_refused_with_a_sentence(text, found):
    with pytest.raises(DataError, match="Expected") as caught:
        from_json(text)
    assert found in str(caught.value)


def test_half_a_file_is_refused():
    text = to_json(sample_data())
    with pytest.raises(DataError, match="not JSON"):
        from_json(text[: len(text) // 2])


@pytest.mark.parametrize("name", ["/home/alice/secret/model", "~/secret/model", r"C:\Users\alice\model"])
def test_local_paths_are_called_by_their_last_part(name):
    data = make([], model=name, reference=name).without_local_paths()
    assert (data.model, data.reference) == ("model", "model")


def test_names_on_the_hub_stay():
    assert make([], model="org/model").without_local_paths().model == "org/model"


def run(**changes):
    return make([dataclasses.replace(attack("gd_line_search", "head_input", "immunized", 0.4, half=10)[0], **changes)])


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"accuracy": None}, "None"),
        ({"accuracy": float("nan")}, "nan"),
        ({"accuracy": 48.6}, "48.6"),
        ({"status": "failed"}, "failed"),
        ({"access": "backdoor"}, "backdoor"),
        ({"subject": "victim"}, "victim"),
        ({"task": "other"}, "other"),
        ({"steps": [1, 2]}, "found others"),
        ({"steps": [], "curve": [0.5]}, "found others"),
        ({"status": "diverged"}, "diverged"),
    ],
)
def test_outcomes_that_contradict_themselves_are_refused(changes, found):
    with pytest.raises(DataError, match="Expected") as caught:
        check(run(**changes))
    assert found in str(caught.value)


def test_an_audit_without_a_harmful_task_is_refused():
    with pytest.raises(DataError, match="task 'harmful'"):
        check(make([], tasks={}))


def test_what_is_lost_needs_no_accuracy():
    check(make([lost("sgd", "diverged", "NaN")]))
