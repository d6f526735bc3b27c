"""The report of an audit: tables, JSON, words, and one HTML file that needs nothing else."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas

from hf_immunize.audit import report as serialization
from hf_immunize.audit import statistics as limit
from hf_immunize.audit.names import clean, label, percent, points, ratio, signed
from hf_immunize.audit.result import AuditResult, FeatureSpectrum, Outcome, TaskSummary, Utility
from hf_immunize.audit.statistics import (
    ACCESSES,
    SUBJECTS,
    TARGET_SHARES,
    Deviation,
    StepsRatio,
    Summary,
    accuracy_interval,
    deviations,
    explain,
    gap,
    matched,
    of_class,
    reached,
    steps_ratios,
    strongest,
    summarize,
)
from hf_immunize.audit.verdict import CLASS_KINDS, UTILITY_KINDS, Judgment, Kind, judge
from hf_immunize.errors import DataError
from hf_immunize.files import staged_directory
from hf_immunize.text import csv_cell, public_name


if TYPE_CHECKING:
    import pandas


FORMAT = "hf_immunize.audit"
FORMAT_VERSION = 1
_STATUSES = ("done", "diverged", "skipped")
# JSON has no infinity; such a number becomes an object of this one key.
_NON_FINITE = "non_finite"


def to_json(data: AuditResult, measures: Mapping[str, Any] | None = None) -> str:
    """Write what an audit found as JSON that every parser reads: numbers are finite.

    Args:
        data: What it found. Tuples and NumPy's numbers come back as lists and plain numbers, objects as their text.
        measures: What follows from it, for other programs; `from_json` computes it anew.

    Returns:
        The JSON.
    """
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, "data": _encode(asdict(data))}
    if measures is not None:
        content["measures"] = _encode(measures)
    return json.dumps(content, indent=1, allow_nan=False)


def from_json(text: str) -> AuditResult:
    """Read back what `to_json` wrote.

    Args:
        text: The JSON.

    Returns:
        What the audit found.

    Raises:
        DataError: If it is not JSON, or not of an audit; the first thing amiss is named.
    """
    remedy = "Run the audit again, or give the audit.json that it wrote."
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"Expected the JSON of an audit, found text that is not JSON ({error}). {remedy}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"Expected JSON of the format {FORMAT!r}, found other content. {remedy}")
    if content.get("format_version") != FORMAT_VERSION:
        found = content.get("format_version")
        raise DataError(
            f"Expected format version {FORMAT_VERSION}, found {found!r}. Read it with the release it is of."
        )
    try:
        data = _decode(content["data"])
        data["tasks"] = {name: TaskSummary(**task) for name, task in data["tasks"].items()}
        data["outcomes"] = [Outcome(**one) for one in data["outcomes"]]
        data["spectra"] = [FeatureSpectrum(**one) for one in data["spectra"]]
        if data["utility"] is not None:
            interval = data["utility"]["interval"]
            data["utility"] = Utility(**data["utility"] | {"interval": interval and tuple(interval)})
        found = AuditResult(**data)
        check(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"Expected the fields of an audit, found that {error}. {remedy}") from error
    return found


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return _encode(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return {_NON_FINITE: str(value)}
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_NON_FINITE}:
            return float(value[_NON_FINITE])
        return {key: _decode(item) for key, item in value.items()}
    return [_decode(item) for item in value] if isinstance(value, list) else value


def without_local_paths(data: AuditResult) -> AuditResult:
    """The same, models and data sets from an absolute path called by their last part: reports are handed on.

    Args:
        data: What an audit found.

    Returns:
        A copy; names on the Hub and relative paths stay.
    """
    tasks = {name: replace(task, dataset=public_name(task.dataset)) for name, task in data.tasks.items()}
    reference = None if data.reference is None else public_name(data.reference)
    return replace(data, model=public_name(data.model), reference=reference, tasks=tasks)


def check(data: AuditResult) -> None:
    """Refuse numbers that would make a report say what nobody measured.

    Args:
        data: What an audit found.

    Raises:
        DataError: An unknown class, subject or status; a task that is not described; an accuracy that is not between
            0 and 1; a curve without its steps.
    """
    if "harmful" not in data.tasks:
        raise DataError("Expected the task 'harmful' among the tasks, found none; describe it in AuditResult.tasks.")
    for task in data.tasks.values():
        _share(task.chance, f"as chance of the task {task.name!r}")
    for one in data.outcomes:
        where = f"of {one.attacker!r} on {one.subject!r}, task {one.task!r}, layer {one.layer!r}, seed {one.seed}"
        for name, allowed in (
            ("access", ACCESSES),
            ("subject", SUBJECTS),
            ("status", _STATUSES),
            ("task", data.tasks),
        ):
            if getattr(one, name) not in allowed:
                found = getattr(one, name)
                raise DataError(f"Expected one of {', '.join(allowed)} as {name} {where}, found {found!r}.")
        if len(one.steps) != len(one.curve) or list(one.steps) != sorted(one.steps):
            raise DataError(f"Expected ascending steps, one for each point of the curve, {where}; found others.")
        for value in [*one.curve, *([one.accuracy] if one.status == "done" else [])]:
            _share(value, where, " Record an attack whose numbers are lost as diverged, without them.")
        if one.status != "done" and one.accuracy is not None:
            raise DataError(f"Expected no accuracy where status is {one.status!r}, found {one.accuracy} {where}.")
    for value in data.accuracies:
        _share(value, "to count the steps to")
    if data.utility is not None:
        for value in (data.utility.immunized, data.utility.reference):
            if value is not None:
                _share(value, "as benign accuracy")


def _share(value: object, where: str, remedy: str = "") -> None:
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:  # NaN is not
        raise DataError(f"Expected an accuracy between 0 and 1 {where}, found {value!r}.{remedy}")


PLACES = {
    "head_input": "at the classifier's input",
    "any_layer": "at any layer",
    "fine_tuning": "by fine-tuning",
}
CLASSES = {
    "head_input": "Probes at the classifier's input",
    "any_layer": "Probes at any layer",
    "fine_tuning": "Fine-tuning",
}
_TASKS = {"harmful": "the harmful task", "unseen": "harmful classes it never saw"}
_BOUNDS = {"lower": "at least ", "upper": "at most "}
_LISTED = 6
_WITHHELD = {
    Kind.BROKEN.value: "the model is broken",
    Kind.MAYBE_BROKEN.value: "the model may be broken",
    Kind.NO_UTILITY.value: "there was no benign accuracy to keep",
}


def times(one: StepsRatio) -> str:
    """A ratio of steps, "at least" where it is a bound.

    Returns:
        Such as "1.2 times" or "at least 125 times".
    """
    return f"{'at least ' if one.is_bound else ''}{ratio(one.ratio)} times"


def sentences(data: AuditResult) -> list[str]:
    """The verdict in plain language, the most important first.

    Args:
        data: What the audit found.

    Returns:
        One sentence or two for each finding.
    """
    return [sentence(one, data) for one in judge(data)]


def sentence(finding: Judgment, data: AuditResult) -> str:
    """A finding in plain language.

    Args:
        finding: Of `judge`.
        data: What the audit found.

    Returns:
        One sentence or two.
    """
    kind = finding.kind
    if kind in UTILITY_KINDS:
        return _utility(kind, data)
    if finding.access and kind in _CLASS_KINDS:
        return _class(finding, data)
    if finding.ratios:
        return _speed_words(finding)
    if finding.attacks:
        return _caution(finding)
    if kind is Kind.NO_REFERENCE:
        return (
            "No reference was attacked: whether anything is slowed, reduced or prevented, compared with the model "
            "before immunization, cannot be said."
        )
    if kind is Kind.NOTHING_STOPPED:
        return (
            "Nothing is stopped: every class of attackers that was tested reads the harmful task about as well as "
            "from the reference, and none is slowed."
        )
    return _ratio(finding, data)


_CLASS_KINDS = CLASS_KINDS | {
    Kind.ONE_LAYER_AWAY,
    Kind.NO_STEPS_NEEDED,
    Kind.AT_RANDOM,
    Kind.TASK_LOST,
    Kind.MAYBE_TASK_LOST,
}


def _utility(kind: Kind, data: AuditResult) -> str:
    utility = data.utility
    if utility is None:
        return (
            "Benign accuracy was not measured. A model that has forgotten everything resists everything, so no "
            "resistance is claimed."
        )
    now = f"benign accuracy is {percent(utility.immunized)} on {utility.size:,} images"
    chance = f" ({percent(data.tasks['benign'].chance)})" if "benign" in data.tasks else ""
    if utility.reference is None or utility.difference is None:
        if kind is Kind.BROKEN:
            return f"The model is broken: {now}, hardly above chance{chance}. No resistance is claimed."
        now = now[:1].upper() + now[1:]
        return f"{now}; without the reference's it is not known what was lost, so no resistance is claimed."
    change = f"a difference of {signed(utility.difference)} points"
    if utility.interval is not None:
        change += f", 95% interval {signed(utility.interval[0])} to {signed(utility.interval[1])}"
    now += f", the reference's {percent(utility.reference)} ({change})"
    if kind is Kind.BROKEN:
        return f"The model is broken: {now}. A model that forgets resists everything, so no resistance is claimed."
    if kind is Kind.MAYBE_BROKEN:
        few = "but the interval includes no loss at all, so no resistance is claimed"
        return f"The model may be broken, {few}: {now}. More benign test images decide."
    if kind is Kind.NO_UTILITY:
        few = "so that nothing shows what the immunization costs, and no resistance is claimed"
        return f"The reference itself is not clearly above chance{chance} on the benign task, {few}: {now}."
    if kind is Kind.SERIOUS_DROP:
        return f"The price is a serious drop in benign accuracy: {now}."
    if kind is Kind.MAYBE_SERIOUS:
        return (
            f"A serious drop in benign accuracy, of {points(limit.SERIOUS_DROP)} or more, cannot be ruled out: {now}."
        )
    return f"The model keeps its benign accuracy: {now}."


def _class(finding: Judgment, data: AuditResult) -> str:
    kind, worst, reference = finding.kind, finding.worst, finding.reference
    place, target = PLACES[finding.access], _TASKS.get(finding.task, f"the {finding.task} task")
    if worst is None:
        why = "; ".join(dict.fromkeys(clean(note, 160) for one in finding.attacks for note in one.notes))
        ended = f" Every attack was skipped or diverged{f' ({why})' if why else ''}." if finding.attacks else ""
        subject = f"{CLASSES[finding.access]} {'were' if 'Probes' in CLASSES[finding.access] else 'was'} not tested"
        return f"{subject} on {target}: that is no sign of resistance.{ended}"
    chance = data.tasks[finding.task].chance
    ours = _reads(worst, reference, chance)
    where = f"Reading {target} {place}" if finding.access != "fine_tuning" else f"Learning {target} by fine-tuning"
    if kind is Kind.NOTHING_TO_PROTECT:
        read = f"even from the reference the strongest attacker reads {percent(reference.mean if reference else None)}"
        return (
            f"{where}: inconclusive, as there was nothing to protect; {read}, hardly above chance ({percent(chance)})."
        )
    if kind is Kind.INCONCLUSIVE:
        if reference is not None and worst.lower > chance + limit.PREVENTED_POINTS:
            # Whatever the doubt, what is read is read.
            return f"{where} is not prevented; how far it is reduced is inconclusive, as {finding.reason}: {ours}."
        return f"{where}: inconclusive, as {finding.reason}; {ours}."
    if kind is Kind.PREVENTED:
        within = f" within {worst.budget:,} steps" if worst.budget and finding.access == "fine_tuning" else ""
        return f"{where} is prevented against the attackers tried{within}: {ours}."
    if kind is Kind.REDUCED:
        assert reference is not None
        return f"{where} is reduced by {points(gap(reference, worst)[0])}, not prevented: {ours}."
    if kind is Kind.NOT_PREVENTED:
        return f"{where} is not prevented: {ours}."
    if kind is Kind.WITHHELD:
        why = _WITHHELD.get(finding.reason, "benign accuracy was not compared")
        return f"{where}: no claim, as {why}; {ours}."
    return _comparison(finding, ours)


def _comparison(finding: Judgment, ours: str) -> str:
    worst, reference, other = finding.worst, finding.reference, finding.other
    assert worst is not None
    if finding.kind is Kind.ONE_LAYER_AWAY:
        assert other is not None
        return (
            f"The information is one layer away: at the classifier's input the strongest attacker reads "
            f"{percent(other.mean)}, but at an earlier layer, {clean(worst.layer)}, {percent(worst.mean)}."
        )
    if finding.kind is Kind.AT_RANDOM:
        assert other is not None
        return (
            f"The immunized weights give attackers {PLACES[finding.access]} no more than random weights do: "
            f"{percent(worst.mean)} against {percent(other.mean)}."
        )
    assert reference is not None
    if finding.kind is Kind.NO_STEPS_NEEDED:
        return (
            f"Slowed but not prevented {PLACES[finding.access]}: {label(worst.attacker)} takes no gradient steps and "
            f"reads {percent(worst.mean)} at once (reference {percent(reference.mean)})."
        )
    lost, (low, high) = gap(reference, worst)
    if finding.kind is Kind.MAYBE_TASK_LOST:
        width = f"95% interval {signed(low)} to {signed(high)} points"
        return f"The {finding.task} task may lose {points(lost)} {PLACES[finding.access]}, {width}: {ours}."
    return f"The {finding.task} task loses {points(lost)} {PLACES[finding.access]}: {ours}."


def _reads(one: Summary, reference: Summary | None, chance: float) -> str:
    layer = f" at {clean(one.layer)}" if one.access == "any_layer" else ""
    count = len(one.accuracies)
    seeds = f"{count} seed{'s' if count > 1 else ''}"
    images = f"{one.test_size:,} test images"
    # What does not depend on the seed has test images alone to doubt.
    over = f"{seeds} and {images}" if one.interval else f"{images}, {seeds}"
    ends = one.ends or (0.0, 1.0)
    interval = f"95% interval {percent(ends[0])} to {percent(ends[1])} over {over}"
    before = f"; reference {percent(reference.mean)}" if reference else ""
    attacker = f"the strongest attacker, {label(one.attacker)}{layer}, reads {percent(one.mean)}"
    return f"{attacker} ({interval}{before}; chance {percent(chance)})"


def _listed(items: Iterable[str]) -> str:
    names = list(dict.fromkeys(items))
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _speed_words(finding: Judgment) -> str:
    listed = _listed(f"{label(one.attacker)} ({times(one)} the steps)" for one in finding.ratios)
    wide = _listed(f"{label(one.attacker)} ({times(one)} the steps{_wide(one)})" for one in finding.ratios)
    where = "in fine-tuning" if finding.access == "fine_tuning" else PLACES.get(finding.access, "")
    if finding.kind is Kind.SLOWED:
        goal = f"{limit.TARGET_SHARES[-1]:.0%} of what the attacker reads on the reference above chance"
        return f"Slowed {where}, in steps to {goal}: {listed}."
    if finding.kind is Kind.MAYBE_SLOWED:
        reach = f"the interval over seeds and test images reaches below {limit.SLOWED_RATIO:.0f} times"
        return f"Perhaps slowed {where}, but {reach}: {wide}."
    if finding.kind is Kind.SPEED_UNKNOWN:
        return (
            f"Whether it is slowed {where} is not distinguishable, as the interval over seeds and test images holds "
            f"both no slowing at all and {limit.SLOWED_RATIO:.0f} times: {wide}."
        )
    if finding.kind is Kind.NOT_SLOWED:
        return f"Not slowed {limit.SLOWED_RATIO:.0f} times or more {where}: {listed}."
    if finding.kind is Kind.FEW_SEEDS:
        return f"Perhaps slowed {where}, but fewer than {limit.MIN_SEEDS} seeds are too few for an interval: {listed}."
    if finding.kind is Kind.MAYBE_BENIGN_SLOWED:
        return f"Benign probing may be slowed too, but the test images or seeds are too few to be sure: {wide}."
    return f"Benign probing is slowed too: {listed}."


def _wide(one: StepsRatio) -> str:
    if one.interval is None:
        return ""
    low, high = one.interval
    open_end = f"at least {ratio(low)}" if math.isinf(high) else f"{ratio(low)} to {ratio(high)}"
    return f", 95% interval {open_end}"


def _caution(finding: Judgment) -> str:
    names = _attack_words(finding.attacks)
    if finding.kind is Kind.DIVERGED:
        return f"Diverged, listed and never counted as resistance: {names}."
    if finding.kind is Kind.SKIPPED:
        return f"Skipped, so that the worst case is over the rest: {names}."
    if finding.kind is Kind.OUT_OF_BUDGET:
        return f"Ran out of budget while still improving, so that more steps may reach more: {names}."
    return f"Fewer than {limit.MIN_SEEDS} seeds, too few for an interval over seeds and for claims: {names}."


def _attack_words(attacks: Sequence[Summary]) -> str:
    def name(one: Summary) -> str:
        whose = "" if one.subject == "immunized" else f" of {one.subject}"
        # What fine-tuning moves is in its name.
        where = "" if one.access == "fine_tuning" else f" on {clean(one.layer, 40)}"
        return f"{label(one.attacker)}{where}{whose}"

    return _listed(map(name, attacks))


def _ratio(finding: Judgment, data: AuditResult) -> str:
    assert finding.worst is not None
    value, bound = data.rir.get("rir"), data.rir.get("bound")
    if bound == "undetermined" or value is None or math.isnan(value):
        said = "The relative immunization ratio is undetermined, as both tasks lost rank"
    else:
        said = f"The relative immunization ratio is {_BOUNDS.get(str(bound), '')}{ratio(value)}"
    return (
        f"{said}; it says how gradient descent on the features is conditioned, not what can be read: the strongest "
        f"attacker of all, {label(finding.worst.attacker)}, reads {percent(finding.worst.mean)}."
    )


_HEADLINE = ["access", "attacker", "layer", "precision", "accuracy", "low", "high", "seeds"]
_HEADLINE += [f"reference_{name}" for name in ("attacker", "layer", "accuracy", "low", "high")]
_HEADLINE += [
    "gap",
    "gap_low",
    "gap_high",
    "random_accuracy",
    "chance",
    "steps_ratio",
    "steps_ratio_is_bound",
    "finding",
]
_SIDES = [f"{subject}_{name}" for subject in SUBJECTS for name in ("attacker", "accuracy", "low", "high")]
_OUTCOMES = [field.name for field in fields(Outcome) if field.name not in ("steps", "curve")]
_OUTCOMES += ["best_accuracy", "last_step"]
_DEVIATION = ["operator", "layer", "precision", "absolute", "absolute_low", "absolute_high"]
_DEVIATION += ["signed", "signed_low", "signed_high", "seeds"]
_STEPS = ["attacker", "access", "task", "layer", "precision", "share", "target", "immunized_steps", "reference_steps"]
_STEPS += ["ratio", "low", "high", "is_bound", "seeds"]
_ATTACKS = ["attacker", "access", "subject", "task", "layer", "precision", "accuracy", "low", "high", "seeds"]
_ATTACKS += ["gap", "gap_low", "gap_high", "seconds", "seconds_low", "seconds_high"]
_ATTACKS += ["diverged", "skipped", "last_step", "note"]
_CURVES = ["attacker", "access", "subject", "task", "layer", "precision", "step", "accuracy", "low", "high", "seeds"]


def make_tables(data: AuditResult) -> dict[str, pandas.DataFrame]:
    """All tables of an audit; accuracies and differences between 0 and 1, missing numbers NaN.

    Args:
        data: What it found.

    Returns:
        "headline" (worst case by class of attackers), "layers" (best probe at each layer), "fine_tuning" (operator by
        budget), "deviation" (relative fine-tuning deviation, in per cent), "steps" (how many times the steps), "tasks"
        (worst case on the other tasks), "curves" (accuracy after each step over the seeds), "attacks" (every attack
        over its seeds, with its gap to the reference and its time) and "outcomes" (every run).
    """
    summaries = summarize(data)
    tasks = [task for task in data.tasks if task != "harmful"]
    other = [
        {"task": task, **row}
        for task in tasks
        for row in _worst_cases(data, summaries, task)
        if row["accuracy"] is not None
    ]
    return {
        "headline": headline_table(data),
        "layers": _frame(_layers(summaries), ["layer", "chance", *_SIDES, "gap"], chance=data.tasks["harmful"].chance),
        "fine_tuning": _frame(
            _budgets(data), ["operator", "budget_steps", *[f"{s}_accuracy" for s in SUBJECTS], "gap"]
        ),
        "deviation": _frame([_deviation(one) for one in deviations(data)], _DEVIATION),
        "steps": _frame([_steps(one) for task in data.tasks for one in steps_ratios(data, task)], _STEPS),
        "tasks": _frame(other, ["task", *_HEADLINE]),
        "curves": _frame(_curves(data), _CURVES),
        "attacks": _frame(_attacks_table(summaries), _ATTACKS),
        "outcomes": _frame([_outcome(one) for one in data.outcomes], _OUTCOMES),
    }


def headline_table(data: AuditResult) -> pandas.DataFrame:
    """The worst case by class of attackers on the harmful task, one row a class, "not tested" ones included.

    Args:
        data: What the audit found.

    Returns:
        The table "headline" of `make_tables`, alone and so faster.
    """
    return _frame(_worst_cases(data, summarize(data), "harmful"), _HEADLINE)


def _frame(rows: Sequence[dict[str, Any]], columns: Sequence[str], **constant: Any) -> pandas.DataFrame:
    cells = [{name: _writable(value) for name, value in {**constant, **row}.items()} for row in rows]
    frame = pandas.DataFrame(cells, columns=list(columns))
    for name in columns:
        # A column of missing numbers alone would hold None, not NaN.
        if all(value is None or type(value) in (int, float) for value in frame[name].tolist()):
            frame[name] = pandas.to_numeric(frame[name])
    return frame


def _writable(value: Any) -> Any:
    """Halves of surrogate pairs, as in names of files that are not UTF-8, fit in no data frame."""
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def _ends(interval: tuple[float, float] | None) -> tuple[float | None, float | None]:
    return interval or (None, None)


def _worst_cases(data: AuditResult, summaries: Sequence[Summary], task: str) -> list[dict[str, Any]]:
    rows = []
    # Of the whole verdict: a claim may be withheld.
    said = {(one.access, one.task): one.kind.value for one in judge(data) if one.kind in CLASS_KINDS}
    ratios = {
        (one.attacker, one.access, one.layer, one.precision): one
        for one in steps_ratios(data, task)
        if one.share == TARGET_SHARES[-1]
    }
    for access in ACCESSES:
        own = of_class(summaries, "immunized", task, access)
        worst = strongest(own)
        theirs, random = (
            strongest(matched(of_class(summaries, subject, task, access), own)) for subject in ("reference", "random")
        )
        row: dict[str, Any] = dict.fromkeys(_HEADLINE) | {"access": access, "chance": data.tasks[task].chance}
        row["finding"] = said.get((access, task))
        if worst is not None:
            row |= {"attacker": worst.attacker, "layer": worst.layer, "precision": worst.precision}
            row |= {"accuracy": worst.mean, "seeds": len(worst.accuracies)}
            row["low"], row["high"] = _ends(worst.ends)
            ratio = ratios.get((worst.attacker, worst.access, worst.layer, worst.precision))
            if ratio is not None:
                row |= {"steps_ratio": ratio.ratio, "steps_ratio_is_bound": ratio.is_bound}
        if worst is not None and theirs is not None:
            row |= {"reference_attacker": theirs.attacker, "reference_layer": theirs.layer}
            row["reference_accuracy"] = theirs.mean
            row["reference_low"], row["reference_high"] = _ends(theirs.ends)
            row["gap"], interval = gap(theirs, worst)
            row["gap_low"], row["gap_high"] = _ends(interval)
        row["random_accuracy"] = random and random.mean
        rows.append(row)
    return rows


def _layers(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """Best probe at each layer by subject, the layers in the audit's order, the classifier's input last."""
    probes = [one for one in summaries if one.task == "harmful" and one.access != "fine_tuning"]
    order = dict.fromkeys(one.layer for one in sorted(probes, key=lambda one: one.access == "head_input"))
    rows = []
    for layer in order:
        row: dict[str, Any] = {"layer": layer}
        here = [one for one in probes if one.layer == layer]
        own = [one for one in here if one.subject == "immunized"]
        best = {s: strongest(matched([one for one in here if one.subject == s], own)) for s in SUBJECTS}
        for subject, one in best.items():
            if one is not None:
                low, high = _ends(one.ends)
                values = (one.attacker, one.mean, low, high)
                row |= dict(
                    zip([f"{subject}_{n}" for n in ("attacker", "accuracy", "low", "high")], values, strict=True)
                )
        if best["immunized"] and best["reference"]:
            row["gap"] = gap(best["reference"], best["immunized"])[0]
        rows.append(row)
    return rows


def _budgets(data: AuditResult) -> list[dict[str, Any]]:
    """Best accuracy that fine-tuning came to within an eighth, a quarter, a half and all of the steps."""
    runs = [one for one in data.outcomes if (one.access, one.task) == ("fine_tuning", "harmful")]
    runs = [one for one in runs if one.status == "done" and one.curve]
    measured = sorted({step for one in runs for step in one.steps if step > 0})
    if not measured:
        return []
    wanted = [measured[-1] / part for part in (8, 4, 2, 1)]
    budgets = sorted({min(measured, key=lambda step: abs(step - budget)) for budget in wanted})
    rows = []
    for operator in dict.fromkeys(one.attacker for one in runs):
        for budget in budgets:
            row: dict[str, Any] = {"operator": operator, "budget_steps": budget}
            for subject in SUBJECTS:
                # Over precisions and layers the best counts, within each the mean over seeds.
                groups: dict[tuple[str, str], list[float]] = {}
                for one in runs:
                    within = [value for step, value in zip(one.steps, one.curve, strict=True) if step <= budget]
                    if (one.attacker, one.subject) == (operator, subject) and within:
                        groups.setdefault((one.layer, one.precision), []).append(max(within))
                if groups:
                    row[f"{subject}_accuracy"] = max(sum(values) / len(values) for values in groups.values())
            if {"immunized_accuracy", "reference_accuracy"} <= row.keys():
                row["gap"] = row["reference_accuracy"] - row["immunized_accuracy"]
            rows.append(row)
    return rows


def _deviation(one: Deviation) -> dict[str, Any]:
    row = asdict(one) | {"operator": one.attacker}
    for name, interval in (("absolute", one.absolute_interval), ("signed", one.signed_interval)):
        row[f"{name}_low"], row[f"{name}_high"] = _ends(interval)
    return row


def _steps(one: StepsRatio) -> dict[str, Any]:
    row = asdict(one)
    low, high = _ends(one.interval)
    return row | {"immunized_steps": one.immunized, "reference_steps": one.reference, "low": low, "high": high}


def _attacks_table(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    def key(one: Summary) -> tuple[str, ...]:
        return one.attacker, one.access, one.task, one.layer, one.precision

    references = {key(one): one for one in summaries if one.subject == "reference" and one.mean is not None}
    rows = []
    for one in summaries:
        low, high = _ends(one.ends)
        row = asdict(one) | {"accuracy": one.mean, "low": low, "high": high, "seeds": len(one.accuracies)}
        row["seconds_low"], row["seconds_high"] = _ends(one.seconds_interval)
        if one.subject != "reference" and one.mean is not None and key(one) in references:
            row["gap"], interval = gap(references[key(one)], one)
            row["gap_low"], row["gap_high"] = _ends(interval)
        rows.append(row | {"last_step": one.budget, "note": "; ".join(one.notes)})
    return rows


def _curves(data: AuditResult) -> list[dict[str, Any]]:
    points: dict[tuple[Any, ...], list[float]] = {}
    images: dict[tuple[Any, ...], int] = {}
    for one in data.outcomes:
        for step, value in zip(one.steps, one.curve, strict=True):
            key = (one.attacker, one.access, one.subject, one.task, one.layer, one.precision, step)
            points.setdefault(key, []).append(value)
            images[key] = data.tested_images(one)
    rows = []
    for key, values in points.items():
        mean, (low, high) = accuracy_interval(values, images[key])
        rows.append(dict(zip(_CURVES, (*key, mean, low, high, len(values)), strict=True)))
    return rows


def _outcome(one: Outcome) -> dict[str, Any]:
    row = asdict(one)
    row["best_accuracy"] = reached(one) if one.status == "done" else None
    row["last_step"] = one.steps[-1] if one.steps else None
    row["settings"] = json.dumps(one.settings, sort_keys=True)
    return row


class AuditReport:
    """What an audit found, for people and for programs.

    Args:
        data: What it found. Models and data sets named by an absolute path are called by its last part.

    Raises:
        DataError: If the numbers contradict themselves, such as an accuracy above 1.

    Example:
        >>> from hf_immunize.audit.result import Outcome, TaskSummary
        >>> task = TaskSummary("harmful", "cars", train_size=300, test_size=1000, num_classes=10, chance=0.1)
        >>> run = Outcome("ridge", "head_input", "immunized", "harmful", "classifier", 0, "float64", accuracy=0.8)
        >>> report = AuditReport(AuditResult("my/model", None, "quick", 1, {}, {"harmful": task}, [run]))
        >>> report.for_card()["strongest"]["head_input"]["accuracy"]
        0.8
        >>> report.for_card()["strongest"]["fine_tuning"] is None
        True
    """

    def __init__(self, data: AuditResult) -> None:
        serialization.check(data)
        self.data = serialization.without_local_paths(data)

    def tables(self) -> dict[str, pandas.DataFrame]:
        """Data frames by name; see `hf_immunize.audit.report.make_tables`."""
        from hf_immunize.audit.report import make_tables

        return make_tables(self.data)

    def verdict(self) -> list[str]:
        """What is prevented, slowed and neither, in plain language, the most important first."""
        return sentences(self.data)

    def to_json(self) -> str:
        """Everything as JSON, without loss and with finite numbers only.

        Returns:
            The JSON: under "data" what was found, under "measures" the tables that follow from it, rows of plain
            values, so that another program need not compute them.
        """
        measures = {name: _records(table) for name, table in self.tables().items() if name != "outcomes"}
        return serialization.to_json(self.data, measures)

    @classmethod
    def from_json(cls, text: str) -> AuditReport:
        """The report of what `to_json` wrote.

        Args:
            text: The JSON.

        Raises:
            DataError: If it is not the JSON of an audit.
        """
        return cls(serialization.from_json(text))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AuditReport:
        """The report that `write` left in a folder.

        Args:
            path: The folder, or its ``audit.json``.

        Raises:
            DataError: If there is none, or it is not the JSON of an audit.
        """
        path = Path(path)
        path = path / "audit.json" if path.is_dir() else path
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"Expected the audit.json of an audit, found that {path} cannot be read: {error}."
            ) from error
        return cls.from_json(text)

    def for_card(self) -> dict[str, Any]:
        """The short form for a model card.

        Returns:
            Plain JSON: "preset", "preset_version", "strongest" (attacker, layer, accuracy, reference_accuracy and
            chance by class of attackers, None where none was tested), "utility" (None where it was not measured) and
            "verdict" (sentences; names in them come from outside, so escape them for where they go).
        """
        from hf_immunize.audit.report import headline_table

        rows = headline_table(self.data).set_index("access")
        names = ("attacker", "layer", "accuracy", "reference_accuracy", "chance")
        utility = self.data.utility
        return {
            "preset": self.data.preset,
            "preset_version": self.data.preset_version,
            "strongest": {
                access: {name: _plain(rows.loc[access, name]) for name in names}
                if _plain(rows.loc[access, "accuracy"]) is not None
                else None
                for access in ACCESSES
            },
            "utility": utility
            and {
                "size": utility.size,
                "immunized": utility.immunized,
                "reference": utility.reference,
                "difference": utility.difference,
                "interval": list(utility.interval) if utility.interval else None,
            },
            "verdict": self.verdict(),
        }

    def summary(self) -> str:
        """The short form for a terminal: the headline and the verdict, as plain text.

        Returns:
            Lines without control characters. For rich, print it with ``markup=False``.
        """
        data = self.data
        lines = [f"Audit of {clean(data.model)} (preset {clean(data.preset)}, version {data.preset_version})"]
        lines += [f"reference: {clean(data.reference)}" if data.reference else "no reference", "", "Worst case:"]
        for row in self._headline():
            if not row["tested"]:
                lines.append(f"  {row['class']}: not tested")
                continue
            against = f"reference {row['reference']}, chance {row['chance']}"
            lines.append(f"  {row['class']}: {row['accuracy']} ({against}) by {row['attacker']}")
        lines += ["", "Verdict:", *(f"  - {one}" for one in self.verdict())]
        lines += ["", "Mind:", *(f"  - {clean(one, 300)}" for one in data.warnings)] if data.warnings else []
        return "\n".join(lines)

    def _headline(self) -> list[dict[str, Any]]:
        from hf_immunize.audit.report import headline_table

        rows = []
        for row in _records(headline_table(self.data)):
            bound = "≥ " if row["steps_ratio_is_bound"] else ""
            rows.append(
                {
                    "class": CLASSES[row["access"]],
                    "tested": row["accuracy"] is not None,
                    "attacker": label(row["attacker"]) if row["attacker"] else "–",
                    "layer": clean(row["layer"]) if row["layer"] else "–",
                    "accuracy": percent(row["accuracy"]),
                    "interval": _range(row["low"], row["high"]),
                    "seeds": row["seeds"],
                    "reference": percent(row["reference_accuracy"]),
                    "reference_attacker": label(row["reference_attacker"]) if row["reference_attacker"] else "–",
                    "gap": signed(row["gap"]),
                    "random": percent(row["random_accuracy"]),
                    "chance": percent(row["chance"]),
                    "steps": "–" if row["steps_ratio"] is None else f"{bound}{ratio(row['steps_ratio'])} ×",
                    "finding": row["finding"],
                }
            )
        return rows

    def to_html(self) -> str:
        """The report as one HTML file: no network, no script, its figures within."""
        from jinja2 import Environment, StrictUndefined

        from hf_immunize.audit.figures import draw_all

        tables = self.tables()
        source = files("hf_immunize.audit").joinpath("templates/report.html.jinja").read_text(encoding="utf-8")
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.filters |= {"percent": percent, "clean": clean, "label": label, "ratio": ratio, "range": _range}
        environment.filters |= {"signed": signed, "deviation": lambda value: f"{signed(value / 100)}%"}
        return environment.from_string(source).render(
            data=self.data,
            findings=[(one, sentence(one, self.data)) for one in judge(self.data)],
            headline=self._headline(),
            tables={name: _records(table) for name, table in tables.items()},
            pictures=draw_all(self.data, tables["layers"], tables["fine_tuning"]),
            speed=_speed(_records(tables["steps"])),
            attacks=[(access, _attacks(_records(tables["attacks"]), access)) for access in ACCESSES],
            classes=CLASSES,
            words=explain(),
        )

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write ``report.html``, ``audit.json`` and the tables as CSV, all of them or none.

        Args:
            folder: Where to; it is made, and other files in it stay.

        Raises:
            CheckpointError: If they cannot be written; what was there before is untouched.
        """
        page, content, tables = self.to_html(), self.to_json(), self.tables()
        with staged_directory(folder) as staging:
            (staging / "report.html").write_text(page, encoding="utf-8")
            (staging / "audit.json").write_text(content, encoding="utf-8")
            for name, table in tables.items():
                table.map(csv_cell).to_csv(staging / f"{name}.csv", index=False, encoding="utf-8")


