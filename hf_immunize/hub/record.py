"""``immunization.json``: what was done to a checkpoint, on which data, and what was measured.

The file lies with the weights and names them by their hashes. It holds finite JSON only, so κ is stored as its decimal
logarithm. Fields that a later minor version adds survive being read and written by this one; a later major version is
refused by name. Data are described, never included.

From top to bottom: the rules that fields follow, the parts of a record, the record, its files, and the reader.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import reprlib
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from transformers.utils import cached_file

from hf_immunize.errors import RecordError, RecordVersionError
from hf_immunize.files import write_whole
from hf_immunize.spectra.conditioning import Conditioning
from hf_immunize.text import library_words, printable


P = TypeVar("P", bound="Part")
SCHEMA_VERSION = "1.0"
RECORD_NAME = "immunization.json"
# Kinds of access that an attacker may have, as an audit names them.
ACCESS = ("head_input", "any_layer", "fine_tuning")
# What a figure may be: the endings of its name, and what it then is.
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".gif": "GIF", ".webp": "WEBP"}
# What is larger is damage, or made to take time and memory.
_MAX_BYTES = 2**24
# What a field may hold, as in ``Annotated[float, (…)]``, and words that complete "expected it to be …".
Rule = tuple[Callable[[Any], object], str]


def _between(least: float, most: float) -> Rule:
    return lambda value: least <= value <= most, f"between {least} and {most}"


def _form(pattern: str, words: str) -> Rule:
    return re.compile(pattern).fullmatch, words


_FILE = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
Share = Annotated[float, _between(0, 1)]
Count = Annotated[int, _between(0, 2**53)]
Steps = Annotated[int, _between(1, 2**53)]  # nothing is fitted before the first
Size = Annotated[float, _between(0, math.inf)]
# Of a condition number of float64 matrices, and of quotients of such.
Log10 = Annotated[float, _between(-10_000, 10_000)]
Log10Kappa = Annotated[float, _between(0, 10_000)]
# What numpy, which draws splits by it, takes for one.
Seed = Annotated[int, _between(0, 2**32 - 1)]
Bound = Annotated[str, _form("lower|upper|undetermined", "lower, upper or undetermined")]
Sketch = Annotated[str, _form(r"(?:[0-9a-f]{16}){0,256}", "at most 256 hashes of 16 hexadecimal digits")]
FileName = Annotated[str, _form(_FILE, "the name of a file beside the record")]
Digest = Annotated[str, _form(r"[0-9a-f]{64}", "a SHA-256 in hexadecimal")]
_ENDINGS = "|".join(re.escape(ending) for ending in PICTURES)
Ends = Annotated[list[float], (lambda ends: len(ends) == 2 and ends[0] <= ends[1], "two numbers in order")]
Picture = Annotated[str, _form(f"{_FILE}(?:{_ENDINGS})", f"the name of a picture beside the record ({_ENDINGS})")]


@dataclass
class Part:
    """A part of a record; `unknown` is what a later version wrote and this one does not know."""

    unknown: dict[str, Any] = field(default_factory=dict, repr=False, kw_only=True)


@dataclass
class MethodRecord(Part):
    """How the checkpoint was made."""

    objective: str  # what was minimized, such as "kappa"
    trainable: str  # "last_stage", "all", or a regular expression on parameter names
    steps: Count  # optimizer steps
    seed: Seed
    benign_weight: float | str | None = None  # of the regularizers: numbers, or "auto" (by gradient norm)
    harmful_weight: float | str | None = None
    freeze_batchnorm: bool | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # all further ones, as `ImmunizationArguments` names them
    distilled_on: str | None = None  # images on which the model was held near the starting one


@dataclass
class BaseModelRecord(Part):
    """The model before immunization."""

    name: str  # id on the Hub, or the last part of a local path
    revision: str | None = None
    on_hub: bool = False  # whether `name` is an id on the Hub


@dataclass
class DataRecord(Part):
    """One task's data."""

    name: str  # an id on the Hub where `on_hub`
    on_hub: bool = False
    revision: str | None = None  # its commit
    split: str | None = None  # that was measured on
    classes: list[str] | None = None  # where they were chosen out of a larger set
    fingerprint: str | None = None  # of `datasets`, of what was measured on
    train_size: Count | None = None  # images trained on
    size: Count | None = None  # images measured on, N
    checksum: float | None = None  # of the pixel values measured on, after the image processor (see `Measurement`)
    # How the images measured on were held out of the training split; None where they are a split of their own.
    held_out_fraction: Annotated[float, (lambda part: 0 < part < 1, "between 0 and 1")] | None = None
    held_out_seed: Annotated[int, _between(0, 2**64 - 1)] | None = None
    # By which to recognize images trained on and measured on (see `hf_immunize.data.images`).
    train_sketch: Sketch | None = None
    sketch: Sketch | None = None


