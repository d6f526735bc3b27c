"""The findings of an audit into the record and the card of the checkpoint that was attacked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_immunize.errors import WeightsError
from hf_immunize.hub.card import write_card
from hf_immunize.hub.hashes import changed_weights
from hf_immunize.hub.parts import AuditRecord
from hf_immunize.hub.record import ImmunizationRecord, read_record, write_record
from hf_immunize.hub.schema import from_plain
from hf_immunize.hub.validation import RECORD_NAME


def attachable_record(folder: str | os.PathLike[str]) -> ImmunizationRecord:
    """The record of a checkpoint to which the findings of an audit can be added.

    Args:
        folder: The checkpoint's folder.

    Returns:
        Its record.

    Raises:
        RecordError: If there is no record, or it is damaged.
        WeightsError: If the weights are not those of the record, so that an audit of them is none of what it names.
    """
    record = read_record(folder)
    changed = changed_weights(folder, record.weights)
    if changed:
        raise WeightsError(
            f"Expected the weights that {RECORD_NAME} names, found that {'; '.join(changed)}. An audit of other "
            "weights cannot be added to it: measure and save the model again."
        )
    return record


def attach_audit(folder: str | os.PathLike[str], found: Mapping[str, Any]) -> AuditRecord:
    """Write the findings of an audit into a checkpoint's record and its card, into both or neither.

    An earlier audit in the record is replaced; all else in it stays, as do the user's own sections of the card.

    Args:
        folder: The checkpoint's folder.
        found: Plain JSON of the form of `AuditRecord`.

    Returns:
        The findings as the record has them now.

    Raises:
        RecordError: If there is no record, or the findings have another form.
        WeightsError: If the weights are not those of the record.
        CardError: If the card that is there cannot be read; the record is then as it was.
    """
    before = attachable_record(folder)
    audit = from_plain(AuditRecord, dict(found), "audit")
    record = replace(before, audit=audit)
    write_record(folder, record)
    try:
        write_card(folder, record)
    except BaseException:
        write_record(folder, before)
        raise
    return audit
