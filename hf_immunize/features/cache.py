"""The activations of a frozen trunk on disk: Arrow files, found where they fit, else written anew."""

# `datasets` maps the files into memory. They are not written by its `map`, which knows neither a checksum of what it
# wrote nor processes that each write a part of one data set.

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
import transformers
from huggingface_hub.utils import WeakFileLock
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging

from hf_immunize.data.images import ImageCollator, ImageRows
from hf_immunize.errors import DataError, DiskSpaceError, NonFiniteError
from hf_immunize.features.ranks import ALONE, Processes
from hf_immunize.files import checked, file_sha256, flush, tensors_hash, with_checksum
from hf_immunize.vision.head import in_eval_mode


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_immunize.features.trunk import TrunkSplit


logger = logging.get_logger(__name__)

DTYPES = {"float16": torch.float16, "float32": torch.float32}
# Of activations computed again in a batch of another size, on whatever device; those of another image differ by more.
_SAME = 3e-2
_KEY_FILE, _FILES = "trunk.json", "activations*.arrow"
# What a configuration says about the head or about where the model came from.
_HEAD_OR_ORIGIN = {"id2label", "label2id", "num_labels", "architectures", "problem_type"}
_HEAD_OR_ORIGIN |= {"transformers_version", "_name_or_path"}


class CachedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Stored activations in place of images, memory-mapped; another process gets the name of the file alone."""

    def __init__(self, dataset: datasets.Dataset, shape: tuple[int, ...]) -> None:
        self.dataset, self.shape = dataset, shape

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        # Arrow's own memory: the formats of `datasets` would make a list of each row.
        columns = {name: self.dataset.data.column(name)[row] for name in self.dataset.column_names}
        values = columns.pop("activation").values.to_numpy(zero_copy_only=True)
        item: dict[str, Any] = {"pixel_values": torch.from_numpy(values.copy()).view(self.shape)}
        return item | {name: value.as_py() for name, value in columns.items()}


@dataclass
class TrunkCache:
    """The stored activations of one dataset, known by weights, model, data, processor and type."""

    model: PreTrainedModel
    split: TrunkSplit
    rows: Any
    folder: Path  # nothing else should be in it
    _: KW_ONLY
    name: str = "images"
    processor: Any = None
    collate: Callable[[list[Any]], dict[str, Tensor]] | None = None
    dtype: str = "float32"  # "float16" takes half the space and rounds to 3 digits
    batch_size: int = 64
    num_workers: int = 0
    progress: bool = True
    processes: Processes = ALONE  # each computes a share of the batches

    def __post_init__(self) -> None:
        self._collate = partial(_collated, self.collate or ImageCollator(self.processor))
        count, size = len(self.rows), self.batch_size
        self._batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
        if _is_random(self.rows, self._collate):
            raise DataError(
                f"Expected {self.name} that are the same at every access, found that they differ (a random transform "
                "or collator): a cached trunk would freeze one draw. Remove it, or train with cache_trunk='no'."
            )
        with seeded(0):
            self._labelled = "labels" in self._collate([self.rows[0]])
        processor = self.processor.to_dict() if hasattr(self.processor, "to_dict") else type(self.processor).__name__
        self._key = {
            "weights": trunk_fingerprint(self.model, self.split),
            "model": _model_fingerprint(self.model, self.split),
            "data": self._data_fingerprint(),
            "processor": _text_hash(processor),
            "type": self.dtype,
        }

    def find(self) -> CachedRows | None:
        """The stored activations, if there are any that fit."""
        if not self.folder.exists():
            return None
        with seeded(0):
            found = self._found()
        if found is None and self.processes.first:
            logger.warning(
                f"The cached trunk of {self.name} is damaged or of other weights, images or settings: computed anew."
            )
        return found

    def _found(self) -> CachedRows | None:
        try:
            stored = checked((self.folder / _KEY_FILE).read_text(encoding="utf-8"))
            rows = self._open()
        except (OSError, ValueError, KeyError, pa.ArrowException):
            return None
        checksums: dict[str, str] = stored.pop("files", {})
        names = sorted(file.name for file in self.folder.glob(_FILES))
        # One that does not fit is not read through. Each process looks at its share, since all must find them.
        if stored != self._key or names != sorted(checksums):
            return None
        if any(file_sha256(self.folder / name) != checksums[name] for name in self.processes.share(names)):
            return None
        return rows if len(rows) == len(self.rows) and self._agrees(rows) else None

    def _agrees(self, stored: CachedRows) -> bool:
        """Whether a few rows computed again are those stored: files may change behind a fingerprint of their names."""
        positions = sorted({0, len(self.rows) // 2, len(self.rows) - 1})
        batch = self._collate([self.rows[position] for position in positions])
        now = self._activations(batch).float()
        then = torch.stack([stored[position]["pixel_values"] for position in positions]).float()
        if self._labelled and [stored[position].get("labels") for position in positions] != batch["labels"].tolist():
            return False
        return bool((now - then).abs().max() <= _SAME * now.abs().max())

    def write(self) -> CachedRows:
        """Compute and store the activations in place of what was there; a collective."""
        # Each process computes whole batches, those that a single one would, into a file of its own: the rows and
        # their order do not depend on the number of processes. Without the key, which comes last, nothing is found.
        self.processes.broadcast_from_main(self._start_anew)
        try:
            with seeded(0):
                parts = self.processes.together(self._write_part)
            self.processes.broadcast_from_main(lambda: self._finish(dict(part for part in parts if part)))
        except BaseException:
            if self.processes.first:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        return self._open()

    def _start_anew(self) -> None:
        with self._named_errors():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()

    def _write_part(self) -> tuple[str, str] | None:
        """Write this process's share, if it has one; returns the file's name and its checksum."""
        own = self.processes.share(self._batches)
        if not own:
            return None
        width = math.prod(self.split.activation_shape)
        columns: dict[str, Any] = {"activation": datasets.List(datasets.Value(self.dtype), length=width)}
        columns |= {"labels": datasets.Value("int64")} if self._labelled else {}
        schema = datasets.Features(columns).arrow_schema
        path = self.folder / f"activations-{self.processes.index:05d}-of-{self.processes.count:05d}.arrow"
        with self._named_errors():
            with open(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                for positions, batch in zip(own, self._read(own, f"trunk of {self.name}"), strict=True):
                    flat = self._activations(batch, first=positions.start).reshape(-1).numpy()
                    arrays = [pa.FixedSizeListArray.from_arrays(pa.array(flat), width)]
                    arrays += [pa.array(batch["labels"].numpy(), pa.int64())] if self._labelled else []
                    writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
            flush(path)
            return path.name, file_sha256(path)

    def _finish(self, checksums: dict[str, str]) -> None:
        with self._named_errors():
            key = self.folder / _KEY_FILE
            key.write_text(with_checksum({**self._key, "files": checksums}), encoding="utf-8")
            for written in (key, self.folder, self.folder.parent):
                flush(written)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DiskSpaceError(
                f"Expected to write the cached trunk of {self.name} into {self.folder.parent}, found: {error}. Make "
                "room, choose another trunk_cache_dir, or train with cache_trunk='no'."
            ) from error

    def _open(self) -> CachedRows:
        # In the order of processes, by name.
        parts = [datasets.Dataset.from_file(str(file)) for file in sorted(self.folder.glob(_FILES))]
        if not parts:
            raise FileNotFoundError(f"no activations in {self.folder}")
        dataset = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
        return CachedRows(dataset, self.split.activation_shape)

    def _activations(self, batch: dict[str, Tensor], first: int = 0) -> Tensor:
        device = next(self.model.parameters()).device
        with in_eval_mode(self.model):
            values = self.split.activations(self.model, batch["pixel_values"].to(device)).cpu()
        values = values.to(DTYPES[self.dtype])
        lost = ~torch.isfinite(values.flatten(1)).all(dim=1)
        if bool(lost.any()):
            raise NonFiniteError(
                f"Expected finite {self.dtype} activations at {self.split.entry!r}, found NaN or infinity for row "
                f"{first + int(lost.nonzero()[0])} of {self.name}. Check that image, or use cache_trunk='float32'."
            )
        return values

    def _read(self, own: list[range], description: str) -> Iterator[dict[str, Tensor]]:
        loader = torch.utils.data.DataLoader(
            self.rows,
            batch_sampler=own,  # type: ignore[arg-type]
            collate_fn=self._collate,
            num_workers=self.num_workers,
            generator=torch.Generator(),  # else it would draw from the one that training draws from
        )
        yield from tqdm(loader, desc=description, disable=not (self.progress and self.processes.first))

    def _data_fingerprint(self) -> str:
        """That of `datasets`, else of all rows, whatever the number of processes; a collective."""
        rows = self.rows
        if self.collate is None and isinstance(rows, ImageRows) and isinstance(rows.dataset, datasets.Dataset):
            return _text_hash([rows.dataset._fingerprint, rows.image_column, rows.label_column])
        own = self.processes.share(self._batches)

        def of_own() -> list[str]:
            return [
                tensors_hash((name, batch[name][row]) for name in sorted(batch))
                for batch in self._read(own, f"checksum of {self.name}")
                for row in range(len(batch["pixel_values"]))
            ]

        with seeded(0):
            parts = self.processes.together(of_own)
        return _text_hash([each for part in parts for each in part])


def open_or_write(*caches: TrunkCache) -> list[CachedRows]:
    """Find the stored activations of caches in sister folders, and write those that are missing; a collective."""
    processes, parent = caches[0].processes, caches[0].folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    # Several processes wait for each other anyway; runs of one take turns.
    with WeakFileLock(parent / ".lock") if processes.count == 1 else nullcontext():
        found = processes.run_on_all_ranks(lambda: [cache.find() for cache in caches])
        # Rounding may differ between processes, and one that wrote alone would wait for the others forever.
        lacking = processes.together(lambda: [index for index, rows in enumerate(found) if rows is None])
        anew = sorted({index for indices in lacking for index in indices})
        written = {index: caches[index].write() for index in anew}
        return [written.get(index, rows) for index, rows in enumerate(found)]  # type: ignore[misc]


# ---- what identifies stored activations ----


def trunk_fingerprint(model: nn.Module, split: TrunkSplit) -> str:
    """Hash all tensors of a trunk's modules, and those that the modules around them own themselves."""
    named: list[tuple[str, Tensor]] = []
    for name in (*split.trunk, *split.around):
        module, inner = model.get_submodule(name), name in split.trunk
        tensors = dict(module.named_parameters(recurse=inner)) | dict(module.named_buffers(recurse=inner))
        named += [(f"{name}.{key}", tensors[key]) for key in sorted(tensors)]
    return tensors_hash(named)


