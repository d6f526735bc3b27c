"""Images through models ahead of the attacks, spread over processes: each writes its part, the first reads all.

The features of flattened layers may be larger than memory, and attacks take hours. So nothing is sent from process to
process, and none waits for the attacks: when all parts are on disk, the first process goes on alone.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hf_immunize.audit.journal import read_kept, save_kept
from hf_immunize.errors import CheckpointError, DiskSpaceError
from hf_immunize.features.extract import Extraction, Layer
from hf_immunize.files import UNFINISHED


_PREFIX = f"{UNFINISHED}features-"


@dataclass(frozen=True)
class Pass:
    """One set of images through one model.

    Attributes:
        subject: "immunized", "reference" or "random".
        task: "harmful", "unseen", "benign" or "unrelated".
        side: "train", "test" or "utility".
        views: Earlier layers that are read as well.
        restored: Share of the reference's weights that the model gets back before.
    """

    subject: str
    task: str
    side: str
    views: tuple[tuple[Layer, str], ...] = ()
    restored: float = 0.0


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
            save_kept(tensors, place / f"{process:05d}")
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
            joined = {name: torch.cat([read_kept(file, name) for file in files]) for name in names}
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"Expected the features of {wanted.task} images as they were just written to {self.folder}, found: "
                f"{error}. Check the disk, and start again; finished attacks are kept."
            ) from error
        features, logits = joined.pop("features"), joined.pop("logits")
        return Extraction(features, logits, {name.removeprefix("view "): value for name, value in joined.items()})

    def _place(self, wanted: Pass) -> Path:
        return self.folder / str(self.passes.index(wanted))


def make_folder(parent: str | Path | None) -> Path:
    """An empty folder for `StoredPasses` in a run directory, from which what a killed audit left is removed."""
    if parent is not None:
        Path(parent).mkdir(parents=True, exist_ok=True)
        for leftover in Path(parent).glob(f"{_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
