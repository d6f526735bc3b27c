"""The stored activations of several datasets beside one another: found, or written once the disk is known to do."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
import transformers
from datasets.fingerprint import Hasher
from filelock import Timeout
from huggingface_hub.utils import WeakFileLock
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging

from hf_immunize.data.images import ImageCollator, ImageRows
from hf_immunize.data.pairs import ONE_EACH, BatchSizes, PairedDataset, PairedSampler
from hf_immunize.errors import ArgumentError, DataError, DiskSpaceError, NonFiniteError
from hf_immunize.features.ranks import ALONE, Processes
from hf_immunize.files import UNFINISHED, checked, file_sha256, flush, with_checksum
from hf_immunize.tensor_hash import tensor_bytes, tensors_hash


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_immunize.features.trunk import TrunkSplit


logger = logging.get_logger(__name__)


# What a configuration says about the head or about where the model came from.
_NOT_OF_THE_TRUNK = ("id2label", "label2id", "num_labels", "architectures", "problem_type", "transformers_version")


def trunk_fingerprint(model: nn.Module, split: TrunkSplit) -> str:
    """Hash the weights and buffers of a frozen trunk.

    Args:
        model: The model that was split.
        split: Where its trunk ends.

    Returns:
        The hash of all tensors of the trunk's modules and of those that the modules around own themselves.

    Examples:
        >>> from transformers import ResNetConfig, ResNetForImageClassification
        >>> from hf_immunize.vision.scope import select_trainable
        >>> from hf_immunize.features.trunk import split_trunk
        >>> config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3)
        >>> model = ResNetForImageClassification(config)
        >>> split = split_trunk(model, select_trainable(model, "last_stage"), (3, 32, 32))
        >>> before = trunk_fingerprint(model, split)
        >>> model.classifier[1].weight.data.zero_().sum().item(), trunk_fingerprint(model, split) == before
        (0.0, True)
        >>> model.resnet.embedder.embedder.convolution.weight.data.zero_().sum().item()
        0.0
        >>> trunk_fingerprint(model, split) == before
        False
    """
    named: list[tuple[str, Tensor]] = []
    for name in (*split.trunk, *split.around):
        module, inner = model.get_submodule(name), name in split.trunk
        tensors = [*module.named_parameters(recurse=inner), *module.named_buffers(recurse=inner)]
        named += [(f"{name}.{key}", tensor) for key, tensor in sorted(tensors, key=lambda pair: pair[0])]
    return tensors_hash(named)


def model_fingerprint(model: PreTrainedModel, split: TrunkSplit) -> str:
    """Hash what decides how a trunk computes: class, configuration, where it ends, version of transformers.

    Args:
        model: The model that was split.
        split: Where its trunk ends.

    Returns:
        The SHA-256.
    """
    config = model.config.to_dict()
    kept = {key: value for key, value in config.items() if key not in _NOT_OF_THE_TRUNK and key != "_name_or_path"}
    return text_fingerprint([type(model).__name__, kept, repr(split), transformers.__version__])


def processor_fingerprint(processor: Any) -> str:
    """Hash the settings of an image processor.

    Args:
        processor: The processor, or None.

    Returns:
        The SHA-256 of its ``to_dict()`` in JSON.
    """
    return text_fingerprint(processor.to_dict() if hasattr(processor, "to_dict") else type(processor).__name__)


def stored_fingerprint(rows: Any) -> str | None:
    """The fingerprint that the library `datasets` keeps of a dataset and of what was done to it.

    Args:
        rows: Rows, such as `ImageRows`.

    Returns:
        The fingerprint; None where the data are no ``datasets.Dataset``, and have to be read to be told apart.
    """
    if not (isinstance(rows, ImageRows) and isinstance(rows.dataset, datasets.Dataset)):
        return None
    return text_fingerprint([rows.dataset._fingerprint, rows.image_column, rows.label_column])


def row_checksums(batch: dict[str, Tensor]) -> list[bytes]:
    """Hash the rows of a batch one by one, so that the hashes of a dataset do not depend on how it was cut.

    Args:
        batch: Tensors with one row for each of the batch.

    Returns:
        16 bytes a row.

    Examples:
        >>> import torch
        >>> rows = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
        >>> first, second = row_checksums({"pixel_values": rows})
        >>> first != second, [second] == row_checksums({"pixel_values": rows[1:]})
        (True, True)
    """
    names = sorted(batch)
    head = repr([(name, str(batch[name].dtype), tuple(batch[name].shape[1:])) for name in names]).encode()
    checksums = []
    for row in range(len(batch[names[0]])):
        digest = hashlib.blake2b(head, digest_size=16)
        for name in names:
            digest.update(tensor_bytes(batch[name][row]))
        checksums.append(digest.digest())
    return checksums


def text_fingerprint(value: Any) -> str:
    """Hash what JSON can write.

    Args:
        value: Nested lists and dictionaries of plain values; others are written as text.

    Returns:
        The SHA-256.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class RowViews(torch.utils.data.Dataset[tuple[int, Any]]):
    """All views of all rows, the views of a row side by side.

    Each item is drawn under a seed of its own, which the global random generators do not see.

    Args:
        rows: A map-style dataset of rows with ``"image"`` or ``"pixel_values"``.
        views: The number of views of each row.
        augment: Takes an image and a `torch.Generator`, and returns another image; the first view is without.
        seed: The seed of all draws.

    Examples:
        >>> rows = RowViews([{"pixel_values": torch.zeros(1)}], 2, lambda image, generator: image + 1)
        >>> rows[0][1], rows[1][1]
        ({'pixel_values': tensor([0.])}, {'pixel_values': tensor([1.])})
    """

    def __init__(
        self,
        rows: Any,
        views: int = 1,
        augment: Callable[[Any, torch.Generator], Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.rows = rows
        self.views = views
        self.augment = augment
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows) * self.views

    def __getitem__(self, position: int) -> tuple[int, Any]:
        """Draw a view.

        Args:
            position: Row times the number of views, plus the view.

        Returns:
            The seed it was drawn with, and the row.
        """
        row, view = divmod(position, self.views)
        seed = int(np.random.default_rng([self.seed, row, view]).integers(2**32))
        with _seeded(seed):
            item = self.rows[row]
            if self.augment is not None and view > 0:
                column = "image" if "image" in item else "pixel_values"
                generator = torch.Generator().manual_seed(seed)
                item = item | {column: self.augment(item[column], generator)}
        return seed, item


class ViewCollator:
    """Collate views with a collator that may itself be random.

    Args:
        inner: A collator of rows.

    Raises:
        DataError: If it gives more than ``pixel_values`` and one label a row.
    """

    def __init__(self, inner: Callable[[list[Any]], dict[str, Tensor]]) -> None:
        self.inner = inner

    def __call__(self, views: list[tuple[int, Any]]) -> dict[str, Tensor]:
        """Collate N views.

        Args:
            views: Items of `RowViews`.

        Returns:
            ``"pixel_values"``, ``(N, C, H, W)``, and where the rows have labels, ``"labels"``, ``(N,)``.
        """
        with _seeded(views[0][0]):
            batch = dict(self.inner([row for _, row in views]))
        labels = batch.get("labels")
        if not {"pixel_values"} <= batch.keys() <= {"pixel_values", "labels"}:
            raise DataError(
                f"Expected batches of pixel_values and labels for a cached trunk, found {', '.join(sorted(batch))}. "
                "Leave out the other columns, or train without (cache_trunk='no')."
            )
        if labels is not None and (labels.shape != (len(views),) or labels.is_floating_point()):
            raise DataError(
                f"Expected one class a row for a cached trunk, found labels of the shape {tuple(labels.shape)} and "
                f"type {labels.dtype}. Mix labels without a cached trunk (cache_trunk='no')."
            )
        return batch


def differs_between_draws(views: RowViews, collate: ViewCollator, rows: int = 4, draws: int = 4) -> bool:
    """Tell whether rows are random, from a few draws of a few of them.

    A flip of every other image goes unseen with a probability of 1 in 4,096.

    Args:
        views: Views, whose `augment` is left out of this.
        collate: Their collator.
        rows: How many rows to draw.
        draws: How many times to draw each.

    Returns:
        Whether any two draws of a row differ.
    """
    for row in sorted({round(step * (len(views.rows) - 1) / max(rows - 1, 1)) for step in range(rows)}):
        first = None
        for draw in range(draws):
            one = collate([RowViews(views.rows, seed=views.seed + draw)[row]])["pixel_values"]
            first = one if first is None else first
            if one.shape != first.shape or not torch.equal(one, first):
                return True
    return False


def has_random_rows(rows: Any, collate: Any) -> bool:
    """Tell whether a data set's rows differ from access to access, as those of a random transform do.

    Args:
        rows: A map-style dataset.
        collate: Its collator.

    Returns:
        Whether a few draws of a few rows differ.
    """
    return differs_between_draws(RowViews(rows, 2), ViewCollator(collate))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the generators that transforms draw from, and put them back."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class CachedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Stored activations in place of images; memory-mapped, so that little of them is in memory.

    An index is a row, of which the first view is given, or a pair of a row and a view.

    Args:
        dataset: One row for each pair of a row and a view (views of a row side by side), with a column
            ``"activation"`` and, where there are labels, one ``"labels"``.
        shape: Shape of an activation.
        views: The number of views of each row.

    Examples:
        >>> features = datasets.Features({"activation": datasets.List(datasets.Value("float32"), length=2)})
        >>> dataset = datasets.Dataset.from_dict({"activation": [[0, 1], [2, 3], [4, 5], [6, 7]]}, features=features)
        >>> rows = CachedRows(dataset, shape=(2,), views=2)
        >>> len(rows), rows[1]["pixel_values"], rows[1, 1]["pixel_values"]
        (2, tensor([4., 5.]), tensor([6., 7.]))
    """

    def __init__(self, dataset: datasets.Dataset, shape: tuple[int, ...], views: int = 1) -> None:
        self.dataset = dataset
        self.shape = shape
        self.views = views
        self._blocks: list[np.ndarray] | None = None
        self._starts: list[int] = []
        self._labels = dataset.data.column("labels").to_numpy() if "labels" in dataset.column_names else None

    def __len__(self) -> int:
        return len(self.dataset) // self.views

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        row, view = index if isinstance(index, tuple) else (int(index), 0)
        if not (0 <= row < len(self) and 0 <= view < self.views):
            raise IndexError(f"row {row}, view {view} of {len(self)} rows with {self.views} views")
        position = row * self.views + view
        blocks = self._memory_mapped()
        block = bisect_right(self._starts, position) - 1
        values = blocks[block][position - self._starts[block]]
        item: dict[str, Any] = {"pixel_values": torch.from_numpy(values.copy()).view(self.shape)}
        if self._labels is not None:
            item["labels"] = int(self._labels[position])
        return item

    def __getstate__(self) -> dict[str, Any]:
        # The dataset travels to another process as the name of its file; the views of the memory map would as numbers.
        return self.__dict__ | {"_blocks": None, "_starts": []}

    def _memory_mapped(self) -> list[np.ndarray]:
        if self._blocks is None:
            # Arrow's own memory; the formats of `datasets` would make a list of each row.
            chunks = self.dataset.data.column("activation").chunks
            width = int(np.prod(self.shape))
            self._blocks = [c.flatten().to_numpy(zero_copy_only=True).reshape(-1, width) for c in chunks if len(c)]
            self._starts = np.cumsum([0, *(len(block) for block in self._blocks)])[:-1].tolist()
        return self._blocks


class CachedPairs(PairedDataset):
    """Stored activations of all sides, drawn in the order of the images they stand for.

    Args:
        benign: Stored benign rows.
        harmful: Stored harmful rows.
        distillation: Stored rows of the distillation set, if there is one.
        batch_sizes: Rows of each side in a batch.
        held_out: Stored held-out benign rows, if there are any.

    Examples:
        >>> features = datasets.Features({"activation": datasets.List(datasets.Value("float32"), length=1)})
        >>> dataset = datasets.Dataset.from_dict({"activation": [[0], [1], [2], [3]]}, features=features)
        >>> pairs = CachedPairs(CachedRows(dataset, (1,), views=2), CachedRows(dataset, (1,), views=2))
        >>> list(pairs.make_sampler(seed=0, shuffle=False))
        [((0, 1), ((0, 1),), (), ()), ((1, 1), ((1, 1),), (), ())]
    """

    def __init__(
        self,
        benign: CachedRows,
        harmful: CachedRows,
        distillation: CachedRows | None = None,
        batch_sizes: BatchSizes = ONE_EACH,
        held_out: CachedRows | None = None,
    ) -> None:
        super().__init__(benign, harmful, True, distillation, batch_sizes, held_out)

    def make_sampler(self, seed: int, shuffle: bool = True) -> PairedSampler:
        """As `PairedDataset.make_sampler`, with a view for each row.

        Args:
            seed: The seed of all orders and of the views.
            shuffle: If False, all sets come in their stored order.

        Returns:
            The sampler; without several views, that of the images.
        """
        sampler = super().make_sampler(seed, shuffle)
        sides = (self.benign, self.harmful, self.distillation, self.held_out)
        sampler.views = tuple(1 if rows is None else rows.views for rows in sides)
        return sampler


DTYPES = {"float16": torch.float16, "float32": torch.float32}
# Of activations computed again in a batch of another size, on whatever device; those of another image differ by more.
_SAME = 3e-2
_KEY_FILE = "trunk.json"


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


def open_or_write(*caches: TrunkCache) -> list[CachedRows]:
    """Find stored activations, and write those that are missing, once the disk is known to hold them all.

    The caches' processes do this together. Other runs that share the folder wait until it is done.

    Args:
        *caches: Caches in sister folders, of the same processes.

    Returns:
        The rows of each.

    Raises:
        DiskSpaceError: If the disk does not hold them, before anything is written or removed.
        NonFiniteError, ProcessError: See `TrunkCache.write`.
    """
    processes, parent = caches[0].processes, caches[0].folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    with _locked(parent / ".lock", processes):
        processes.from_first(lambda: _remove_leftovers(parent))
        found = processes.everywhere(lambda: [cache.find() for cache in caches])
        # Rounding may differ between processes, and one that wrote alone would wait for the others forever.
        lacking = processes.together(lambda: [index for index, rows in enumerate(found) if rows is None])
        anew = {index for indices in lacking for index in indices}
        if anew:
            processes.from_first(lambda: _check_space(parent, [caches[index] for index in sorted(anew)]))
        return [
            cache.write() if rows is None or index in anew else rows
            for index, (cache, rows) in enumerate(zip(caches, found, strict=True))
        ]


@contextmanager
def _locked(path: Path, processes: Processes) -> Iterator[None]:
    """Hold a lock on behalf of all processes.

    Another run may hold it for as long as it writes, which no collective would wait for: so each process waits at the
    file first, and the first one takes it only if it is still free.
    """
    with ExitStack() as stack:

        def take() -> bool:
            try:
                stack.enter_context(WeakFileLock(path, timeout=None if processes.count == 1 else 1))
            except Timeout:
                return False
            return True

        while True:
            if processes.count > 1:
                with WeakFileLock(path):
                    pass
                processes.together(lambda: None)  # else the last to pass would wait for the first to let go
            if processes.from_first(take):
                break
        yield


def _remove_leftovers(parent: Path) -> None:
    for leftover in parent.glob(f"{UNFINISHED}*"):  # of a run that was killed, or it would hold the lock
        shutil.rmtree(leftover, ignore_errors=True)


def _check_space(parent: Path, missing: list[TrunkCache]) -> None:
    needed = sum(cache.nbytes for cache in missing)
    replaced = sum(file.stat().st_size for cache in missing for file in cache.folder.glob("*"))
    free = shutil.disk_usage(parent).free + replaced
    what = ", ".join(f"{len(cache):,} {cache.name}" for cache in missing)
    logger.info(f"Caching the frozen trunk of {what}: about {readable_size(needed)} of {readable_size(free)} free.")
    if needed > free:
        raise DiskSpaceError(
            f"Expected {readable_size(needed)} for the cached trunk ({what}), found {readable_size(free)} free in "
            f"{parent}. Make room, choose another trunk_cache_dir, use cache_trunk='float16' or fewer "
            "trunk_cache_views, or train without (cache_trunk='no')."
        )
