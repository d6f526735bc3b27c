"""``immunization.json``: what was done to a checkpoint, on which data, and what was measured.

The file lies beside the weights and names them by their hashes. It holds finite JSON only, κ therefore as its decimal
logarithm. Fields that a later minor version adds survive being read and written by this one; a later major version is
refused by name. Data are described, never included.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import types
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from transformers.utils import cached_file

from hf_immunize.errors import RecordError, RecordVersionError
from hf_immunize.files import write_whole
from hf_immunize.spectra.conditioning import Conditioning
from hf_immunize.text import library_words, printable


T = TypeVar("T")
# Name of the field of every class here that holds what this version does not know.
UNKNOWN = "unknown"
_KINDS = {str: "text", bool: "true or false", int: "a whole number", float: "a finite number"}
# Bounds of all that a record may hold: what lies beyond is damage, or made to take time and memory.
_DEPTH, _TEXT, _NAME, _ITEMS, _WHOLE = 24, 2**16, 256, 2**16, 2**64


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field may hold, both ends among them, as in ``Annotated[float, Range(0, 1)]``.

    Attributes:
        least, most: The ends.
    """

    least: float
    most: float


Share = Annotated[float, Range(0, 1)]
Count = Annotated[int, Range(0, 2**53)]
Size = Annotated[float, Range(0, math.inf)]
# Of a condition number of float64 matrices, and of quotients of such.
Log10 = Annotated[float, Range(-10_000, 10_000)]
Log10Kappa = Annotated[float, Range(0, 10_000)]
# What numpy, which draws splits by it, takes for one.
Seed = Annotated[int, Range(0, 2**32 - 1)]