@dataclass
class ConditioningRecord(Part):
    """Conditioning of ``ZᵀZ`` over all images measured on (see `Conditioning`), Z the classifier's inputs."""

    log10_kappa: Log10Kappa  # or the bound from below, where `is_bound`
    rank: Count  # numerical rank of Z
    num_samples: Count  # N; with N < D the number describes the sample, not the task
    dim: Count  # D
    effective_rank: Size | None = None  # exp of the entropy of the normalized singular values
    is_bound: bool = False  # whether the rank fell below `reference_rank`
    reference_rank: Count | None = None
    sigma_max: Size | None = None
    sigma_min: Size | None = None  # the smallest singular value above `cutoff`, the rank rule's threshold
    cutoff: Size | None = None
    set_by_norm: bool = False  # whether `sigma_min` is of the one direction in which all images are the same

    @classmethod
    def of(cls, conditioning: Conditioning) -> ConditioningRecord:
        """What a record keeps of a measured conditioning."""
        return cls(**{name: getattr(conditioning, name) for name in _hints(cls)})  # type: ignore[arg-type]

    def conditioning(self) -> Conditioning:
        """The conditioning this was taken from; NaN where the record does not know a number."""
        log_kappa, kind = self.log10_kappa * math.log(10.0), type(self)
        values = {name: getattr(self, name) for name in _hints(kind) if name != "log10_kappa"}  # type: ignore[arg-type]
        for name in ("effective_rank", "sigma_max", "sigma_min", "cutoff"):
            values[name] = math.nan if values[name] is None else values[name]
        return Conditioning(kappa=math.exp(min(log_kappa, 709.0)), log_kappa=log_kappa, **values)


@dataclass
class ProbingRecord(Part):
    """Steps of gradient descent with exact line search until a probe with an intercept has fitted the same share.

    80 % of what least squares fits on the starting features, or what is fitted there in `max_steps`.
    """

    before: Steps  # through the reference weights
    after: Steps | None  # through those beside the record; None where `max_steps` do not suffice
    max_steps: Steps
    # What is fitted: the classes, or, where no image has one, the leading components of the starting features.
    targets: Annotated[str, _form("classes|components", "classes or components")] = "classes"
    conjugate_before: Steps | None = None  # by conjugate gradient; None where it was not measured
    conjugate_after: Steps | None = None  # None, where that is known, if `max_steps` do not suffice


@dataclass
class SideRecord(Part):
    """Conditioning of one task's features, through the reference weights and through those beside the record."""

    before: ConditioningRecord | None = None
    after: ConditioningRecord | None = None
    probing: ProbingRecord | None = None  # None unless all images measured on have a class, or none has


@dataclass
class RatioRecord(Part):
    """The relative immunization ratio under one protocol (see `relative_immunization_ratio`)."""

    log10_rir: Log10 | None  # None where it is undetermined
    log10_harmful_ratio: Log10 | None = None  # of its part (i)
    log10_benign_ratio: Log10 | None = None  # of its part (ii)
    bound: Bound | None = None  # what RIR is of the true value; None: itself


@dataclass
class MetricRecord(Part):
    """The benign task's metric on the images measured on."""

    name: str  # such as "accuracy"
    after: float  # through the weights beside the record
    before: float | None = None  # through the starting weights, where they were evaluated
    precision: str | None = None  # mixed precision of the evaluation: "no", "bf16" or "fp16"
    change: float | None = None  # of the accuracy, where both weights named the same images
    change_interval: Ends | None = None  # 95 %, over images, paired


@dataclass
class AttackRecord(Part):
    """The strongest attacker of one kind of access, on the harmful task's held-out images."""

    attacker: str
    accuracy: Share
    reference_accuracy: Share | None = None  # of the strongest of its kind, on the model before immunization
    chance: Share | None = None  # accuracy of always naming the most frequent class
    layer: str | None = None  # where it probes, or what it fine-tunes
    random_accuracy: Share | None = None  # of the strongest of its kind without the weights: random ones, or pixels
    removed: float | None = None  # share of the reference's accuracy beyond that which is gone; None: not claimed
    removed_interval: Ends | None = None  # 95 %


