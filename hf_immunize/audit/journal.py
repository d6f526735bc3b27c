"""What an audit keeps on disk: outcomes to resume from, and the features of processes beside this one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_immunize.audit.result import Outcome
from hf_immunize.errors import ArgumentError, CheckpointError, DiskSpaceError
from hf_immunize.features.extract import Extraction, Layer
from hf_immunize.files import (
    UNFINISHED,
    checked,
    flush,
    with_checksum,
    write_whole,
)
from hf_immunize.tensor_hash import tensors_hash, weights_fingerprint


class Journal:
    """Finished outcomes, one line of JSON each, appended whole or not at all."""

    def __init__(self, folder: str | os.PathLike[str] | None, fingerprint: str, warnings: list[str]) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self.path = None if folder is None else Path(folder) / "outcomes.jsonl"
        if self.path is None:
            return
        try:
            if self.path.exists():
                self._read(fingerprint, warnings)
            else:
                write_whole(self.path, with_checksum({"fingerprint": fingerprint}) + "\n")
        except OSError as error:
            reason = error.__cause__ or error
            raise CheckpointError(
                f"Expected to keep outcomes in {self.path.parent}, found: {reason}. Make room or choose another run "
                "directory."
            ) from error

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
        content = self.path.read_text(encoding="utf-8", errors="replace")
        lines = content.split("\n")
        whole: list[str] = []
        dropped = 0 if lines[-1] == "" else 1  # what is whole ends with a newline
        found = None
        for line in lines[:-1]:
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
                dropped += 1
        if found is not None and found != fingerprint:
            raise ArgumentError(
                f"{self.path.parent} holds an audit of other weights, data or budgets; choose another run directory, "
                "or remove its outcomes.jsonl to start anew."
            )
        if found is None:
            # Cut off before its first line was whole, or another file: nothing tells what its outcomes are of.
            self.outcomes, whole = {}, [with_checksum({"fingerprint": fingerprint})]
        if dropped or found is None:
            warnings.append(
                f"{self.path.name} of the interrupted run had {max(dropped, 1)} unfinished or damaged lines; "
                "they were dropped and their attacks run again."
            )
            write_whole(self.path, "\n".join(whole) + "\n")


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


View = tuple[Layer, str]
# Several processes extract features ahead of the attacks: each writes its part, the first reads all. The features of
# flattened layers may be larger than memory, and attacks take hours. So nothing is sent from process to process, and
# none waits for the attacks: when all parts are on disk, the first process goes on alone.
_PREFIX = f"{UNFINISHED}features-"


@dataclass(frozen=True)
class Pass:
    """One set of images through one model."""

    subject: str  # "immunized" or "reference"
    task: str  # "harmful", "unseen", "benign" or "unrelated"
    side: str  # "train", "test" or "utility"
    views: tuple[View, ...] = ()  # earlier layers that are read as well


class StoredPasses:
    """Extractions on disk, in a folder for each pass (by its place in the list) with a file for each process."""

    def __init__(self, folder: str | Path, passes: list[Pass]) -> None:
        self.folder = Path(folder)
        self.passes = passes

    def write(self, wanted: Pass, extraction: Extraction | None, process: int) -> None:
        """Keep what a process found; nothing where it had no images."""
        if extraction is None:
            return
        tensors = {"features": extraction.features, "logits": extraction.logits}
        tensors |= {f"view {label}": values for label, values in extraction.views.items()}
        place = self._place(wanted)
        try:
            place.mkdir(parents=True, exist_ok=True)
            _save(tensors, place / f"{process:05d}")
        except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
            raise DiskSpaceError(
                f"Expected to keep the features of {wanted.task} images in {self.folder}, found: {error}. Make room, "
                "choose another --output-dir, or run the audit in one process, which keeps them in memory."
            ) from error

    def read(self, wanted: Pass) -> Extraction:
        """What all processes found, in their order."""
        try:
            files = sorted(self._place(wanted).iterdir())
            with safe_open(files[0], framework="pt") as first:
                names = list(first.keys())
            # One name at a time, so that no more than one is kept twice.
            joined = {name: torch.cat([_read(file, name) for file in files]) for name in names}
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"Expected the features of {wanted.task} images as they were just written to {self.folder}, found: "
                f"{error}. Check the disk, and start again; finished attacks are kept."
            ) from error
        features, logits = joined.pop("features"), joined.pop("logits")
        return Extraction(features, logits, {name.removeprefix("view "): value for name, value in joined.items()})

    def _place(self, wanted: Pass) -> Path:
        return self.folder / str(self.passes.index(wanted))


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors with their digests."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, {name: tensors_hash([(name, tensor)]) for name, tensor in whole.items()})


def _read(path: Path, name: str) -> Tensor:
    """Read a tensor that `_save` wrote."""
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
        known = (file.metadata() or {}).get(name)
    if known != tensors_hash([(name, tensor)]):
        raise ValueError(f"{name} in {path} is not what was written")
    return tensor


def make_folder(parent: str | Path | None) -> Path:
    """An empty folder for `StoredPasses` in a run directory, from which what a killed audit left is removed."""
    if parent is not None:
        Path(parent).mkdir(parents=True, exist_ok=True)
        for leftover in Path(parent).glob(f"{_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