def to_plain(value: Any, depth: int = 0) -> Any:
    """Dataclasses as dictionaries, with their unknown fields where they were found.

    Args:
        value: A dataclass, or anything JSON knows.
        depth: In how many others it lies.

    Returns:
        Dictionaries, lists, texts, numbers, booleans and None.

    Raises:
        RecordError: If a number is not finite, or a value is of another type or nested too deep.
    """
    if depth > 2 * _DEPTH:  # what lies within is checked by its own measure when the fields are
        raise _unexpected("a value", f"nested less than {2 * _DEPTH} deep", value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {
            item.name: to_plain(getattr(value, item.name), depth + 1)
            for item in dataclasses.fields(value)
            if item.name != UNKNOWN
        }
        return {**plain, **to_plain(getattr(value, UNKNOWN, {}), depth + 1)}
    if isinstance(value, dict):
        return {str(key): to_plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item, depth + 1) for item in value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return _text(value, "a text")
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    raise RecordError(f"Expected text, finite numbers and lists of them in a record, found {value!r}. Leave it out.")


def from_plain(kind: type[T], value: Any, where: str) -> T:
    """Read a dataclass from a dictionary, checking the type of every field.

    Args:
        kind: The dataclass.
        value: What was read from JSON.
        where: What to call it in an error.

    Returns:
        The dataclass; fields it does not know are in its field ``unknown``.

    Raises:
        RecordError: If a field is missing, of another type or out of its range; the message names it.

    Example:
        >>> @dataclasses.dataclass
        ... class Point:
        ...     x: float
        ...     name: str | None = None
        ...     unknown: dict[str, Any] = dataclasses.field(default_factory=dict)
        >>> point = from_plain(Point, {"x": 1, "colour": "red"}, "point")
        >>> point, to_plain(point)
        (Point(x=1.0, name=None, unknown={'colour': 'red'}), {'x': 1.0, 'name': None, 'colour': 'red'})
    """
    if not isinstance(value, dict):
        raise _unexpected(where, "names and values", value)
    _check_size(value, where)
    hints = {name: hint for name, hint in get_type_hints(kind, include_extras=True).items() if name != UNKNOWN}
    known = {item.name: item for item in dataclasses.fields(kind) if item.name != UNKNOWN}  # type: ignore[arg-type]
    given = {name: _value(hints[name], value[name], f"{where}.{name}") for name in known if name in value}
    for name, item in known.items():
        optional = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        if name not in given and not optional:
            raise RecordError(
                f"Expected {_place(where)}.{name} in the record, found none. The record is damaged or not whole."
            )
    further = {_name(name, where): item for name, item in value.items() if name not in known}
    unknown = {name: _anything(item, f"{where}.{name}") for name, item in further.items()}
    return kind(**given, **{UNKNOWN: unknown})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return _anything(value, where)
    if origin is Annotated:
        found, span = _value(arguments[0], value, where), arguments[1]
        if not span.least <= found <= span.most:
            raise _unexpected(where, f"between {span.least} and {span.most}", value)
        return found
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        for option in options[:-1]:
            try:
                return _value(option, value, where)
            except RecordError:
                continue
        return _value(options[-1], value, where)
    if origin is list:
        if not isinstance(value, list):
            raise _unexpected(where, "a list", value)
        _check_size(value, where)
        return [_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise _unexpected(where, "names and values", value)
        _check_size(value, where)
        return {_name(key, where): _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, value, where)  # type: ignore[arg-type]
    return _plain_value(hint, value, where)


def _plain_value(hint: type, value: Any, where: str) -> Any:
    # For Python, True is an int; for a reader of the record it is not.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and isinstance(value, int) and abs(value) > _WHOLE:
        raise _unexpected(where, f"between -{_WHOLE} and {_WHOLE}", value)
    if hint is float and number and math.isfinite(value):
        return float(value)
    if hint is int and number and isinstance(value, int):
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return _text(value, where)
    raise _unexpected(where, _KINDS[hint], value)


def _anything(value: Any, where: str, depth: int = 0) -> Any:
    if depth > _DEPTH:
        raise _unexpected(where, f"nested less than {_DEPTH} deep", value)
    if isinstance(value, dict | list):
        _check_size(value, where)
    if isinstance(value, dict):
        return {_name(key, where): _anything(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_anything(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _plain_value(type(value), value, where)
    return _text(value, where) if isinstance(value, str) else value


def _name(value: str, where: str) -> str:
    if len(value) > _NAME:
        raise _unexpected(where, f"names of at most {_NAME} characters", value)
    return _text(value, where)


def _text(value: str, where: str) -> str:
    if len(value) > _TEXT:
        raise _unexpected(where, f"at most {_TEXT} characters", value)
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RecordError(
            f"Expected {_place(where)} to be Unicode text, found half of a surrogate pair. Correct the text."
        )
    return value


def _check_size(value: dict[Any, Any] | list[Any], where: str) -> None:
    if len(value) > _ITEMS:
        raise RecordError(
            f"Expected at most {_ITEMS} items in {_place(where)} of the record, found {len(value)}. The record is "
            "damaged, or was not written by this library."
        )


def _unexpected(where: str, expected: str, value: Any) -> RecordError:
    return RecordError(
        f"Expected {_place(where)} to be {expected}, found {_shown(value)}. The record is damaged, or was not written "
        "by this library."
    )


def _place(where: str) -> str:
    """Names of fields are as foreign as their values."""
    words = printable(where[:1000])
    return words if len(words) <= 120 else words[:117] + "..."


def _shown(value: Any) -> str:
    """The beginning of a value; of one that is nested or has thousands of digits, what it is."""
    if isinstance(value, dict | list) or (isinstance(value, int) and abs(value) > _WHOLE):
        return f"{type(value).__name__} of {len(value)}" if isinstance(value, dict | list) else "a larger number"
    found = repr(value[:100] if isinstance(value, str) else value)
    return found if len(found) <= 60 else found[:57] + "..."


ACCESS = ("head_input", "any_layer", "fine_tuning")
# What a later version wrote and this one does not know.
Unknown = dict[str, Any]


@dataclass
class BudgetRecord:
    """What became of the benign budget (``benign_budget``).

    Attributes:
        limit: The budget.
        measure: What it is in: "total_variation", "kl" or "loss".
        spent: How far the benign side had moved, as a running mean over the last steps.
        weight: The multiplier on the regularizers' weights over its value at the start.
    """

    limit: float
    measure: str
    spent: float
    weight: float
    unknown: Unknown = field(default_factory=dict, repr=False)

    @property
    def exceeded(self) -> bool:
        """Whether more was spent than the swing of the multiplier around the budget explains."""
        return self.spent > 1.25 * self.limit


@dataclass
class MethodRecord:
    """How the checkpoint was made.

    Attributes:
        objective: Name of what was minimized, such as "kappa".
        trainable: What moved: "last_stage", "all", or a regular expression on parameter names.
        steps: Optimizer steps.
        seed: Seed of the run.
        benign_weight, harmful_weight: Weights of the regularizers: numbers, or "auto" (by gradient norm).
        freeze_batchnorm: Whether BatchNorm statistics stayed as they were.
        settings: All further settings of the objective and its weights, by the names of `ImmunizationArguments`.
        budget: What became of the benign budget, where there was one.
    """

    objective: str
    trainable: str
    steps: Count
    seed: Seed
    benign_weight: float | str | None = None
    harmful_weight: float | str | None = None
    freeze_batchnorm: bool | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    budget: BudgetRecord | None = None
    unknown: Unknown = field(default_factory=dict, repr=False)


@dataclass
class BaseModelRecord:
    """The model before immunization.

    Attributes:
        name: Id on the Hub, or the last part of a local path.
        revision: Branch, tag or commit.
        on_hub: Whether `name` is an id on the Hub.
    """

    name: str
    revision: str | None = None
    on_hub: bool = False
    unknown: Unknown = field(default_factory=dict, repr=False)


@dataclass
class DataRecord:
    """One task's data.

    Attributes:
        name: What the data are called; an id on the Hub where `on_hub`.
        on_hub: Whether `name` is an id on the Hub.
        revision: Its commit.
        split: Its split that was measured on.
        classes: Names of the classes, where they were chosen out of a larger set.
        fingerprint: The `datasets` fingerprint of what was measured on.
        train_size: Images trained on.
        size: Images measured on, N.
        checksum: Of the pixel values measured on, in whatever order, after the image processor (see `Measurement`).
        held_out_fraction, held_out_seed: How the images measured on were held out of the training split (see
            `hf_immunize.data.sources`); None where they are a split or a source of their own.
        train_sketch, sketch: By which to know images trained on and measured on again, whatever they are called (see
            `hf_immunize.data.identity`).
    """

    name: str
    on_hub: bool = False
    revision: str | None = None
    split: str | None = None
    classes: list[str] | None = None
    fingerprint: str | None = None
    train_size: Count | None = None
    size: Count | None = None
    checksum: float | None = None
    held_out_fraction: float | None = None
    held_out_seed: int | None = None
    train_sketch: str | None = None
    sketch: str | None = None
    unknown: Unknown = field(default_factory=dict, repr=False)


@dataclass
class ConditioningRecord:
    """Conditioning of ``ZᵀZ`` over all images measured on (see `Conditioning`), Z the classifier's inputs.

    Attributes:
        log10_kappa: Decimal logarithm of κ, or of the bound from below where `is_bound`.
        rank: Numerical rank of Z.
        num_samples: N. With N < D the number describes the sample, not the task.
        dim: D.
        effective_rank: exp of the entropy of the normalized singular values.
        is_bound: Whether the rank fell below the reference's.
        reference_rank: That rank.
        sigma_max, sigma_min, cutoff: Largest singular value of Z, smallest above the rank rule's threshold, and that.
    """

    log10_kappa: Log10Kappa
    rank: Count
    num_samples: Count
    dim: Count
    effective_rank: Size | None = None
    is_bound: bool = False
    reference_rank: Count | None = None
    sigma_max: Size | None = None
    sigma_min: Size | None = None
    cutoff: Size | None = None
    unknown: Unknown = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, conditioning: Conditioning) -> ConditioningRecord:
        """What a record keeps of a measured conditioning."""
        names = [item.name for item in fields(cls) if item.name != "unknown"]
        return cls(**{name: getattr(conditioning, name) for name in names})

    def conditioning(self) -> Conditioning:
        """The conditioning this was taken from; NaN where the record does not know a number."""
        log_kappa = self.log10_kappa * math.log(10.0)
        numbers = (self.effective_rank, self.sigma_max, self.sigma_min, self.cutoff)
        effective_rank, sigma_max, sigma_min, cutoff = (math.nan if x is None else x for x in numbers)
        return Conditioning(
            kappa=math.exp(min(log_kappa, 709.0)),
            log_kappa=log_kappa,
            rank=self.rank,
            num_samples=self.num_samples,
            dim=self.dim,
            effective_rank=effective_rank,
            sigma_max=sigma_max,
            sigma_min=sigma_min,
            cutoff=cutoff,
            is_bound=self.is_bound,
            reference_rank=self.reference_rank,
        )


@dataclass
class SideRecord:
    """Conditioning of one task's features through the model before immunization and after.

    Attributes:
        before: Through the reference weights.
        after: Through the weights beside the record.
    """

    before: ConditioningRecord | None = None
    after: ConditioningRecord | None = None
    unknown: Unknown = field(default_factory=dict, repr=False)


@dataclass
class RatioRecord:
    """The relative immunization ratio under one protocol (see `relative_immunization_ratio`).

    Attributes:
        log10_rir: Decimal logarithm of RIR (of its mean over groups); None where it is undetermined.
        log10_harmful_ratio: Of its part (i).
        log10_benign_ratio: Of its part (ii).
        bound: What RIR is of the true value: None (itself), "lower", "upper" or "undetermined".
        relative_std: Standard deviation over groups, divided by the mean.
        num_groups, group_size, seed: How the groups were drawn.
    """

    log10_rir: Log10 | None
    log10_harmful_ratio: Log10 | None = None
    log10_benign_ratio: Log10 | None = None
    bound: str | None = None
    relative_std: Annotated[float, Range(0, 1000)] | None = None
    num_groups: Annotated[int, Range(1, 10_000)] | None = None
    group_size: Annotated[int, Range(2, 10_000_000)] | None = None
    seed: Annotated[int, Range(-(2**63), 2**64 - 1)] | None = None
    unknown: Unknown = field(default_factory=dict, repr=False)


@dataclass
class MetricRecord:
    """The benign task's metric on the images measured on.

    Attributes:
        name: Such as "accuracy".
        after: Through the weights beside the record.
        before: Through the starting weights, where they were evaluated.
        precision: Mixed precision of the evaluation: "no", "bf16" or "fp16".
    """

    name: str
    after: float
    before: float | None = None
    precision: str | None = None
    unknown: Unknown = field(default_factory=dict, repr=False)


@dataclass
class AttackRecord:
    """The strongest attacker of one kind of access, on the harmful task's held-out images.

    Attributes:
        attacker: Its name.
        accuracy: What it reaches on the immunized model, between 0 and 1.
        reference_accuracy: What the strongest of its kind reaches on the model before immunization.
        chance: Accuracy of always naming the most frequent class.
        layer: Where it probes, or what it fine-tunes.
    """

    attacker: str
    accuracy: Share
    reference_accuracy: Share | None = None
    chance: Share | None = None
    layer: str | None = None
    unknown: Unknown = field(default_factory=dict, repr=False)


@dataclass
class AuditRecord:
    """What an audit found, in short.

    Attributes:
        preset: Which attackers and budgets.
        preset_version: Raised whenever the preset changes.
        strongest: By access: "head_input", "any_layer", "fine_tuning"; what is absent was not attacked.
        utility: Benign accuracy, as the audit measured it.
        verdict: What the audit's report says, in sentences; names of data in them are the user's own.
    """

    preset: str
    preset_version: Count = 1
    strongest: dict[str, AttackRecord | None] = field(default_factory=dict)
    utility: dict[str, Any] | None = None
    verdict: list[str] = field(default_factory=list)
    unknown: Unknown = field(default_factory=dict, repr=False)


SCHEMA_VERSION = "1.0"
RECORD_NAME = "immunization.json"
BOUNDS = (None, "lower", "upper", "undetermined")
# What a figure may be: the endings of its name, and what it then is.
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".gif": "GIF", ".webp": "WEBP"}
# Rows of features in all groups together: each group is decomposed when its ratio is verified.
_MOST_DRAWN = 10_000_000
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SKETCH = re.compile(r"(?:[0-9a-f]{16}){0,256}")


def check_version(version: Any) -> None:
    """Refuse what a newer major version wrote.

    Args:
        version: "major.minor", as found.

    Raises:
        RecordVersionError: If its major part is larger than this library's.
        RecordError: If it is no version.
    """
    if not isinstance(version, str) or not re.fullmatch(r"\d{1,6}\.\d{1,6}", version):
        raise RecordError(
            f"Expected schema_version 'major.minor' in {RECORD_NAME}, found {version!r:.60}. It is damaged, or was "
            "not written by this library."
        )
    if int(version.split(".")[0]) > int(SCHEMA_VERSION.split(".")[0]):
        raise RecordVersionError(
            f"Expected a record of schema {SCHEMA_VERSION} or of another minor version, found {version}, which is "
            "newer. Update hf_immunize."
        )


def validate(record: ImmunizationRecord) -> None:
    """Check what types alone do not say.

    Args:
        record: Read or about to be written.

    Raises:
        RecordError: If a value is out of its range; the message names it.
    """
    for name, digest in record.weights.items():
        _check(bool(_FILE_NAME.fullmatch(name)), f"weights.{name}", "the name of a file beside the record", name)
        _check(bool(_SHA256.fullmatch(digest)), f"weights.{name}", "a SHA-256 in hexadecimal", digest)
    for name in record.figures:
        picture = bool(_FILE_NAME.fullmatch(name)) and name.endswith(tuple(PICTURES))
        _check(picture, "figures", f"names of pictures beside the record ({', '.join(PICTURES)})", name)
    for protocol, ratio in record.ratios.items():
        _check(ratio.bound in BOUNDS, f"ratios.{protocol}.bound", f"one of {BOUNDS}", ratio.bound)
        told = ratio.log10_rir is not None
        _check(told or ratio.bound == "undetermined", f"ratios.{protocol}.log10_rir", "a number", ratio.log10_rir)
        drawn = (ratio.num_groups or 1) * (ratio.group_size or 1)
        _check(drawn <= _MOST_DRAWN, f"ratios.{protocol}.num_groups", f"at most {_MOST_DRAWN} rows in all", drawn)
    for side in ("benign", "harmful"):
        features: SideRecord = getattr(record, f"{side}_features")
        for moment in ("before", "after"):
            part: ConditioningRecord | None = getattr(features, moment)
            where = f"{side}_features.{moment}"
            if part is not None:
                most = min(part.num_samples, part.dim)
                least = 0 if part.is_bound else 1  # 0: all of it is lost
                _check(
                    least <= part.rank <= most, f"{where}.rank", f"between {least} and min(N, D) = {most}", part.rank
                )
        data: DataRecord | None = getattr(record, side)
        if data is not None:
            part_of = data.held_out_fraction
            _check(part_of is None or 0 < part_of < 1, f"{side}.held_out_fraction", "between 0 and 1", part_of)
            seed = data.held_out_seed
            _check(seed is None or 0 <= seed < 2**64, f"{side}.held_out_seed", "from 0 to 2**64 - 1", seed)
            for name in ("train_sketch", "sketch"):
                text = getattr(data, name)
                known = text is None or bool(_SKETCH.fullmatch(text))
                _check(known, f"{side}.{name}", "at most 256 hashes of 16 hexadecimal digits", text and text[:40])
    metric = record.metric
    if metric is not None and metric.name == "accuracy":
        for name, share in (("after", metric.after), ("before", metric.before)):
            _check(share is None or 0 <= share <= 1, f"metric.{name}", "between 0 and 1", share)


def _check(holds: bool, where: str, expected: str, found: Any) -> None:
    if not holds:
        raise RecordError(
            f"Expected {printable(where)} in the record to be {expected}, found {found!r:.60}. The record is damaged."
        )


_MAX_BYTES = 2**24


@dataclass
class ImmunizationRecord:
    """Everything a checkpoint says of its immunization; the schema of ``immunization.json``.

    Attributes:
        method: How it was made.
        base_model: What it was made from.
        benign, harmful: The data; None where there were none.
        metric: The benign metric before and after.
        benign_features, harmful_features: κ, ranks and bounds of both tasks' features, before and after.
        ratios: RIR by protocol: "exact", "groups".
        audit: What an audit found; None where none was made.
        weights: SHA-256 of every weight file, by its name.
        image_processor: Class of the image processor beside the weights.
        software: Versions of the libraries.
        license: Licence of the weights.
        figures: Names of figures beside the record.
        remarks: Plain sentences that the figures need to be understood.
        schema_version: "major.minor".

    Example:
        >>> record = ImmunizationRecord(MethodRecord("kappa", "all", 10, 0), BaseModelRecord("user/vit"))
        >>> ImmunizationRecord.from_json(record.to_json()) == record
        True
    """

    method: MethodRecord
    base_model: BaseModelRecord
    benign: DataRecord | None = None
    harmful: DataRecord | None = None
    metric: MetricRecord | None = None
    benign_features: SideRecord = field(default_factory=SideRecord)
    harmful_features: SideRecord = field(default_factory=SideRecord)
    ratios: dict[str, RatioRecord] = field(default_factory=dict)
    audit: AuditRecord | None = None
    weights: dict[str, str] = field(default_factory=dict)
    image_processor: str | None = None
    software: dict[str, str] = field(default_factory=dict)
    license: str | None = None
    figures: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    schema_version: str = SCHEMA_VERSION
    unknown: Unknown = field(default_factory=dict, repr=False)

    def to_json(self) -> str:
        """The text of ``immunization.json``.

        Raises:
            RecordError: If it holds what is not finite, or what cannot be.
        """
        plain = to_plain(self)
        validate(from_plain(ImmunizationRecord, plain, "record"))
        return (
            json.dumps({"schema_version": plain.pop("schema_version"), **plain}, indent=2, ensure_ascii=False) + "\n"
        )

    @classmethod
    def from_json(cls, text: str) -> ImmunizationRecord:
        """Read a record.

        Args:
            text: Text of ``immunization.json``.

        Raises:
            RecordVersionError: If a newer major version of the schema wrote it.
            RecordError: If it is truncated, damaged, or says what cannot be; the message names the field.
        """
        try:
            plain = json.loads(text, parse_constant=_refuse_constant)
        except RecordError:
            raise
        except (ValueError, RecursionError) as error:  # no JSON, thousands of digits, nested without end
            raise RecordError(
                f"Expected {RECORD_NAME} to be JSON, found: {library_words(error)}. It is truncated or damaged; "
                "fetch it again, or measure and save the model again."
            ) from error
        if isinstance(plain, dict):
            check_version(plain.get("schema_version"))
        record = from_plain(cls, plain, "record")
        validate(record)
        return record


def read_record(folder: str | os.PathLike[str]) -> ImmunizationRecord:
    """Read the record of a checkpoint.

    Args:
        folder: The checkpoint's folder.

    Returns:
        The record.

    Raises:
        RecordVersionError: If a newer major version of the schema wrote it.
        RecordError: If there is none, or it is truncated, damaged, or says what cannot be.
    """
    path = Path(folder) / RECORD_NAME
    if not path.is_file():
        raise RecordError(
            f"Expected {RECORD_NAME} beside the weights, found none: this checkpoint carries no evidence. Immunize "
            "and evaluate it with hf_immunize, or load it with from_pretrained as any other model."
        )
    if path.stat().st_size > _MAX_BYTES:
        raise RecordError(f"Expected {RECORD_NAME} of a few kilobytes, found {path.stat().st_size} bytes.")
    try:
        return ImmunizationRecord.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecordError(
            f"Expected {RECORD_NAME} in UTF-8, found: {error}. It is damaged; fetch it again."
        ) from error


def find_record(model: Any, revision: str | None = None) -> ImmunizationRecord | None:
    """The record of a model that may have none.

    Args:
        model: A folder, a name on the Hub, or a model in memory, which has none.
        revision: Branch, tag or commit on the Hub.

    Returns:
        The record; None where there is none.

    Raises:
        RecordError: If there is one, and it cannot be read.
    """
    if not isinstance(model, (str, os.PathLike)):
        return None
    names = ("gated_repo", "missing_entries", "connection_errors")
    try:
        path = cached_file(
            os.path.expanduser(model),
            RECORD_NAME,
            revision=revision,
            **{f"_raise_exceptions_for_{name}": False for name in names},
        )
    except OSError:  # there is no such model, which loading it says
        return None
    return None if path is None else read_record(Path(path).parent)


def write_record(folder: str | os.PathLike[str], record: ImmunizationRecord) -> Path:
    """Write a record, whole or not at all.

    Args:
        folder: The checkpoint's folder.
        record: What to write.

    Returns:
        The file.

    Raises:
        RecordError: If it holds what is not finite, or what cannot be.
        CheckpointError: If it cannot be written.
    """
    return write_whole(Path(folder) / RECORD_NAME, record.to_json())


def _refuse_constant(name: str) -> Any:
    raise RecordError(
        f"Expected finite numbers in {RECORD_NAME}, found {name}, which is no JSON. The record is damaged."
    )
