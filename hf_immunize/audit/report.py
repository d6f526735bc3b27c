"""The report of an audit: tables, JSON, the short forms, and one HTML file that needs nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas

from hf_immunize.audit import result
from hf_immunize.audit import statistics as limit
from hf_immunize.audit.head_start import Cost, HeadStart, costs
from hf_immunize.audit.names import label, render
from hf_immunize.audit.result import ACCESSES, SUBJECTS, AuditResult, Outcome
from hf_immunize.audit.statistics import (
    Summary,
    accuracy_interval,
    attack_of,
    gap,
    of_class,
    reached,
    steps_ratios,
    summarize,
    worst_by_subject,
)
from hf_immunize.audit.verdict import CLASS_KINDS, Judgment, Kind, answer, judge, sentence, speed_kind
from hf_immunize.errors import DataError
from hf_immunize.files import staged_directory
from hf_immunize.text import csv_cell


_SIDES = " ".join(f"{subject}_{name}" for subject in SUBJECTS for name in ("attacker", "accuracy", "low", "high"))
_HEADLINE = (
    "access attacker layer accuracy low high seeds reference_attacker reference_layer reference_accuracy "
    "reference_low reference_high gap gap_low gap_high chance steps_ratio steps_ratio_is_bound finding "
    "random_attacker random_layer random_accuracy random_low random_high head_start head_start_low head_start_high "
    "removed removed_low removed_high removed_claimed"
)
COLUMNS = {
    "headline": _HEADLINE,
    "layers": f"layer chance {_SIDES} gap",
    "steps": "attacker access task layer target immunized_steps reference_steps ratio low high is_bound seeds",
    "cost": " ".join(one.name for one in fields(Cost)),
    "tasks": f"task {_HEADLINE}",
    "curves": "attacker access subject task layer step accuracy low high seeds",
    "attacks": "attacker access subject task layer accuracy low high seeds reference_accuracy gap gap_low gap_high "
    "seconds seconds_low seconds_high diverged skipped last_step note",
    "outcomes": " ".join(one.name for one in fields(Outcome) if one.name not in ("steps", "curve"))
    + " best_accuracy last_step",
}


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
        result.check(data)
        self.data = data.without_local_paths()

    def tables(self) -> dict[str, pandas.DataFrame]:
        """All tables; accuracies and differences between 0 and 1, missing numbers NaN.

        Returns:
            "headline" (head start, what is removed of it and worst case by class of attackers), "layers" (best probe
            at each layer), "steps" (how many times the steps), "cost" (steps to what random weights reach), "tasks"
            (worst case on the other tasks), "curves" (accuracy after each step over the seeds), "attacks" (every
            attack over its seeds, with its gap to the reference and its time) and "outcomes" (every run).
        """
        return {name: table.copy() for name, table in self._tables.items()}

    @cached_property
    def _tables(self) -> dict[str, pandas.DataFrame]:
        return make_tables(self.data, self._findings)

    @cached_property
    def _findings(self) -> list[Judgment]:
        return judge(self.data)

    def answer(self) -> str:
        """Whether the harmful task can still be learnt: the whole audit in one sentence or two."""
        return sentence(answer(self._findings, self.data.tasks["harmful"].chance), self.data)

    def verdict(self) -> list[str]:
        """What is prevented, slowed and neither, in plain language, the most important first."""
        return [sentence(one, self.data) for one in self._findings]

    def to_json(self) -> str:
        """Everything as JSON, without loss and with finite numbers only.

        Returns:
            The JSON: under "data" what was found, under "measures" the tables that follow from it, rows of plain
            values, so that another program need not compute them.
        """
        measures = {name: _records(table) for name, table in self._tables.items() if name != "outcomes"}
        return result.to_json(self.data, measures)

    @classmethod
    def from_json(cls, text: str) -> AuditReport:
        """The report of what `to_json` wrote.

        Args:
            text: The JSON.

        Raises:
            DataError: If it is not the JSON of an audit.
        """
        return cls(result.from_json(text))

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
            Plain JSON: "preset", "preset_version", "strongest" (attacker, layer, accuracy, reference_accuracy, chance,
            random_accuracy, removed and removed_interval by class of attackers, None where none was tested), "utility"
            (None where it was not measured) and "verdict" (sentences; names in them come from outside, so escape them
            for where they go).
        """
        names = ("layer", "accuracy", "reference_accuracy", "chance", "random_accuracy")
        utility = self.data.utility and asdict(self.data.utility)
        if utility and utility["interval"]:
            utility["interval"] = list(utility["interval"])
        return {
            "preset": self.data.preset,
            "preset_version": self.data.preset_version,
            "strongest": {
                row["access"]: None
                if row["accuracy"] is None
                else {"attacker": label(row["attacker"])}
                | {name: row[name] for name in names}
                | {"removed": row["removed"] if row["removed_claimed"] else None}
                | {"removed_interval": [row["removed_low"], row["removed_high"]] if row["removed_claimed"] else None}
                for row in _records(self._tables["headline"])
            },
            "utility": utility,
            "verdict": self.verdict(),
        }

    def summary(self) -> str:
        """The short form for a terminal: the answer, what each class of attackers reaches, and the verdict.

        Returns:
            Lines without control characters. For rich, print it with ``markup=False``.
        """
        return self._render("summary.jinja")

    def to_html(self) -> str:
        """The report as one HTML file: no network, no script, its figures within."""
        from hf_immunize.audit.figures import draw_all

        return self._render("report.html.jinja", pictures=draw_all(self.data, self._tables), limit=limit)

    def _repr_html_(self) -> str:
        """A notebook's view: the answer, and what each class of attackers reaches."""
        return self._render("view.html.jinja")

    def _render(self, template: str, **values: Any) -> str:
        return render(
            template,
            data=self.data,
            overall=answer(self._findings, self.data.tasks["harmful"].chance),
            answer=self.answer(),
            findings=[(one, sentence(one, self.data)) for one in self._findings],
            tables={name: _records(table) for name, table in self._tables.items()},
            **values,
        )

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write ``report.html``, ``audit.json`` and the tables as CSV, all of them or none.

        Args:
            folder: Where to; it is made, and other files in it stay.

        Raises:
            CheckpointError: If they cannot be written; what was there before is untouched.
        """
        page, content = self.to_html(), self.to_json()
        with staged_directory(folder) as staging:
            (staging / "report.html").write_text(page, encoding="utf-8")
            (staging / "audit.json").write_text(content, encoding="utf-8")
            for name, table in self._tables.items():
                table.map(csv_cell).to_csv(staging / f"{name}.csv", index=False, encoding="utf-8")


def make_tables(data: AuditResult, findings: Sequence[Judgment]) -> dict[str, pandas.DataFrame]:
    """The tables of `AuditReport.tables`."""
    summaries = summarize(data)
    # Of the whole verdict: a claim may be withheld.
    said = {(one.access, one.task): one for one in findings if one.kind in CLASS_KINDS}
    other = [row for task in data.tasks if task != "harmful" for row in _worst_cases(data, summaries, task, said)]
    rows = {
        "headline": _worst_cases(data, summaries, "harmful", said),
        "layers": _layers(summaries, data.tasks["harmful"].chance),
        "steps": [
            asdict(one)
            | {"immunized_steps": one.immunized, "reference_steps": one.reference}
            | ({"ratio": None} if one.untold else _ends(one.interval))
            for task in data.tasks
            for one in steps_ratios(data, task)
        ],
        "cost": [asdict(one) for one in costs(data)],
        "tasks": [row for row in other if row["accuracy"] is not None],
        "curves": _curves(data),
        "attacks": _attacks(summaries),
        "outcomes": [_outcome(one) for one in data.outcomes],
    }
    return {name: _frame(name, rows[name]) for name in COLUMNS}


def _frame(name: str, rows: list[dict[str, Any]]) -> pandas.DataFrame:
    """A table; `X_interval` becomes X_low and X_high."""
    for row in rows:
        for key in [key for key in row if key.endswith("_interval")]:
            row |= _ends(row[key], key.removesuffix("interval"))
    frame = pandas.DataFrame(rows, columns=COLUMNS[name].split())
    for column in frame:
        # A column of missing numbers alone would hold None, not NaN.
        if all(value is None or type(value) in (int, float) for value in frame[column].tolist()):
            frame[column] = pandas.to_numeric(frame[column])
    return frame


def _ends(interval: tuple[float, float] | None, prefix: str = "") -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {f"{prefix}low": low, f"{prefix}high": high}


def _records(table: pandas.DataFrame) -> list[dict[str, Any]]:
    """Rows of plain values, None where one is missing."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def _worst_cases(
    data: AuditResult, summaries: Sequence[Summary], task: str, said: Mapping[tuple[str, str], Judgment]
) -> list[dict[str, Any]]:
    """The worst case of each class of attackers on a task, those that were not tested included."""
    ratios = {attack_of(one): one for one in steps_ratios(data, task)}
    rows = []
    for access in ACCESSES:
        best = worst_by_subject([one for s in SUBJECTS for one in of_class(summaries, s, task, access)])
        worst, theirs = best["immunized"], best["reference"]
        row: dict[str, Any] = {"task": task, "access": access, "chance": data.tasks[task].chance, "accuracy": None}
        if finding := said.get((access, task)):
            row |= {"finding": finding.kind.value} | _at_stake(finding.start)
        if worst is not None:
            row |= {"attacker": worst.attacker, "layer": worst.layer, "accuracy": worst.mean}
            row |= {"seeds": len(worst.accuracies)} | _ends(worst.ends)
            # What the verdict does not decide, no figure decides beside it.
            if (ratio := ratios.get(attack_of(worst))) and speed_kind(ratio) in (Kind.SLOWED, Kind.NOT_SLOWED):
                row |= {"steps_ratio": ratio.ratio, "steps_ratio_is_bound": ratio.is_bound}
        if worst is not None and theirs is not None:
            row |= {"reference_attacker": theirs.attacker, "reference_layer": theirs.layer}
            row |= {"reference_accuracy": theirs.mean} | _ends(theirs.ends, "reference_")
            row["gap"], row["gap_interval"] = gap(theirs, worst)
        rows.append(row)
    return rows


