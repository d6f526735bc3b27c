"""What a record's types alone do not say: versions, what fits together, and names that stay in their folder."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from hf_immunize.errors import RecordError, RecordVersionError
from hf_immunize.text import printable


if TYPE_CHECKING:
    from hf_immunize.hub.parts import ConditioningRecord, DataRecord, SideRecord
    from hf_immunize.hub.record import ImmunizationRecord


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
