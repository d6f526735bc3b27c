"""Training on the stored activations of the frozen trunk: whether it is possible, advisable, and how it is set up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from hf_immunize.data.images import ImageCollator
from hf_immunize.data.pairs import PairedDataset
from hf_immunize.data.streams import StreamedRows
from hf_immunize.errors import ArgumentError
from hf_immunize.features.cache import DTYPES, TrunkCache, open_or_write
from hf_immunize.features.ranks import ALONE, launched
from hf_immunize.features.trunk import split_trunk
from hf_immunize.training.distributed import world_size


# From here on, storing activations is soon repaid.
_SEVERAL_EPOCHS = 3
logger = logging.get_logger(__name__)


def check_trunk_arguments(args: Any) -> None:
    """Check the options of the cached trunk, alone and with others; YAML's ``no``, which is False, becomes "no"."""
    if args.cache_trunk is False:
        args.cache_trunk = "no"
    if args.cache_trunk not in ("no", *DTYPES):
        raise ArgumentError(f"Expected cache_trunk= out of no, {', '.join(DTYPES)}, found {args.cache_trunk!r}.")
    if args.cache_trunk != "no" and (found := _obstacles(args)):
        raise ArgumentError(
            f"Expected cache_trunk='{args.cache_trunk}' without {found[0]}, found both: the trunk's modules are "
            f"replaced while the rest runs, which {found[0]} does not see. Leave out one of them."
        )


def _obstacles(args: Any) -> list[str]:
    return [name for name in ("torch_compile", "fsdp", "deepspeed") if getattr(args, name)]


def cached_pairs(
    model: nn.Module,
    pairs: PairedDataset,
    trainable_names: list[str],
    eval_modules: list[nn.Module],
    args: Any,
    *,
    processor: Any = None,
    collate: Callable[[list[Any]], dict[str, Any]] | None = None,
) -> tuple[Callable[[nn.Module], AbstractContextManager[None]], PairedDataset]:
    """Replace the images of all sides by activations; returns the context that runs a model from them, and the pairs.

    Each process computes a share, and a plain `ImageCollator` takes the pairs.
    """
    sides = {"benign": pairs.benign, "harmful": pairs.harmful}
    sides |= {side: rows for side in ("distillation", "held_out") if (rows := getattr(pairs, side)) is not None}
    for side, rows in sides.items():
        if isinstance(rows, StreamedRows):
            raise ArgumentError(
                f"Expected cache_trunk='no' with streamed {side} images, found {args.cache_trunk!r}: what is stored "
                "must be known as a whole. Store the data set, or train without the cache."
            )
    sample = (collate or ImageCollator(processor))([pairs.benign[0]])["pixel_values"]
    shape = tuple(sample.shape[1:])
    split = split_trunk(model, trainable_names, shape, eval_modules=eval_modules, head_module=args.head_module)
    folder = Path(args.trunk_cache_dir) if args.trunk_cache_dir else Path(args.output_dir) / "_trunk"
    everyone = launched()
    options: dict[str, Any] = {
        "processor": processor,
        "collate": collate,
        "dtype": args.cache_trunk,
        "batch_size": 2 * args.train_batch_size,  # as many as a step, of both sides, has room for
        "num_workers": args.dataloader_num_workers,
        "progress": not args.disable_tqdm and everyone.first,
        # Machines with disks of their own each need all of it: there, processes take turns.
        "processes": everyone if everyone.share_folder(folder) else ALONE,
    }
    caches = [
        TrunkCache(model, split, rows, folder / side, name=f"{side} images", **options) for side, rows in sides.items()
    ]
    stored = dict(zip(sides, open_or_write(*caches), strict=True))
    logger.info(f"Training runs from {split.entry} on, from stored activations of the shape {split.activation_shape}.")
    return split.replayed, PairedDataset(**stored, harmful_labels=True, batch_sizes=pairs.batch_sizes)


def suggest_cached_trunk(model: nn.Module, trainable_names: list[str], rows: int, args: Any) -> None:
    """Say once in the log that a cached trunk would pay: something frozen comes first, for several epochs."""
    first = next(name for name, _ in model.named_parameters())
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        epochs = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * world_size() / rows
    if first in trainable_names or epochs < _SEVERAL_EPOCHS or _obstacles(args) or not args.should_log:
        return
    logger.warning_once(
        f"What runs before {trainable_names[0]!r} is frozen, and is computed anew in each of {epochs:.0f} epochs. "
        "With cache_trunk='float32' (or 'float16') it is computed once and kept on disk; without a random "
        "transform of the images, the result is the same."
    )
