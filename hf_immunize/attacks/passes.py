"""Images through models ahead of the attacks, spread over processes: each writes its part, the first reads all.

The features of flattened layers may be larger than memory, and attacks take hours. So nothing is sent from process to
process, and none waits for the attacks: when all parts are on disk, the first process goes on alone.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_immunize.attacks.layers import Extraction, Layer
from hf_immunize.errors import DiskSpaceError


_UNFINISHED = "_unfinished-features-"


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
    """Extractions on disk, in a folder for each pass with a file for each process.

    Args:
        folder: An empty one, made by `make_folder`.
        passes: All of them; a pass is found by its place in this list.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     stored = StoredPasses(folder, [Pass("immunized", "harmful", "test")])
        ...     for process in (1, 0):
        ...         rows = torch.full((2, 3), float(process))
        ...         stored.write(stored.passes[0], Extraction(rows, rows + 1), process)
        ...     stored.read(Pass("immunized", "harmful", "test")).features[:, 0]
        tensor([0., 0., 1., 1.])
    """

    def __init__(self, folder: str | Path, passes: list[Pass]) -> None:
        self.folder = Path(folder)
        self.passes = passes

    def write(self, wanted: Pass, extraction: Extraction | None, process: int) -> None:
        """Keep what a process found.

        Args:
            wanted: The pass.
            extraction: Of this process's images; None if it has none.
            process: Its number.

        Raises:
            DiskSpaceError: If the disk fills up.
        """
        if extraction is None:
            return
        tensors = {"features": extraction.features, "logits": extraction.logits}
        tensors |= {f"view {label}": values for label, values in extraction.views.items()}
        place = self._place(wanted)
        try:
            place.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in tensors.items()}, place / f"{process:05d}")
        except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
            raise DiskSpaceError(
                f"Expected to keep the features of {wanted.task} images in {self.folder}, found: {error}. Make room, "
                "choose another --output-dir, or run the audit in one process, which keeps them in memory."
            ) from error

    def read(self, wanted: Pass) -> Extraction:
        """What all processes found, in their order.

        Args:
            wanted: The pass.

        Returns:
            The extraction.
        """
        with ExitStack() as stack:
            files = sorted(self._place(wanted).iterdir())
            parts = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
            # One name at a time, so that no more than one is held twice.
            joined = {name: torch.cat([part.get_tensor(name) for part in parts]) for name in parts[0].keys()}  # noqa: SIM118
        features, logits = joined.pop("features"), joined.pop("logits")
        return Extraction(features, logits, {name.removeprefix("view "): value for name, value in joined.items()})

    def _place(self, wanted: Pass) -> Path:
        return self.folder / str(self.passes.index(wanted))


def make_folder(parent: str | Path | None) -> Path:
    """A folder for `StoredPasses`; what an audit that was killed left there is removed.

    Args:
        parent: The run directory; None for one of the system's own for temporary files.

    Returns:
        The folder.
    """
    if parent is None:
        return Path(tempfile.mkdtemp(prefix=_UNFINISHED))
    Path(parent).mkdir(parents=True, exist_ok=True)
    for leftover in Path(parent).glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=parent))
