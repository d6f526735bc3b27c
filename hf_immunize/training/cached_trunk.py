"""Training on the stored activations of the frozen trunk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.utils import logging

from hf_immunize.data.images import ImageCollator
from hf_immunize.data.pairs import PairedDataset
from hf_immunize.data.streams import StreamedRows
from hf_immunize.errors import ArgumentError
from hf_immunize.features.cache import DTYPES, CachedPairs, TrunkCache, has_random_rows, open_or_write
from hf_immunize.features.ranks import ALONE, launched
from hf_immunize.features.trunk import TrunkSplit, split_trunk
from hf_immunize.training.distributed import world_size


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_immunize.training.arguments import ImmunizationArguments


# From here on, storing activations is soon repaid.
_SEVERAL_EPOCHS = 3
logger = logging.get_logger(__name__)


def check_trunk_arguments(args: ImmunizationArguments) -> None:
    """Check the options of the cached trunk, alone and with others; YAML's ``no``, which is False, becomes "no".

    Args:
        args: The arguments.

    Raises:
        ArgumentError: If one has an impossible value, or another option stands against it.
    """
    if args.cache_trunk is False:
        args.cache_trunk = "no"
    if args.cache_trunk not in ("no", *DTYPES):
        raise ArgumentError(f"Expected cache_trunk= out of no, {', '.join(DTYPES)}, found {args.cache_trunk!r}.")
    if args.trunk_cache_views < 1:
        raise ArgumentError(f"Expected trunk_cache_views= of at least 1, found {args.trunk_cache_views}.")
    if args.cache_trunk == "no":
        return
    against = {"torch_compile": args.torch_compile, "fsdp": args.fsdp, "deepspeed": args.deepspeed}
    if found := [name for name, value in against.items() if value]:
        raise ArgumentError(
            f"Expected cache_trunk='{args.cache_trunk}' without {found[0]}, found both: the trunk's modules are "
            f"replaced while the rest runs, which {found[0]} does not see. Leave out one of them."
        )


def cached_pairs(
    model: PreTrainedModel,
    pairs: PairedDataset,
    trainable_names: list[str],
    still: list[nn.Module],
    args: ImmunizationArguments,
    *,
    processor: Any = None,
    collate: Callable[[list[Any]], dict[str, Any]] | None = None,
) -> tuple[TrunkSplit, CachedPairs]:
    """Replace the images of all sides by the activations at the entry of what moves.

    To be called on all processes of a run: each computes a share, and all of them use all.

    Args:
        model: The model, with the weights that training starts or goes on from.
        pairs: Images of all sides.
        trainable_names: The names of the parameters that move.
        still: The modules kept in eval mode.
        args: For type, folder and views of the cache.
        processor: The image processor.
        collate: A user's own collator, in place of the processor's.

    Returns:
        Where the trunk ends, and the pairs of stored activations; give these to a plain `ImageCollator`, and run the
        model within `replayed`.

    Raises:
        TrunkError: If the model has no trunk that can be stored.
        DataError, ArgumentError, DiskSpaceError, NonFiniteError, ProcessError: See `TrunkCache` and `open_or_write`.
    """
    sides = {"benign": pairs.benign, "harmful": pairs.harmful}
    sides |= {side: rows for side in ("distillation", "held_out") if (rows := getattr(pairs, side)) is not None}
    for side, rows in sides.items():
        if isinstance(rows, StreamedRows):
            raise ArgumentError(
                f"Expected cache_trunk='no' with streamed {side} images, found {args.cache_trunk!r}: what is stored "
                "must be known as a whole. Store the data set, or train without the cache."
            )
    collator = collate or ImageCollator(processor)
    sample = collator([pairs.benign[0]])["pixel_values"]
    # A side without randomness has one view; asking for several where no side has any is refused below.
    random = {side: args.trunk_cache_views > 1 and has_random_rows(rows, collator) for side, rows in sides.items()}
    views = {side: args.trunk_cache_views if random[side] or not any(random.values()) else 1 for side in sides}
    split = split_trunk(model, trainable_names, tuple(sample.shape[1:]), still=still, head_module=args.head_module)
    folder = Path(args.trunk_cache_dir) if args.trunk_cache_dir else Path(args.output_dir) / "_trunk"
    everyone = launched()
    # Machines with disks of their own each need all of it: there, processes take turns, and the first of each writes.
    processes = everyone if everyone.share_folder(folder) else ALONE
    caches = [
        TrunkCache(
            model,
            split,
            rows,
            folder / side,
            name=f"{side} images",
            processor=processor,
            collate=collate,
            dtype=args.cache_trunk,
            views=views[side],
            seed=args.data_seed if args.data_seed is not None else args.seed,
            batch_size=2 * args.train_batch_size,  # as many as a step, of both sides, has room for
            num_workers=args.dataloader_num_workers,
            progress=not args.disable_tqdm and everyone.first,
            processes=processes,
        )
        for side, rows in sides.items()
    ]
    stored = dict(zip(sides, open_or_write(*caches), strict=True))
    logger.info(f"Training runs from {split.entry} on, from stored activations of the shape {split.activation_shape}.")
    return split, CachedPairs(**stored, batch_sizes=pairs.batch_sizes)


def replayed(split: TrunkSplit | None, model: nn.Module) -> AbstractContextManager[None]:
    """Within, the model runs from stored activations, if its trunk is cached.

    Args:
        split: Where the trunk ends; None where it is not cached.
        model: The model, without its wrapper.

    Returns:
        A context manager.
    """
    return nullcontext() if split is None else split.replayed(model)


def suggest_cached_trunk(model: nn.Module, trainable_names: list[str], rows: int, args: ImmunizationArguments) -> None:
    """Say once in the log that a cached trunk would pay: something frozen comes first, and there are several epochs.

    Args:
        model: The model.
        trainable_names: The names of the parameters that move.
        rows: The number of benign rows.
        args: The arguments.
    """
    first = next(name for name, _ in model.named_parameters())
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        epochs = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * world_size() / rows
    impossible = args.torch_compile or args.fsdp or args.deepspeed
    if first in trainable_names or epochs < _SEVERAL_EPOCHS or impossible or not args.should_log:
        return
    logger.warning_once(
        f"What runs before {trainable_names[0]!r} is frozen, and is computed anew in each of {epochs:.0f} epochs. "
        "With cache_trunk='float32' (or 'float16') it is computed once and kept on disk; without a random "
        "transform of the images, the result is the same."
    )
