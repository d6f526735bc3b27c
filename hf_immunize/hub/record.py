"""``immunization.json``: what was done to a checkpoint, on which data, and what was measured.

The file lies beside the weights and names them by their hashes. It holds finite JSON only, κ therefore as its decimal
logarithm. Fields that a later minor version adds survive being read and written by this one; a later major version is
refused by name. Data are described, never included.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_immunize.errors import RecordError, RecordVersionError
from hf_immunize.hub.schema import from_plain, to_plain
from hf_immunize.spectra.conditioning import Conditioning


SCHEMA_VERSION = "1.0"
RECORD_NAME = "immunization.json"
BOUNDS = (None, "lower", "upper", "undetermined")
ACCESS = ("head_input", "any_layer", "fine_tuning")
_MAX_BYTES = 2**24
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
Unknown = dict[str, Any]


def _unknown() -> Any:
    return field(default_factory=dict, repr=False)


@dataclass
class MethodRecord:
    """How the checkpoint was made.

    Attributes:
        objective: Name of what was minimized, such as "kappa".
        trainable: What moved: "last_stage", "all", or a regular expression on parameter names.
        steps: Optimizer steps.
        seed: Seed of the run.
        benign_weight, harmful_weight: Weights of the regularizers: numbers, or "auto" (by gradient norm).
        auto_weight_ratio: With "auto", the gradient's norm relative to that of the benign loss.
        scale_free: Whether the regularizers were taken of H·D/tr(H).
        freeze_batchnorm: Whether BatchNorm statistics stayed as they were.
    """

    objective: str
    trainable: str
    steps: int
    seed: int
    benign_weight: float | str | None = None
    harmful_weight: float | str | None = None
    auto_weight_ratio: float | None = None
    scale_free: bool | None = None
    freeze_batchnorm: bool | None = None
    unknown: Unknown = _unknown()


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
    unknown: Unknown = _unknown()


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
        checksum: Of the pixel values measured on, in their order, after the image processor (see `Measurement`).
    """

    name: str
    on_hub: bool = False
    revision: str | None = None
    split: str | None = None
    classes: list[str] | None = None
    fingerprint: str | None = None
    train_size: int | None = None
    size: int | None = None
    checksum: float | None = None
    unknown: Unknown = _unknown()


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

    log10_kappa: float
    rank: int
    num_samples: int
    dim: int
    effective_rank: float | None = None
    is_bound: bool = False
    reference_rank: int | None = None
    sigma_max: float | None = None
    sigma_min: float | None = None
    cutoff: float | None = None
    unknown: Unknown = _unknown()

    @classmethod
    def of(cls, conditioning: Conditioning) -> ConditioningRecord:
        """What a record keeps of a measured conditioning."""
        names = ("log10_kappa", "rank", "num_samples", "dim", "effective_rank", "is_bound", "reference_rank")
        names += ("sigma_max", "sigma_min", "cutoff")
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
    unknown: Unknown = _unknown()


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

    log10_rir: float | None
    log10_harmful_ratio: float | None = None
    log10_benign_ratio: float | None = None
    bound: str | None = None
    relative_std: float | None = None
    num_groups: int | None = None
    group_size: int | None = None
    seed: int | None = None
    unknown: Unknown = _unknown()


@dataclass
class MetricRecord:
    """The benign task's metric on the images measured on.

    Attributes:
        name: Such as "accuracy".
        after: Through the weights beside the record.
        before: Through the starting weights, where they were evaluated.
    """

    name: str
    after: float
    before: float | None = None
    unknown: Unknown = _unknown()


@dataclass
class AttackRecord:
    """The strongest attacker of one kind of access, on the harmful task's held-out images.

    Attributes:
        attacker: Its name.
        accuracy: What it reaches on the immunized model, between 0 and 1.
        reference_accuracy: What the strongest of its kind reaches on the model before immunization.
        chance: Accuracy of always naming the most frequent class.
    """

    attacker: str
    accuracy: float
    reference_accuracy: float | None = None
    chance: float | None = None
    unknown: Unknown = _unknown()


