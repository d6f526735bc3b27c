"""Whatever an audit finds, its report can be made, and claims nothing that the numbers cannot bear."""

import json

from audit_sample import make
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_immunize.audit.report import AuditReport
from hf_immunize.audit.result import Outcome, Utility
from hf_immunize.audit.verdict import CLAIMS, SIDE_CLAIMS, Kind, judge


share = st.floats(0, 1)


@st.composite
def outcomes(draw, subjects=("immunized", "reference"), statuses=("done", "diverged", "skipped")):
    status = draw(st.sampled_from(statuses))
    steps = draw(st.sampled_from([[], [0], [1, 10], [0, 5, 100]]))
    return Outcome(
        attacker=draw(st.sampled_from(["gd_line_search", "ridge", "lora_r8"])),
        access=draw(st.sampled_from(["head_input", "any_layer", "fine_tuning"])),
        subject=draw(st.sampled_from(subjects)),
        task=draw(st.sampled_from(["harmful", "harmful", "unseen", "benign", "unrelated"])),
        layer=draw(st.sampled_from(["a", "b"])),
        seed=draw(st.integers(0, 4)),
        precision="float64",
        status=status,
        note=draw(st.sampled_from(["", "NaN"])),
        accuracy=draw(share) if status == "done" else None,
        steps=steps,
        curve=[draw(share) for _ in steps],
    )


@st.composite
def utilities(draw):
    now, before = draw(share), draw(st.none() | share)
    if before is None:
        return Utility(draw(st.integers(0, 1000)), now)
    width = draw(share)
    interval = draw(st.sampled_from([None, (now - before - width, now - before + width)]))
    return Utility(draw(st.integers(0, 1000)), now, before, now - before, interval)


@settings(max_examples=30, deadline=None)
@given(st.lists(outcomes(), max_size=25), st.none() | utilities())
def test_every_audit_has_a_verdict_a_card_and_tables(found, utility):
    report = AuditReport(make(found, utility=utility))
    assert all(one.endswith(".") and "None" not in one and "nan" not in one for one in report.verdict())
    json.dumps(report.for_card(), allow_nan=False)
    assert report.summary() and len(report.tables()["outcomes"]) == len(found)
    assert AuditReport.from_json(report.to_json()).data == report.data


@settings(max_examples=60, deadline=None)
@given(st.lists(outcomes(subjects=("immunized",)), max_size=30), utilities())
def test_without_a_reference_there_is_no_claim(found, utility):
    assert not {one.kind for one in judge(make(found, utility=utility))} & (CLAIMS | {Kind.SLOWED})


@settings(max_examples=60, deadline=None)
@given(st.lists(outcomes(), max_size=25), st.floats(0.15, 1))
def test_of_a_model_that_lost_its_use_there_is_no_claim(found, lost):
    utility = Utility(1000, 1 - lost, 1.0, -lost, (-lost, -lost))
    findings = judge(make(found, utility=utility))
    assert findings[0].kind is Kind.BROKEN
    assert not {one.kind for one in findings} & (CLAIMS | SIDE_CLAIMS)


@settings(max_examples=60, deadline=None)
@given(st.lists(outcomes(subjects=("reference",), statuses=("done",)), max_size=20))
def test_a_model_equal_to_its_reference_is_never_called_resistant(found):
    # The last run of a seed counts on both sides, so that both are the same.
    same = [Outcome(**vars(one) | {"subject": "immunized"}) for one in found]
    kinds = {one.kind for one in judge(make([*found, *same]))}
    assert not kinds & {Kind.REDUCED, Kind.SLOWED, Kind.PREVENTED}


@settings(max_examples=60, deadline=None)
@given(st.lists(outcomes(statuses=("diverged", "skipped")), max_size=20))
def test_attacks_without_a_result_are_never_resistance(found):
    data = make(found)
    assert not {one.kind for one in judge(data)} & (CLAIMS | {Kind.SLOWED})
    at_head = [one.kind for one in judge(data) if (one.access, one.task) == ("head_input", "harmful")]
    assert at_head == [Kind.NOT_TESTED]
