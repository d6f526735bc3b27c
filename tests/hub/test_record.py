"""`immunization.json`: read back without loss, and refused by name where it is not what it should be."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_immunize.errors import RecordError, RecordVersionError
from hf_immunize.hub.card import record_rows, render_card
from hf_immunize.hub.record import (
    BaseModelRecord,
    ImmunizationRecord,
    MethodRecord,
    RatioRecord,
    read_record,
    write_record,
)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def plain(record):
    return json.loads(record.to_json())


def changed(record, path, value):
    """A record's plain values with another one at a place."""
    values = inner = plain(record)
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return values


def reread(values):
    return ImmunizationRecord.from_json(json.dumps(values))


def test_records_read_back(record, tmp_path):
    for each in (record, ImmunizationRecord(MethodRecord("kappa", "all", 0, 0), BaseModelRecord("x"))):
        write_record(tmp_path, each)
        assert read_record(tmp_path) == ImmunizationRecord.from_json(each.to_json()) == each


@given(extra=st.dictionaries(st.text(min_size=1, max_size=12).map(lambda name: f"x-{name}"), JSON, max_size=3))
def test_unknown_fields_of_a_newer_minor_version_survive_a_round_trip(extra):
    values = plain(ImmunizationRecord(MethodRecord("kappa", "all", 0, 0), BaseModelRecord("x")))
    values |= extra | {"schema_version": "1.7"}
    values["method"] |= extra
    assert plain(reread(values)) == json.loads(json.dumps(values))


def test_a_newer_major_version_has_a_name_and_without_one_it_is_no_record(record):
    for version in ("2.0", "10.3"):
        with pytest.raises(RecordVersionError, match="Update hf_immunize"):
            reread(plain(record) | {"schema_version": version, "method": "of another shape"})
    for version in (None, 1, "1", "one", "1.0.0"):
        with pytest.raises(RecordError, match="schema_version"):
            reread(plain(record) | {"schema_version": version})


def test_truncated_anywhere_is_an_error_by_name(record):
    text = record.to_json().rstrip()
    for length in range(0, len(text) - 1, 97):
        with pytest.raises(RecordError):
            ImmunizationRecord.from_json(text[:length])


def test_files_that_are_no_record_are_named(tmp_path):
    with pytest.raises(RecordError, match="carries no evidence"):
        read_record(tmp_path)
    (tmp_path / "immunization.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="decode"):
        read_record(tmp_path)
    for text in ("", "[]", "null", "3", '"x"', "[" * 100_000, "{}"):
        with pytest.raises(RecordError):
            ImmunizationRecord.from_json(text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_only_finite_numbers_are_read_and_written(record, number):
    for old in (record.metric.after, record.method.settings["auto_weight_ratio"]):  # of a known field, and of any
        text = record.to_json().replace(json.dumps(old), number, 1)
        with pytest.raises(RecordError, match="finite"):
            ImmunizationRecord.from_json(text)
    record.metric.after = float(number)
    with pytest.raises(RecordError, match="finite"):
        record.to_json()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("method", "steps"), "many", r"method\.steps"),
        (("method", "steps"), 1.5, r"method\.steps"),
        (("method", "seed"), True, r"method\.seed"),
        (("method",), None, r"record\.method"),
        (("base_model", "name"), 3, r"base_model\.name"),
        (("harmful_features", "after", "log10_kappa"), -1.0, r"harmful_features\.after\.log10_kappa"),
        (("ratios", "exact", "bound"), "sideways", r"ratios\.exact\.bound"),
        (("ratios", "exact", "log10_rir"), 1e308, r"log10_rir"),
        (("ratios", "exact", "log10_rir"), None, r"log10_rir"),
        (("benign_features", "after", "rank"), 0, r"benign_features\.after\.rank"),
        (("benign_features", "after", "rank"), 10**6, r"min\(N, D\)"),
        (("metric", "after"), 1.01, r"metric\.after"),
        (("method", "seed"), 2**32, r"method\.seed"),
        (("benign_features", "after", "sigma_min"), -1.0, r"sigma_min"),
        (("benign_features", "after", "num_samples"), -1, r"num_samples"),
        (("weights", "../../etc/passwd"), "0" * 64, r"beside the record"),
        (("weights", "model.safetensors"), "abc", r"SHA-256"),
        (("figures",), ["../secret.png"], r"figures"),
        (("audit", "strongest", "head_input", "accuracy"), 7.0, r"between 0 and 1"),
        (("remarks",), "text", r"remarks"),
        (("benign", "name"), "\ud800", r"surrogate"),
    ],
)
def test_what_cannot_be_is_named(record, path, value, message):
    with pytest.raises(RecordError, match=message):
        reread(changed(record, path, value))


def leaves(values, path=()):
    """Where a record's values stand: plain ones, and the lists and names that hold them."""
    if path:
        yield path
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, dict | list):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name)


def nested(depth, form):
    return f"{'[' * depth}{']' * depth}" if form == "list" else '{"a": ' * depth + "0" + "}" * depth


# As they stand in the file, since not all of them can be told in Python.
ODD = ["null", "true", "0", "-1", "2", "0.5", "1e-320", "1e308", "1e999", "NaN", "1000000000", str(2**64 + 1)]
ODD += [4000 * "9", 5000 * "9", '""', '"x"', '"\\u001b[2J\\u202e"', '"\\ud800"', json.dumps("../" * 9), '"</script>"']
ODD += [json.dumps(70_000 * "y"), "[]", "{}", '[""]', "[null]", '{"": null}', '{"\\u001b[2J": 1e999}', "[[1]]", "[{}]"]
ODD += [nested(depth, form) for depth in (30, 200, 900, 5000) for form in ("list", "names")]
FULL = {"exact": RatioRecord(0.5, 0.6, 0.1)}


def test_odd_values_anywhere_are_a_record_or_an_error_by_name(record):
    record.ratios, record.figures, record.remarks = FULL, ["spectra.png"], ["A remark."]
    record.audit.verdict, record.benign.classes = ["A verdict."], ["cat", "dog"]
    values = plain(record)
    started, tried, refused = time.process_time(), 0, 0
    for path in leaves(values):
        text = json.dumps(changed(record, path, "@odd@"))
        for odd in ODD:
            tried += 1
            try:
                found = ImmunizationRecord.from_json(text.replace('"@odd@"', odd))
                assert ImmunizationRecord.from_json(found.to_json()) == found
                if tried % 7 == 0:  # the slowest part
                    render_card(found)
                    str(record_rows(found))
            except RecordError as error:
                refused += 1
                assert str(error).isprintable()
                assert len(str(error)) < 1000
    assert tried > 2000
    assert refused > tried / 2
    assert time.process_time() - started < 120


def test_missing_field_is_named(record):
    values = plain(record)
    del values["method"]["objective"]
    with pytest.raises(RecordError, match=r"method\.objective"):
        reread(values)