@dataclass
class AuditRecord(Part):
    """What an audit found, in short."""

    preset: str
    preset_version: Count = 1  # raised whenever the preset changes
    strongest: dict[str, AttackRecord | None] = field(default_factory=dict)  # by `ACCESS`; others were not attacked
    utility: dict[str, Any] | None = None  # benign accuracy, as the audit measured it
    verdict: list[str] = field(default_factory=list)  # the report's sentences; names in them are the user's own


@dataclass
class ImmunizationRecord(Part):
    """Everything a checkpoint says of its immunization; the schema of ``immunization.json``.

    Example:
        >>> record = ImmunizationRecord(MethodRecord("kappa", "all", 10, 0), BaseModelRecord("user/vit"))
        >>> ImmunizationRecord.from_json(record.to_json()) == record
        True
    """

    method: MethodRecord
    base_model: BaseModelRecord
    benign: DataRecord | None = None  # None where there were none
    harmful: DataRecord | None = None
    metric: MetricRecord | None = None
    benign_features: SideRecord = field(default_factory=SideRecord)
    harmful_features: SideRecord = field(default_factory=SideRecord)
    ratios: dict[str, RatioRecord] = field(default_factory=dict)  # RIR by protocol: "exact", "intercept"
    audit: AuditRecord | None = None  # None where none was made
    weights: dict[FileName, Digest] = field(default_factory=dict)  # SHA-256 of every weight file, by its name
    image_processor: str | None = None  # class of the one beside the weights
    software: dict[str, str] = field(default_factory=dict)  # versions of the libraries
    license: str | None = None  # of the weights
    figures: list[Picture] = field(default_factory=list)  # beside the record
    remarks: list[str] = field(default_factory=list)  # plain sentences that the figures need to be understood
    schema_version: str = SCHEMA_VERSION  # "major.minor"

    def to_json(self) -> str:
        """The text of ``immunization.json``; `RecordError` where it holds what is not finite, or what cannot be."""
        values = to_plain(self)
        _read_whole(values)
        ordered = {"schema_version": values.pop("schema_version"), **values}
        return json.dumps(ordered, indent=2, ensure_ascii=False) + "\n"

    def _repr_html_(self) -> str:
        """A notebook's view: what was done and what was measured."""
        from jinja2 import Template

        source = files("hf_immunize.hub").joinpath("templates", "view.html.jinja").read_text(encoding="utf-8")
        return Template(source, autoescape=True).render(record=self)

    @classmethod
    def from_json(cls, text: str | bytes) -> ImmunizationRecord:
        """Read the text of ``immunization.json``, or its bytes.

        Raises:
            RecordVersionError: If a newer major version of the schema wrote it.
            RecordError: If it is truncated, damaged, or says what cannot be; the message names the field.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, thousands of digits, nested without end
            raise RecordError(
                f"Expected {RECORD_NAME} to be JSON, found: {library_words(error)}. It is truncated or damaged; "
                "fetch it again, or measure and save the model again."
            ) from error
        if isinstance(values, dict):
            version = values.get("schema_version")
            if not isinstance(version, str) or not re.fullmatch(r"\d{1,6}\.\d{1,6}", version):
                raise _unexpected("schema_version", "'major.minor'", version)
            if int(version.split(".")[0]) > int(SCHEMA_VERSION.split(".")[0]):
                raise RecordVersionError(
                    f"Expected a record of schema {SCHEMA_VERSION} or of another minor version, found {version}, "
                    "which is newer. Update hf_immunize."
                )
        return _read_whole(values)


def _read_whole(values: Any) -> ImmunizationRecord:
    """A record from plain values that JSON can hold."""
    try:
        record = from_plain(ImmunizationRecord, values, "record")
        json.dumps(to_plain(record), allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(
            f"Expected finite numbers, Unicode text and lists in {RECORD_NAME}, found: {library_words(error)}. "
            "The record is damaged, or was not written by this library."
        ) from error
    _check_together(record)
    return record


def _check_together(record: ImmunizationRecord) -> None:
    """What no field alone says."""
    for protocol, ratio in record.ratios.items():
        if ratio.log10_rir is None and ratio.bound != "undetermined":
            raise _unexpected(f"ratios.{protocol}.log10_rir", "a number", None)
    for side in ("benign_features", "harmful_features"):
        for moment in ("before", "after"):
            part: ConditioningRecord | None = getattr(getattr(record, side), moment)
            least = 0 if part is None or part.is_bound else 1  # 0: all of it is lost
            if part is not None and not least <= part.rank <= min(part.num_samples, part.dim):
                words = f"between {least} and min(N, D) = {min(part.num_samples, part.dim)}"
                raise _unexpected(f"{side}.{moment}.rank", words, part.rank)
    if record.metric is not None and record.metric.name == "accuracy":
        for moment in ("after", "before"):
            share = getattr(record.metric, moment)
            if share is not None and not 0 <= share <= 1:
                raise _unexpected(f"metric.{moment}", "between 0 and 1", share)


def read_record(folder: str | os.PathLike[str]) -> ImmunizationRecord:
    """The record of a checkpoint's folder; `RecordError` where there is none that can be read."""
    path = Path(folder) / RECORD_NAME
    if not path.is_file():
        raise RecordError(
            f"Expected {RECORD_NAME} beside the weights, found none: this checkpoint carries no evidence. Immunize "
            "and evaluate it with hf_immunize, or load it with from_pretrained as any other model."
        )
    if path.stat().st_size > _MAX_BYTES:
        raise RecordError(f"Expected {RECORD_NAME} of a few kilobytes, found {path.stat().st_size} bytes.")
    return ImmunizationRecord.from_json(path.read_bytes())


