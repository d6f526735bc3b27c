"""What an audit keeps on disk: the outcomes to resume from."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from hf_immunize.audit.result import Outcome
from hf_immunize.errors import ArgumentError, CheckpointError
from hf_immunize.files import checked, flush, weights_fingerprint, with_checksum, write_whole


class Journal:
    """Finished outcomes, one line of JSON each, appended whole or not at all."""

    def __init__(self, folder: str | os.PathLike[str] | None, fingerprint: str, warnings: list[str]) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self.path = None if folder is None else Path(folder) / "outcomes.jsonl"
        if self.path is not None:
            self._read(fingerprint, warnings)

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome, on disk before this returns."""
        self.outcomes[key_of(outcome)] = outcome
        if self.path is not None:
            try:
                self._append(asdict(outcome))
            except OSError as error:
                raise CheckpointError(
                    f"Expected to add to {self.path}, found: {error}. What was written is kept; make room and start "
                    "again to go on."
                ) from error

    def _append(self, line: dict[str, Any]) -> None:
        assert self.path is not None
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(with_checksum(line) + "\n")
        flush(self.path)

    def _read(self, fingerprint: str, warnings: list[str]) -> None:
        assert self.path is not None
        content = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else None
        found, whole = None, []
        for line in (content or "").split("\n"):
            try:
                values = checked(line)
                if "fingerprint" in values:
                    found = values["fingerprint"]
                else:
                    outcome = Outcome(**values)
                    # What was skipped for want of memory may go now.
                    if outcome.status != "skipped":
                        self.outcomes[key_of(outcome)] = outcome
                whole.append(line)
            except (ValueError, TypeError):
                pass
        if found is not None and found != fingerprint:
            raise ArgumentError(
                f"{self.path.parent} holds an audit of other weights, data or budgets; choose another run directory, "
                "or remove its outcomes.jsonl to start anew."
            )
        if found is None:
            # Cut off before its first line was whole, or another file: nothing tells what its outcomes are of.
            self.outcomes, whole = {}, [with_checksum({"fingerprint": fingerprint})]
        text = "\n".join(whole) + "\n"
        if content is not None and content != text:
            warnings.append(
                f"{self.path.name} of the interrupted run had unfinished or damaged lines; they were dropped and "
                "their attacks run again."
            )
        if content != text:
            write_whole(self.path, text)


def key_of(outcome: Outcome) -> str:
    """What tells one outcome of an audit from the others."""
    parts = (outcome.task, outcome.subject, outcome.access, outcome.attacker, outcome.layer, outcome.seed)
    return json.dumps([*parts, outcome.precision])


def fingerprint(models: dict[str, nn.Module], hashes: dict[str, list[bytes]], settings: dict[str, Any]) -> str:
    """One number for weights, images, labels and budgets."""
    total = hashlib.blake2b(digest_size=16)
    for name, model in sorted(models.items()):
        total.update(name.encode())
        total.update(weights_fingerprint(model).encode())
    for name, parts in sorted(hashes.items()):
        total.update(name.encode())
        for part in parts:
            total.update(part)
    total.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return total.hexdigest()
