"""What an audit found: plain data, checked, written to JSON and read back without loss."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hf_immunize.attacks.presets import ATTACKERS
from hf_immunize.errors import DataError
from hf_immunize.text import public_name


# What an attacker has: the classifier's input; the output of any earlier stage too; the weights.
ACCESSES = ("head_input", "any_layer", "fine_tuning")
# The model, the same before immunization, and copies of it with random weights, and pixels: what needs no weights.
SUBJECTS = ("immunized", "reference", "random")
STATUSES = ("done", "diverged", "skipped")

FORMAT, FORMAT_VERSION = "hf_immunize.audit", 2
# JSON has no infinity; such a number becomes an object of this one key.
_NON_FINITE = "non_finite"


@dataclass(frozen=True)
class Outcome:
    """One attack on one subject with one seed, its settings tuned within its budget."""

    attacker: str
    access: str  # of ACCESSES
    subject: str  # of SUBJECTS
    task: str  # "harmful", "unseen" (harmful classes not used for immunization), "benign" or "unrelated"
    layer: str  # where it probes (module and pooling), or what it fine-tunes
    seed: int
    precision: str  # such as "float64"
    status: str = "done"  # of STATUSES
    note: str = ""  # why it diverged or was skipped
    accuracy: float | None = None  # on the test images with the settings it chose; None unless done
    steps: list[int] = field(default_factory=list)  # after which test accuracy was measured; empty for closed forms
    curve: list[float] = field(default_factory=list)  # test accuracy after these steps
    settings: dict[str, Any] = field(default_factory=dict)
    trials: int = 1  # how many settings it tried
    seconds: float = 0.0  # wall-clock time, tuning included


@dataclass(frozen=True)
class TaskSummary:
    """A task that was attacked; chance is the accuracy of always naming the most frequent class of the test images."""

    name: str
    dataset: str
    train_size: int
    test_size: int
    num_classes: int
    chance: float


@dataclass(frozen=True)
class Utility:
    """Benign accuracy of the released classifier, paired with the reference's on the same images."""

    size: int
    immunized: float
    reference: float | None = None
    difference: float | None = None  # immunized - reference
    interval: tuple[float, float] | None = None  # 95 %, of the difference, paired by image


@dataclass(frozen=True)
class FeatureSpectrum:
    """How the features of one data set through one subject are conditioned."""

    subject: str
    task: str
    num_samples: int
    rank: int
    log10_kappa: float  # of Z_cᵀZ_c, Z_c = Z − mean: of a probe with an intercept
    is_bound: bool  # rank was lost against the reference, so that kappa is a lower bound


@dataclass(frozen=True)
class AuditResult:
    """Everything an audit found; its tables, figures and sentences are functions of it."""

    model: str
    reference: str | None
    preset: str
    preset_version: int  # only results of one preset and version can be compared
    budget: dict[str, Any]
    tasks: dict[str, TaskSummary]
    outcomes: list[Outcome]
    utility: Utility | None = None
    spectra: list[FeatureSpectrum] = field(default_factory=list)
    rir: dict[str, Any] = field(default_factory=dict)  # rir, log10_rir, its two parts, bound, protocol; or empty
    warnings: list[str] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def tested_images(self, outcome: Outcome) -> int:
        """Test images of an attack: fine-tuning takes no more than its budget, probes (of public weights too) all."""
        size, most = self.tasks[outcome.task].test_size, self.budget.get("fine_tuning_max_test_images")
        attacker = ATTACKERS.get(outcome.attacker)
        tuned = outcome.access == "fine_tuning" and not (attacker and attacker.restores)
        return min(size, most) if tuned and isinstance(most, int) else size

    def without_local_paths(self) -> AuditResult:
        """The same, with models and data sets named by an absolute path called by its last part."""
        tasks = {name: replace(task, dataset=public_name(task.dataset)) for name, task in self.tasks.items()}
        reference = None if self.reference is None else public_name(self.reference)
        return replace(self, model=public_name(self.model), reference=reference, tasks=tasks)


def check(data: AuditResult) -> None:
    """Raise `DataError` for numbers that would make a report say what nobody measured."""
    if "harmful" not in data.tasks:
        raise DataError("Expected the task 'harmful' among the tasks, found none. Describe it in AuditResult.tasks.")
    for task in data.tasks.values():
        _check_share(task.chance, f"as chance of the task {task.name!r}")
    allowed = {"access": ACCESSES, "subject": SUBJECTS, "status": STATUSES, "task": tuple(data.tasks)}
    for one in data.outcomes:
        where = f"of {one.attacker!r} on {one.subject!r}, task {one.task!r}, layer {one.layer!r}, seed {one.seed}"
        for name, values in allowed.items():
            if (found := getattr(one, name)) not in values:
                raise DataError(f"Expected one of {', '.join(values)} as {name} {where}, found {found!r}.")
        if len(one.steps) != len(one.curve) or list(one.steps) != sorted(one.steps):
            raise DataError(f"Expected ascending steps, one for each point of the curve, {where}; found others.")
        for value in [*one.curve, *([one.accuracy] if one.status == "done" else [])]:
            _check_share(value, where, " Record an attack whose numbers are lost as diverged, without them.")
        if one.status != "done" and one.accuracy is not None:
            raise DataError(f"Expected no accuracy where status is {one.status!r}, found {one.accuracy} {where}.")
    if data.utility is not None:
        _check_share(data.utility.immunized, "as benign accuracy")
        if data.utility.reference is not None:
            _check_share(data.utility.reference, "as benign accuracy")


def _check_share(value: object, where: str, remedy: str = "") -> None:
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:  # NaN is not
        raise DataError(f"Expected an accuracy between 0 and 1 {where}, found {value!r}.{remedy}")


def to_json(data: AuditResult, measures: Mapping[str, Any] | None = None) -> str:
    """JSON of finite numbers; `measures` are for other programs, `from_json` does not read them."""
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, "data": _encode(asdict(data))}
    if measures is not None:
        content["measures"] = _encode(measures)
    return json.dumps(content, indent=1, allow_nan=False)


def from_json(text: str) -> AuditResult:
    """Read back and check what `to_json` wrote; `DataError` names the first thing amiss."""
    remedy = "Run the audit again, or give the audit.json that it wrote."
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"Expected the JSON of an audit, found text that is not JSON ({error}). {remedy}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"Expected JSON of the format {FORMAT!r}, found other content. {remedy}")
    if (version := content.get("format_version")) != FORMAT_VERSION:
        raise DataError(
            f"Expected format version {FORMAT_VERSION}, found {version!r}. Read it with the release it is of."
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
    """Tuples become lists, NumPy's numbers plain ones, other objects their text."""
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
