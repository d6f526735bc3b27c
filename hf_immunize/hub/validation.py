"""What the types of a record's fields alone do not say: versions, ranges, and names that stay in their folder."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from hf_immunize.errors import RecordError, RecordVersionError


if TYPE_CHECKING:
    from hf_immunize.hub.parts import ConditioningRecord, DataRecord, SideRecord
    from hf_immunize.hub.record import ImmunizationRecord


SCHEMA_VERSION = "1.0"
RECORD_NAME = "immunization.json"
BOUNDS = (None, "lower", "upper", "undetermined")
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
                least = 0 if part.is_bound else 1  # 0: all of it is lost
                _check(
                    least <= part.rank <= most, f"{where}.rank", f"between {least} and min(N, D) = {most}", part.rank
                )
                _check(part.log10_kappa >= 0, f"{where}.log10_kappa", "at least 0, since κ ≥ 1", part.log10_kappa)
        data: DataRecord | None = getattr(record, side)
        if data is not None:
            _check(data.size is None or data.size >= 0, f"{side}.size", "at least 0", data.size)
            part_of = data.held_out_fraction
            _check(part_of is None or 0 < part_of < 1, f"{side}.held_out_fraction", "between 0 and 1", part_of)
            seed = data.held_out_seed
            _check(seed is None or 0 <= seed < 2**64, f"{side}.held_out_seed", "from 0 to 2**64 - 1", seed)
            for name in ("train_sketch", "sketch"):
                text = getattr(data, name)
                known = text is None or bool(_SKETCH.fullmatch(text))
                _check(known, f"{side}.{name}", "at most 256 hashes of 16 hexadecimal digits", text and text[:40])
    for access, attack in (record.audit.strongest if record.audit else {}).items():
        for name in ("accuracy", "reference_accuracy", "chance"):
            share = None if attack is None else getattr(attack, name)
            _check(share is None or 0 <= share <= 1, f"audit.strongest.{access}.{name}", "between 0 and 1", share)


def _check(holds: bool, where: str, expected: str, found: Any) -> None:
    if not holds:
        raise RecordError(f"Expected {where} in the record to be {expected}, found {found!r}. The record is damaged.")