def find_record(model: Any, revision: str | None = None) -> ImmunizationRecord | None:
    """The record of a folder or a name on the Hub; None where there is none, as of a model in memory."""
    if not isinstance(model, (str, os.PathLike)):
        return None
    names = ("gated_repo", "missing_entries", "connection_errors")
    quiet = {f"_raise_exceptions_for_{name}": False for name in names}
    try:
        path = cached_file(os.path.expanduser(model), RECORD_NAME, revision=revision, **quiet)
    except OSError:  # there is no such model, which loading it says
        return None
    return None if path is None else read_record(Path(path).parent)


def write_record(folder: str | os.PathLike[str], record: ImmunizationRecord) -> Path:
    """Write a record, whole or not at all."""
    return write_whole(Path(folder) / RECORD_NAME, record.to_json())


def to_plain(value: Any) -> Any:
    """Dataclasses as dictionaries, with their unknown fields where they were found; `from_plain` checks the values."""
    if isinstance(value, Part):
        known = {name: to_plain(getattr(value, name)) for name in _hints(type(value))}  # type: ignore[arg-type]
        return known | value.unknown
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def from_plain(kind: type[P], value: Any, where: str) -> P:
    """Read a dataclass from a dictionary, checking every field; `RecordError` names the one that cannot be."""
    value, hints = _of_kind(dict, value, where), _hints(kind)  # type: ignore[arg-type]
    for item in dataclasses.fields(kind):
        if item.default is item.default_factory is dataclasses.MISSING and item.name not in value:
            raise _unexpected(f"{where}.{item.name}", "there", "none")
    known = {name: _read(hints[name], value[name], f"{where}.{name}") for name in hints if name in value}
    return kind(**known, unknown={name: item for name, item in value.items() if name not in hints})


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """The fields of a part, save for the unknown ones, with what they hold."""
    return {name: hint for name, hint in get_type_hints(kind, include_extras=True).items() if name != "unknown"}


def _read(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        found, (holds, words) = _read(arguments[0], value, where), arguments[1]
        if not holds(found):
            raise _unexpected(where, words, value)
        return found
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        *others, last = (option for option in arguments if option is not type(None))
        for option in others:
            with suppress(RecordError):
                return _read(option, value, where)
        return _read(last, value, where)
    if origin is list:
        return [_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(_of_kind(list, value, where))]
    if origin is dict:
        items = _of_kind(dict, value, where).items()
        return {_read(arguments[0], name, where): _read(arguments[1], item, f"{where}.{name}") for name, item in items}
    return from_plain(hint, value, where) if issubclass(hint, Part) else _of_kind(hint, value, where)


def _of_kind(kind: type, value: Any, where: str) -> Any:
    # For Python, True is an int; for a reader of the record it is not.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is not float and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    words = {str: "text", bool: "true or false", int: "a whole number", float: "a finite number", list: "a list"}
    raise _unexpected(where, words.get(kind, "names and values"), value)


def _unexpected(where: str, expected: str, value: Any) -> RecordError:
    """Names of fields are as foreign as their values; of a long value the beginning, of a nested one its kind."""
    found = f"{type(value).__name__} of {len(value)}" if isinstance(value, dict | list) else reprlib.repr(value)
    return RecordError(
        f"Expected {printable(where[:120])} in {RECORD_NAME} to be {expected}, found {printable(found)}. It is "
        "damaged, or was not written by this library."
    )
