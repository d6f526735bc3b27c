"""What an audit keeps on disk: the outcomes to resume from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from hf_immunize.audit.result import Outcome
from hf_immunize.errors import ArgumentError, CheckpointError
from hf_immunize.files import checked, flush, weights_fingerprint, with_checksum, write_whole


class Journal:
    """Finished outcomes, one line of JSON each, appended whole or not at all."""

    def __init__(self, folder: str | os.PathLike[str] | None, fingerprint: str, warnings: list[str]) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self.path = None if folder is None else Path(folder) / "outcomes.jsonl"
        self._seen = 0  # bytes that were read
        if self.path is not None:
            self._claims = self.path.parent / "_claims"
            self._read(fingerprint, warnings)

    @contextmanager
    def claimed(self, outcome: Outcome, wait: bool = False) -> Iterator[bool]:
        """Whether an attack is this process's for now; what others have found by then is among the outcomes.

        The system lets go of the claims of a process that ends, however that happens.
        """
        if self.path is None:
            yield True
            return
        name = hashlib.blake2b(key_of(outcome).encode(), digest_size=16).hexdigest()
        lock = FileLock(self._claims / name, timeout=-1 if wait else 0)
        try:
            lock.acquire(poll_interval=0.5)
        except Timeout:
            yield False
            return
        except (NotImplementedError, OSError):
            pass  # a file system that knows no locks: an attack may run twice
        try:
            self._catch_up()
            yield True
        finally:
            lock.release()

    def close(self) -> None:
        """Remove the claims, when all outcomes are there."""
        if self.path is not None:
            shutil.rmtree(self._claims, ignore_errors=True)

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
        with open(self.path, "ab", buffering=0) as file:
            # At once, so that lines of several processes do not mix.
            file.write(f"{with_checksum(line)}\n".encode())
        flush(self.path)

    def _catch_up(self) -> None:
        """Read what other processes have added."""
        assert self.path is not None
        with open(self.path, "rb") as file:
            file.seek(self._seen)
            *whole, unfinished = file.read().split(b"\n")
            self._seen = file.tell() - len(unfinished)
        for line in whole:
            with suppress(ValueError, TypeError):
                self._note(checked(line.decode("utf-8", errors="replace")))

    def _note(self, values: dict[str, Any]) -> None:
        outcome = Outcome(**values)
        # What was skipped for want of memory may go now.
        if outcome.status != "skipped":
            self.outcomes.setdefault(key_of(outcome), outcome)

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
                    self._note(values)
                whole.append(line)
            except (ValueError, TypeError):
                pass
        if found is not None and found != fingerprint:
            raise ArgumentError(
                f"Expected this audit or none in {self.path.parent}, found one of other weights, data or budgets. "
                "Images count as the image processor gives them, which with torchvision is another than without. Give "
                "another folder (--output-dir, in Python run_dir=), or remove its outcomes.jsonl to start anew."
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