def _model_fingerprint(model: PreTrainedModel, split: TrunkSplit) -> str:
    """Hash what else decides how a trunk computes: class, configuration, where it ends, version of transformers."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _HEAD_OR_ORIGIN}
    return _text_hash([type(model).__name__, config, repr(split), transformers.__version__])


def _text_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _collated(collate: Callable[[list[Any]], dict[str, Tensor]], rows: list[Any]) -> dict[str, Tensor]:
    """A batch of pixel values and maybe one class per row, which is all that can be stored."""
    batch = dict(collate(rows))
    labels = batch.get("labels")
    classes = labels is None or (labels.shape == (len(rows),) and not labels.is_floating_point())
    if not classes or not {"pixel_values"} <= batch.keys() <= {"pixel_values", "labels"}:
        found = ", ".join(f"{name} {tuple(values.shape)} of {values.dtype}" for name, values in batch.items())
        raise DataError(
            f"Expected batches of pixel_values and one class per row in labels for a cached trunk, found {found}. "
            "Leave out other columns and do not mix labels, or train with cache_trunk='no'."
        )
    return batch


def _is_random(rows: Any, collate: Callable[[list[Any]], dict[str, Tensor]]) -> bool:
    """Whether 4 draws of any of 4 rows differ; a random flip of every image goes unseen once in 4,096 times."""

    def draw(row: int, seed: int) -> Tensor:
        with seeded(seed):
            return collate([rows[row]])["pixel_values"]

    chosen = sorted({round(step * (len(rows) - 1) / 3) for step in range(4)})
    return not all(torch.equal(draw(row, 0), draw(row, seed)) for row in chosen for seed in range(1, 4))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators that transforms draw from, and put them back."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.random.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