def _at_stake(start: HeadStart | None) -> dict[str, Any]:
    """Head start and what is removed of it, as columns."""
    if start is None:
        return {}
    random = start.random
    row: dict[str, Any] = {"random_attacker": random.attacker, "random_layer": random.layer}
    row |= {"random_accuracy": random.mean, "head_start": start.points, "removed": start.removed}
    row["removed_claimed"] = start.claimed and start.removed is not None
    row |= _ends(random.ends, "random_") | _ends(start.interval, "head_start_")
    return row | _ends(start.removed_interval, "removed_")


def _layers(summaries: Sequence[Summary], chance: float) -> list[dict[str, Any]]:
    """Best probe at each layer by subject, the layers in the audit's order, the classifier's input last."""
    probes = [one for one in summaries if one.task == "harmful" and one.access != "fine_tuning"]
    rows = []
    own = [one for one in probes if one.subject != "random"]  # pixels are no layer
    for layer in dict.fromkeys(one.layer for one in sorted(own, key=lambda one: one.access == "head_input")):
        row: dict[str, Any] = {"layer": layer, "chance": chance}
        best = worst_by_subject([one for one in probes if one.layer == layer])
        for subject, one in best.items():
            if one is not None:
                row |= {f"{subject}_attacker": one.attacker, f"{subject}_accuracy": one.mean}
                row |= _ends(one.ends, f"{subject}_")
        if best["immunized"] and best["reference"]:
            row["gap"] = gap(best["reference"], best["immunized"])[0]
        rows.append(row)
    return rows


