"""What an audit found as JSON, without loss, and checked when it is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from hf_immunize.audit.outcomes import AuditData, Outcome, Spectrum, Task, Utility
from hf_immunize.audit.summaries import ACCESSES, SUBJECTS
from hf_immunize.errors import DataError


FORMAT = "hf_immunize.audit"
FORMAT_VERSION = 1
_STATUSES = ("done", "diverged", "skipped")
# JSON has no infinity; such a number becomes an object of this one key.
_NON_FINITE = "non_finite"


def to_json(data: AuditData, measures: Mapping[str, Any] | None = None) -> str:
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


def from_json(text: str) -> AuditData:
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
        data["tasks"] = {name: Task(**task) for name, task in data["tasks"].items()}
        data["outcomes"] = [Outcome(**one) for one in data["outcomes"]]
        data["spectra"] = [Spectrum(**one) for one in data["spectra"]]
        if data["utility"] is not None:
            interval = data["utility"]["interval"]
            data["utility"] = Utility(**data["utility"] | {"interval": interval and tuple(interval)})
        found = AuditData(**data)
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


def without_local_paths(data: AuditData) -> AuditData:
    """The same, models and data sets from an absolute path called by their last part: reports are handed on.

    Args:
        data: What an audit found.

    Returns:
        A copy; names on the Hub and relative paths stay.
    """
    tasks = {name: replace(task, dataset=_public(task.dataset)) for name, task in data.tasks.items()}
    reference = None if data.reference is None else _public(data.reference)
    return replace(data, model=_public(data.model), reference=reference, tasks=tasks)


def _public(name: str) -> str:
    if re.match(r"[A-Za-z]:[\\/]|\\\\", name):
        return PureWindowsPath(name).name or name
    return PurePosixPath(name).name or name if name.startswith(("/", "~")) else name


def check(data: AuditData) -> None:
    """Refuse numbers that would make a report say what nobody measured.

    Args:
        data: What an audit found.

    Raises:
        DataError: An unknown class, subject or status; a task that is not described; an accuracy that is not between
            0 and 1; a curve without its steps.
    """
    if "harmful" not in data.tasks:
        raise DataError("Expected the task 'harmful' among the tasks, found none; describe it in AuditData.tasks.")
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