@dataclass
class AuditRecord:
    """What an audit found, in short.

    Attributes:
        preset: Which attackers and budgets.
        preset_version: Raised whenever the preset changes.
        strongest: By access: "head_input", "any_layer", "fine_tuning"; what is absent was not attacked.
        utility: Benign accuracy, as the audit measured it.
    """

    preset: str
    preset_version: int = 1
    strongest: dict[str, AttackRecord | None] = field(default_factory=dict)
    utility: dict[str, Any] | None = None
    unknown: Unknown = _unknown()


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
    unknown: Unknown = _unknown()

    def to_json(self) -> str:
        """The text of ``immunization.json``.

        Raises:
            RecordError: If it holds what is not finite, or what cannot be.
        """
        plain = to_plain(self)
        validate(from_plain(ImmunizationRecord, plain, "record"))
        return json.dumps({"schema_version": plain.pop("schema_version"), **plain}, indent=2, ensure_ascii=False) + "\n"

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
        except (json.JSONDecodeError, RecursionError) as error:
            raise RecordError(
                f"Expected {RECORD_NAME} to be JSON, found: {error}. It is truncated or damaged; fetch it again, or "
                "measure and save the model again."
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
            f"Expected {RECORD_NAME} beside the weights, found none: this checkpoint carries no evidence. Immunize and "
            "evaluate it with hf_immunize, or load it with from_pretrained as any other model."
        )
    if path.stat().st_size > _MAX_BYTES:
        raise RecordError(f"Expected {RECORD_NAME} of a few kilobytes, found {path.stat().st_size} bytes.")
    try:
        return ImmunizationRecord.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecordError(f"Expected {RECORD_NAME} in UTF-8, found: {error}. It is damaged; fetch it again.") from error


def write_record(folder: str | os.PathLike[str], record: ImmunizationRecord) -> Path:
    """Write a record, whole or not at all.

    Args:
        folder: The checkpoint's folder.
        record: What to write.

    Returns:
        The file.

    Raises:
        RecordError: If it holds what is not finite, or what cannot be.
    """
    path = Path(folder) / RECORD_NAME
    text = record.to_json()
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix="_", delete=False, encoding="utf-8") as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


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
            f"Expected schema_version 'major.minor' in {RECORD_NAME}, found {version!r}. It is damaged, or was not "
            "written by this library."
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
        _check(bool(_FILE_NAME.fullmatch(name)), "figures", "the name of a file beside the record", name)
    for protocol, ratio in record.ratios.items():
        _check(ratio.bound in BOUNDS, f"ratios.{protocol}.bound", f"one of {BOUNDS}", ratio.bound)
        told = ratio.log10_rir is not None
        _check(told or ratio.bound == "undetermined", f"ratios.{protocol}.log10_rir", "a number", ratio.log10_rir)
        positive = ratio.relative_std is None or ratio.relative_std >= 0
        _check(positive, f"ratios.{protocol}.relative_std", "at least 0", ratio.relative_std)
    for side in ("benign", "harmful"):
        features: SideRecord = getattr(record, f"{side}_features")
        for moment in ("before", "after"):
            part: ConditioningRecord | None = getattr(features, moment)
            where = f"{side}_features.{moment}"
            if part is not None:
                most = min(part.num_samples, part.dim)
                _check(1 <= part.rank <= most, f"{where}.rank", f"between 1 and min(N, D) = {most}", part.rank)
                _check(part.log10_kappa >= 0, f"{where}.log10_kappa", "at least 0, since κ ≥ 1", part.log10_kappa)
        data: DataRecord | None = getattr(record, side)
        if data is not None and data.size is not None:
            _check(data.size >= 0, f"{side}.size", "at least 0", data.size)
    for access, attack in (record.audit.strongest if record.audit else {}).items():
        for name in ("accuracy", "reference_accuracy", "chance"):
            share = None if attack is None else getattr(attack, name)
            _check(share is None or 0 <= share <= 1, f"audit.strongest.{access}.{name}", "between 0 and 1", share)


def _check(holds: bool, where: str, expected: str, found: Any) -> None:
    if not holds:
        raise RecordError(f"Expected {where} in the record to be {expected}, found {found!r}. The record is damaged.")


def _refuse_constant(name: str) -> Any:
    raise RecordError(f"Expected finite numbers in {RECORD_NAME}, found {name}, which is no JSON. The record is damaged.")