def _curves(data: AuditResult) -> list[dict[str, Any]]:
    values: dict[tuple[Any, ...], list[float]] = {}
    images: dict[tuple[Any, ...], int] = {}
    for one in data.outcomes:
        for step, value in zip(one.steps, one.curve, strict=True):
            key = (one.attacker, one.access, one.subject, one.task, one.layer, step)
            values.setdefault(key, []).append(value)
            images[key] = data.tested_images(one)
    rows = []
    for key, found in values.items():
        mean, interval = accuracy_interval(found, images[key])
        row = dict(zip(("attacker", "access", "subject", "task", "layer", "step"), key, strict=True))
        rows.append(row | {"accuracy": mean, "seeds": len(found)} | _ends(interval))
    return rows


def _attacks(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    references = {attack_of(one): one for one in summaries if one.subject == "reference" and one.mean is not None}
    rows = []
    for one in summaries:
        row = asdict(one) | {"accuracy": one.mean, "seeds": len(one.accuracies)} | _ends(one.ends)
        row |= {"last_step": one.budget, "note": "; ".join(one.notes)}
        if one.subject != "reference" and one.mean is not None and attack_of(one) in references:
            row["reference_accuracy"] = references[attack_of(one)].mean
            row["gap"], row["gap_interval"] = gap(references[attack_of(one)], one)
        rows.append(row)
    return rows


def _outcome(one: Outcome) -> dict[str, Any]:
    best, last = reached(one) if one.status == "done" else None, one.steps[-1] if one.steps else None
    settings = json.dumps(one.settings, sort_keys=True)
    return vars(one) | {"best_accuracy": best, "last_step": last, "settings": settings}
