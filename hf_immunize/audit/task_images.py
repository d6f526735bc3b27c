"""Images of the tasks under attack, decoded once, and held as pixels where memory allows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_immunize.data.images import ImageCollator, ImageRows
from hf_immunize.errors import DataError
from hf_immunize.features.processes import ALONE, Processes


# Images in one forward pass; processes take whole batches, so that rounding is that of one process.
_BATCH = 64


@dataclass
class Images:
    """Some images of a task with their class numbers.

    Attributes:
        rows: The data set.
        indices: Which of its rows.
        labels: Their class numbers, ``(n,)``.
        hashes: One a row, of the pixel values as the model sees them; empty before `load`.
        own: Numbers of the images that this process runs through models; all of them where there is one process.
    """

    rows: ImageRows
    indices: list[int]
    labels: Tensor
    hashes: list[bytes] = field(default_factory=list)
    own: range = field(init=False)
    _held: Tensor | None = None

    def __post_init__(self) -> None:
        self.own = range(len(self))

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def whole(self) -> bool:
        """Whether this process runs all of them through models."""
        return len(self.own) == len(self)

    def load(self, processor: Any, memory: int, progress: bool = True, processes: Processes = ALONE) -> int:
        """Decode and process images once, for their hashes, and hold them if they all would fit; collective.

        Args:
            processor: Image processor.
            memory: Bytes they may take.
            progress: Whether to show a progress bar.
            processes: Those that share the work; each takes whole batches, those that a single one would.

        Returns:
            Bytes that all of them would take here, if they are held, however many processes hold them.
        """
        batches = [range(start, min(start + _BATCH, len(self))) for start in range(0, len(self), _BATCH)]
        part = processes.share(batches)
        self.own = range(part[0].start, part[-1].stop) if part else range(0)
        nbytes = 0

        def load_own() -> list[bytes]:
            nonlocal nbytes
            hashes, nbytes = self._load_own(processor, memory, progress)
            return hashes

        self.hashes = [each for hashes in processes.together(load_own) for each in hashes]
        return nbytes

    def _load_own(self, processor: Any, memory: int, progress: bool) -> tuple[list[bytes], int]:
        """Hashes of this process's images, and the bytes that all of them would take, if they fit."""
        hashes: list[bytes] = []
        held: Tensor | None = None
        nbytes, done = 0, 0
        for batch in self._decode(processor, _BATCH, progress):
            hashes += [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in batch]
            if not done:
                nbytes = batch[0].numel() * batch.element_size() * len(self)
                if nbytes <= memory:
                    held = batch.new_empty(len(self.own), *batch.shape[1:])
            if held is not None:
                if batch.shape[1:] != held.shape[1:]:
                    raise DataError(
                        f"Expected images of one size after processing in {self.rows.name}, found "
                        f"{tuple(held.shape[1:])} and {tuple(batch.shape[1:])}; use a processor that crops."
                    )
                held[done : done + len(batch)] = batch
            done += len(batch)
        self._held = held
        return hashes, 0 if held is None else nbytes

    def batches(
        self, processor: Any, size: int = _BATCH, description: str = "", progress: bool = True
    ) -> Iterator[Tensor]:
        """Pixel values of this process's images, batch by batch, in order."""
        if self._held is None:
            yield from self._decode(processor, size, progress, description)
        else:
            parts = self._held.split(size)
            yield from tqdm(parts, desc=description, disable=not progress, leave=False)

    def pixels(self, processor: Any, chosen: Tensor) -> Tensor:
        """Pixel values of chosen rows, whoever's they are, ``(k, C, H, W)``."""
        if self._held is not None and self.whole:
            return self._held[chosen]
        part = Images(self.rows, [self.indices[i] for i in chosen.tolist()], self.labels[chosen])
        return torch.cat(list(part._decode(processor, _BATCH, False)))

    def _decode(self, processor: Any, size: int, progress: bool, description: str = "images") -> Iterator[Tensor]:
        subset = torch.utils.data.Subset(self.rows, [self.indices[i] for i in self.own])
        loader = torch.utils.data.DataLoader(subset, batch_size=size, collate_fn=ImageCollator(processor))
        for batch in tqdm(loader, desc=description or "images", disable=not progress, leave=False):
            yield batch["pixel_values"].contiguous()
