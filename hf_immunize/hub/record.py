"""``immunization.json``: what was done to a checkpoint, on which data, and what was measured.

The file lies beside the weights and names them by their hashes. It holds finite JSON only, κ therefore as its decimal
logarithm. Fields that a later minor version adds survive being read and written by this one; a later major version is
refused by name. Data are described, never included.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from hf_immunize.errors import RecordError
from hf_immunize.files import write_whole
from hf_immunize.hub.parts import (
    AuditRecord,
    BaseModelRecord,
    DataRecord,
    MethodRecord,
    MetricRecord,
    RatioRecord,
    SideRecord,
    Unknown,
)
from hf_immunize.hub.schema import from_plain, to_plain
from hf_immunize.hub.validation import RECORD_NAME, SCHEMA_VERSION, check_version, validate
from hf_immunize.text import library_words


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
