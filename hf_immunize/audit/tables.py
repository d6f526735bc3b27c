"""Tables of an audit as data frames."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import pandas

from hf_immunize.audit.findings import CLASS_KINDS
from hf_immunize.audit.intervals import accuracy_interval
from hf_immunize.audit.measures import Deviation, deviations
from hf_immunize.audit.outcomes import AuditData, Outcome
from hf_immunize.audit.speed import StepsRatio, steps_ratios
from hf_immunize.audit.summaries import (
    ACCESSES,
    SUBJECTS,
    Summary,
    gap,
    matched,
    of_class,
    reached,
    strongest,
    summarize,
)
from hf_immunize.audit.thresholds import TARGET_SHARES
from hf_immunize.audit.verdict import judge


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


def make_tables(data: AuditData) -> dict[str, pandas.DataFrame]:
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
        "attacks": _frame(_attacks(summaries), _ATTACKS),
        "outcomes": _frame([_outcome(one) for one in data.outcomes], _OUTCOMES),
    }


def headline_table(data: AuditData) -> pandas.DataFrame:
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


def _worst_cases(data: AuditData, summaries: Sequence[Summary], task: str) -> list[dict[str, Any]]:
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


def _budgets(data: AuditData) -> list[dict[str, Any]]:
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


def _attacks(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
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


def _curves(data: AuditData) -> list[dict[str, Any]]:
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