def _plain(value: Any) -> Any:
    """A cell of a data frame as a plain value, None where it is missing."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and value != value else value


def _records(table: pandas.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): _plain(value) for key, value in row.items()} for row in table.to_dict("records")]


def _speed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of steps, one row for each attack, with the ratio at the lower share beside it."""
    given = [row for row in rows if row["share"] is None]
    early = {_key(row): row for row in rows if row["share"] == TARGET_SHARES[0]}
    late = [row | {"early": early.get(_key(row))} for row in rows if row["share"] == TARGET_SHARES[-1]]
    return {"rows": late, "given": given, "share": f"{TARGET_SHARES[-1]:.0%}", "early": f"{TARGET_SHARES[0]:.0%}"}


def _attacks(rows: list[dict[str, Any]], access: str) -> list[dict[str, Any]]:
    """Every attack of a class, its subjects side by side."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["access"] != access:
            continue
        empty = {"said": "–", "interval": "–", "gap": "–", "seconds": "–"}
        own = merged.setdefault(
            _key(row), row | dict.fromkeys(SUBJECTS, empty) | {"note": "", "seeds": 0, "last_step": 0}
        )
        lost = [f"{row[name]} {name}" for name in ("diverged", "skipped") if row[name]]
        said = ", ".join([percent(row["accuracy"])] * (row["accuracy"] is not None) + lost)
        own[row["subject"]] = {
            "said": said,
            "interval": _range(row["low"], row["high"]),
            "gap": signed(row["gap"]),
            "seconds": _seconds(row["seconds"], row["seconds_low"], row["seconds_high"]),
        }
        own["note"] = "; ".join(note for note in (own["note"], row["note"]) if note)
        own |= {name: max(own[name], row[name]) for name in ("seeds", "last_step")}
    return list(merged.values())


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("attacker", "access", "task", "layer", "precision"))


def _range(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}%"


def _seconds(mean: float, low: float | None, high: float | None) -> str:
    return f"{mean:,.1f}" if low is None or high is None else f"{mean:,.1f} ({low:,.1f} to {high:,.1f})"
