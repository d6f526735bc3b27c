"""The activations of a frozen trunk, computed once and kept in memory-mapped Arrow files, one a process."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging

from hf_immunize.data.images import ImageCollator
from hf_immunize.errors import ArgumentError, DataError, DiskSpaceError, NonFiniteError
from hf_immunize.features.processes import ALONE, Processes
from hf_immunize.features.trunk_key import (
    model_fingerprint,
    processor_fingerprint,
    row_checksums,
    stored_fingerprint,
    text_fingerprint,
    trunk_fingerprint,
)
from hf_immunize.features.trunk_rows import CachedRows
from hf_immunize.features.trunk_views import RowViews, ViewCollator, differs_between_draws
from hf_immunize.files import UNFINISHED, checked, file_sha256, flush, with_checksum


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_immunize.features.trunk import TrunkSplit


DTYPES = {"float16": torch.float16, "float32": torch.float32}
# Of activations computed again in a batch of another size, on whatever device; those of another image differ by more.
_SAME = 3e-2
_KEY_FILE = "trunk.json"
logger = logging.get_logger(__name__)


class TrunkCache:
    """The stored activations of one dataset: found where they fit, else written.

    They fit if weights, model, data, processor and views have the fingerprints they were written for, and a few rows
    computed again agree.

    Args:
        model: The model that was split; its trunk runs where it is.
        split: Where its trunk ends, as found by `split_trunk`.
        rows: A map-style dataset of rows with ``"image"`` or ``"pixel_values"``, such as `ImageRows`.
        folder: Where they are kept; nothing else should be in it.
        name: What log, progress bar and errors call the data, such as ``"benign images"``.
        processor: A transformers image processor; needed where the rows hold images.
        collate: A collator in place of that of the processor; gives ``pixel_values`` and ``labels``.
        dtype: ``"float32"``, or ``"float16"``, which takes half the space and rounds to 3 digits.
        views: How many views of each image are kept: each a draw of the data's own random transform, or of `augment`.
        augment: Takes an image (or pixel values) and a `torch.Generator`, and returns another; the first view is kept
            without.
        seed: Seeds the draws, each view of each row by itself.
        batch_size: Images in one forward pass.
        num_workers: Processes that read images.
        progress: Whether to show progress bars.
        processes: Those that do this together, each with the same arguments; each computes a share of the batches.

    Raises:
        ArgumentError: If `dtype` or `views` has an impossible value, or the views would all be alike.
        DataError: If the rows are random and there is one view, so that one draw would be frozen; or if the collator
            gives something that cannot be stored.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        split: TrunkSplit,
        rows: Any,
        folder: str | os.PathLike[str],
        *,
        name: str = "images",
        processor: Any = None,
        collate: Callable[[list[Any]], dict[str, Tensor]] | None = None,
        dtype: str = "float32",
        views: int = 1,
        augment: Callable[[Any, torch.Generator], Any] | None = None,
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
        progress: bool = True,
        processes: Processes = ALONE,
    ) -> None:
        if dtype not in DTYPES:
            raise ArgumentError(f"Expected the type of a cached trunk out of {', '.join(DTYPES)}, found {dtype!r}.")
        if views < 1:
            raise ArgumentError(f"Expected at least 1 view of each image, found {views}.")
        self.folder = Path(folder)
        self.name = name
        self.processes = processes
        self._model, self._split, self._dtype = model, split, dtype
        self._batch_size, self._num_workers, self._progress = batch_size, num_workers, progress
        self._views = RowViews(rows, views, augment, seed)
        self._collate = ViewCollator(collate or ImageCollator(processor))
        self._check_views(augment)
        first = self._computed([0])
        self._labelled = "labels" in first
        data = stored_fingerprint(rows) if collate is None else None
        self._key = {
            "weights": trunk_fingerprint(model, split),
            "model": model_fingerprint(model, split),
            "data": data or self._checksum(),
            "processor": processor_fingerprint(processor),
            "views": text_fingerprint([views, seed, dtype, None if augment is None else Hasher.hash(augment)]),
        }

    def __len__(self) -> int:
        return len(self._views)

    @property
    def nbytes(self) -> int:
        """About how much space they take, in bytes."""
        width = math.prod(self._split.activation_shape) * DTYPES[self._dtype].itemsize + 8 * self._labelled
        batches = -(-len(self) // self._batch_size)
        return len(self) * width + batches * 1024 + 2**16

    def find(self) -> CachedRows | None:
        """The stored activations, if there are any that fit; says in the log why those that are there do not."""
        if not self.folder.exists():
            return None
        found = self._found()
        if isinstance(found, CachedRows):
            return found
        if self.processes.first:
            logger.warning(f"The cached trunk of {self.name} {found}: computed anew.")
        return None

    def _found(self) -> CachedRows | str:
        """The stored activations, or why those that are there do not fit."""
        try:
            stored = checked((self.folder / _KEY_FILE).read_text(encoding="utf-8"))
            rows = self._open(self.folder)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            return f"cannot be read ({type(error).__name__})"
        # One that does not fit is not read through.
        if others := [part for part, value in self._key.items() if stored.get(part) != value]:
            return f"is of other {', '.join(others)}"
        if damaged := self._damaged(stored.get("files", {})):
            return f"is damaged ({damaged} is not what was written)"
        if len(rows) * rows.views != len(self) or not self._agrees(rows):
            return "does not fit these images"
        return rows

    def write(self) -> CachedRows:
        """Compute and store the activations; what was there before is removed. Collective.

        Each process computes whole batches, those that a single one would, and keeps them in a file of its own: the
        rows and their order do not depend on the number of processes, and nothing is written twice.

        Returns:
            The stored rows, of all processes.

        Raises:
            DiskSpaceError: If the disk fills up.
            NonFiniteError: If an activation is NaN, infinite or too large for float16.
            ProcessError: If another process failed.
        """
        staging = self.processes.from_first(self._start_anew)
        try:
            parts = self.processes.together(lambda: self._write_part(staging))
            self.processes.from_first(lambda: self._finish(staging, dict(part for part in parts if part)))
        finally:
            if self.processes.first:
                shutil.rmtree(staging, ignore_errors=True)
        return self._open(self.folder)

    def _start_anew(self) -> Path:
        with self._named_errors():
            shutil.rmtree(self.folder, ignore_errors=True)
            return Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{self.folder.name}-", dir=self.folder.parent))

    def _finish(self, staging: Path, checksums: dict[str, str]) -> None:
        with self._named_errors():
            (staging / _KEY_FILE).write_text(with_checksum({**self._key, "files": checksums}), encoding="utf-8")
            flush(staging / _KEY_FILE)
            flush(staging)
            os.replace(staging, self.folder)
            flush(self.folder.parent)

    def _damaged(self, checksums: dict[str, str]) -> str | None:
        """The first file that is not what was written; each process looks at its share, since all must find them."""
        names = sorted(file.name for file in self.folder.glob("activations*.arrow"))
        if names != sorted(checksums):  # an older version kept no checksums
            return _KEY_FILE
        own = self.processes.share(names)
        return next((name for name in own if file_sha256(self.folder / name) != checksums[name]), None)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DiskSpaceError(
                f"Expected to write the cached trunk of {self.name} into {self.folder.parent}, found: {error}. Make "
                "room, choose another trunk_cache_dir, or train without (cache_trunk='no')."
            ) from error

    def _write_part(self, folder: Path) -> tuple[str, str] | None:
        """Write this process's share, if it has one; returns the file's name and its checksum."""
        own = self.processes.share(self._all_batches())
        if not own:
            return None
        width = math.prod(self._split.activation_shape)
        columns: dict[str, Any] = {"activation": datasets.List(datasets.Value(self._dtype), length=width)}
        columns |= {"labels": datasets.Value("int64")} if self._labelled else {}
        schema = datasets.Features(columns).arrow_schema
        index, count = self.processes.index, self.processes.count
        path = folder / ("activations.arrow" if count == 1 else f"activations-{index:05d}-of-{count:05d}.arrow")
        description = f"trunk of {self.name}, {readable_size(self.nbytes)}"
        with self._named_errors(), open(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for positions, batch in zip(own, self._batches(own, description), strict=True):
                values = self._activations(batch, first=positions.start)
                flat = pa.array(values.reshape(-1).numpy())
                arrays = [pa.FixedSizeListArray.from_arrays(flat, width)]
                arrays += [pa.array(batch["labels"].numpy(), pa.int64())] if self._labelled else []
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
            writer.close()
        with self._named_errors():
            flush(path)
            return path.name, file_sha256(path)

    def _activations(self, batch: dict[str, Tensor], first: int = 0) -> Tensor:
        device = next(self._model.parameters()).device
        with _in_eval(self._model):
            values = self._split.activations(self._model, batch["pixel_values"].to(device)).cpu()
        values = values.to(DTYPES[self._dtype])
        lost = ~torch.isfinite(values.flatten(1)).all(dim=1)
        if bool(lost.any()):
            row = (first + int(lost.nonzero()[0])) // self._views.views
            raise NonFiniteError(
                f"Expected finite {self._dtype} activations at {self._split.entry!r}, found NaN or infinity for row "
                f"{row} of {self.name}. Check that image; if it is sound, use cache_trunk='float32'."
            )
        return values

    def _all_batches(self) -> list[range]:
        size = self._batch_size
        return [range(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def _batches(self, own: list[range], description: str) -> Iterator[dict[str, Tensor]]:
        loader = torch.utils.data.DataLoader(
            self._views,
            batch_sampler=own,  # type: ignore[arg-type]
            collate_fn=self._collate,
            num_workers=self._num_workers,
            generator=torch.Generator(),  # else it would draw from the one that training draws from
        )
        quiet = not (self._progress and self.processes.first)
        with tqdm(total=sum(map(len, own)), desc=description, unit="img", disable=quiet) as bar:
            for batch in loader:
                yield batch
                bar.update(len(batch["pixel_values"]))

    def _checksum(self) -> str:
        """Of all rows, whatever the size of a batch and the number of processes. Collective."""
        own = self.processes.share(self._all_batches())

        def of_own() -> list[bytes]:
            return [each for batch in self._batches(own, f"checksum of {self.name}") for each in row_checksums(batch)]

        parts = self.processes.together(of_own)
        return hashlib.sha256(b"".join(each for part in parts for each in part)).hexdigest()

    def _computed(self, positions: list[int]) -> dict[str, Tensor]:
        return self._collate([self._views[position] for position in positions])

    def _open(self, folder: Path) -> CachedRows:
        # In the order of processes, by name.
        parts = [datasets.Dataset.from_file(str(file)) for file in sorted(folder.glob("activations*.arrow"))]
        if not parts:
            raise FileNotFoundError(f"no activations in {folder}")
        dataset = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
        return CachedRows(dataset, self._split.activation_shape, self._views.views)

    def _agrees(self, rows: CachedRows) -> bool:
        """Whether a few rows computed again are those stored."""
        positions = sorted({0, len(self) // 2, len(self) - 1})
        batch = self._computed(positions)
        now = self._activations(batch).float()
        stored = [rows[divmod(position, rows.views)] for position in positions]
        then = torch.stack([row["pixel_values"] for row in stored]).float()
        labels = [row.get("labels") for row in stored]
        same_labels = labels == (batch["labels"].tolist() if self._labelled else [None] * len(labels))
        return same_labels and bool((now - then).abs().max() <= _SAME * now.abs().max())

    def _check_views(self, augment: Any) -> None:
        views = self._views.views
        random = differs_between_draws(self._views, self._collate)
        if random and views == 1:
            raise DataError(
                f"Expected {self.name} that are the same at every access, found that they differ (a random transform "
                "or collator), so that a cached trunk would freeze one draw. Give trunk_cache_views= a number of "
                "draws to keep of each image, remove the randomness, or train without (cache_trunk='no')."
            )
        if not random and views > 1 and augment is None:
            raise ArgumentError(
                f"Expected {views} different views of {self.name}, found no randomness to draw them with. Give the "
                "dataset a random transform (with_transform), or set trunk_cache_views=1."
            )


def readable_size(nbytes: int) -> str:
    """A size for people, such as ``"1.5 GB"``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes / 1000:.0f} kB"


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
