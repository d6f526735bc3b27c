"""Datasets as a user gives them, checked and made ready before anything runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from hf_immunize.data.class_names import label_outputs
from hf_immunize.data.columns import find_columns, validate_labels
from hf_immunize.data.images import ImageRows
from hf_immunize.data.pairing import PairedDataset
from hf_immunize.data.streams import StreamedRows, is_stream
from hf_immunize.errors import DataError
from hf_immunize.training.arguments import ImmunizationArguments
from hf_immunize.training.distributed import world_size
from hf_immunize.training.method import Method


logger = logging.get_logger(__name__)
# Of fewer images, the mean divergence says little.
_FEWEST_HELD_OUT = 8


def image_rows(dataset: Any, name: str, args: ImmunizationArguments, config: Any, labels: str = "needed") -> Any:
    """A dataset as rows of an image (or pixel values) and a label.

    Args:
        dataset: A `datasets.Dataset`, or a map-style dataset of dictionaries.
        name: What to call it in an error.
        args: For the names of columns.
        config: The model's, whose outputs labels are matched with, by name where both have names.
        labels: "needed", "optional", or "ignored": then they are left out.

    Returns:
        An `ImageRows`; the dataset itself where it is one.

    Raises:
        DataError: If it is empty, lacks a column, a label is out of range, or a class is none of the model's.
    """
    if isinstance(dataset, ImageRows):
        return dataset
    # A streamed dataset has no length; `find_columns` says what to do about it.
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise DataError(f"Expected at least one image in {name}, found none. Check the split and its filters.")
    wanted = args.label_column_name if labels == "needed" else None
    try:
        image, label = find_columns(dataset, args.image_column_name, wanted, labels == "needed")
    except DataError as error:
        raise DataError(f"In {name}: {error}{_labels_are_for(name) if labels == 'needed' else ''}") from error
    if labels == "ignored" or label is None:
        return ImageRows(dataset, name, image)
    try:
        outputs = label_outputs(dataset, label, config, name)
    except DataError as error:
        if labels == "needed":
            raise
        logger.warning(f"{error} Until then, the labels are not used.")
        return ImageRows(dataset, name, image)
    validate_labels(dataset, label, config.num_labels if outputs is None else len(outputs), name)
    return ImageRows(dataset, name, image, label, config.num_labels, outputs)


def _labels_are_for(name: str) -> str:
    if name == "train_dataset":
        return " Labels are needed by benign_loss='task' and 'both', not by 'distillation'."
    return " Labels are needed for eval_loss and eval_accuracy; of the harmful data, none are."


def check_best_metric(args: ImmunizationArguments, harmful_eval: Any) -> None:
    """Refuse to choose the best model by a metric that evaluations will not have.

    Args:
        args: For ``metric_for_best_model``.
        harmful_eval: Harmful data to measure on, or None.

    Raises:
        DataError: If it takes harmful data to measure, and there are none.
    """
    metric = args.metric_for_best_model or ""
    if harmful_eval is None and ("harmful_" in metric or metric.endswith("rir")):
        raise DataError(
            f"Expected harmful_eval_dataset= with metric_for_best_model={metric!r}, found none. Give harmful images "
            "to measure on, or choose a benign metric such as eval_accuracy."
        )


def side_rows(dataset: Any, name: str, args: ImmunizationArguments, config: Any, raw: bool = False) -> Any:
    """A dataset of a side that is trained on beside the benign one: stored or streamed, with labels if it has any.

    Args:
        dataset: As for `image_rows`, or a ``datasets.IterableDataset``.
        name: What to call it in an error.
        args: For the names of columns, and for whether labels are needed.
        config: The model's.
        raw: Leave the data set's own rows as they are, for a collator of the user's own.

    Returns:
        An `ImageRows` or a `StreamedRows`, or the data set itself.

    Raises:
        DataError: As `image_rows`; for a stream also where workers would have to share it.
    """
    needs_labels = name == "harmful_dataset" and Method.of(args).needs_harmful_labels
    if is_stream(dataset):
        if args.dataloader_num_workers:
            raise DataError(
                f"Expected dataloader_num_workers=0 with a streamed {name}, found {args.dataloader_num_workers}: its "
                "shards would be dealt out among them. Set it to 0 or store the data set."
            )
        label = args.label_column_name if needs_labels else None
        return StreamedRows(dataset, name, args.image_column_name, label, raw=raw)
    if raw:
        return dataset
    if not needs_labels or isinstance(dataset, ImageRows):
        return image_rows(dataset, name, args, config, labels="ignored")
    if len(dataset) == 0:
        raise DataError(f"Expected at least one image in {name}, found none. Check the split and its filters.")
    # Labels of the harmful task are its own; they need not be outputs of this model.
    try:
        image, label = find_columns(dataset, args.image_column_name, args.label_column_name, True)
    except DataError as error:
        raise DataError(
            f"In {name}: {error} Labels of the harmful images are needed by objective={args.objective!r}."
        ) from error
    return ImageRows(dataset, name, image, label)


def paired_rows(benign: Any, harmful: Any, args: ImmunizationArguments, distillation: Any = None) -> PairedDataset:
    """Benign, harmful and distillation rows as one dataset, long enough for a batch.

    Args:
        benign: Benign rows.
        harmful: Harmful rows.
        args: For the batch sizes.
        distillation: Rows of the distillation set, if there is one.

    Returns:
        The rows side by side.

    Raises:
        DataError: If a side is missing or empty, or no batch of two or more images can be made.
    """
    # ImageRows of harmful data have no labels unless the objective reads them; a user's own collator gets all items.
    benign, held_out = hold_out(benign, args)
    paired = PairedDataset(
        benign,
        harmful,
        harmful_labels=True,
        distillation=distillation,
        batch_sizes=args.batch_sizes,
        held_out=held_out,
    )
    batch, harmful_batch = (size * world_size() for size in (args.batch_sizes.benign, args.batch_sizes.harmful))
    if min(batch, harmful_batch) < 2:
        raise DataError(
            f"Expected global batches of at least 2, found {batch} benign and {harmful_batch} harmful: κ of a single "
            "image is 1. Raise per_device_train_batch_size and harmful_batch_size; gradient accumulation does not "
            "help, since κ is taken of each micro-batch."
        )
    if args.dataloader_drop_last and len(paired) < batch:
        raise DataError(
            f"Expected at least one full batch of {batch}, found {len(paired)} benign images. Lower "
            "per_device_train_batch_size or give more images."
        )
    return paired


def hold_out(benign: Any, args: ImmunizationArguments) -> tuple[Any, Any]:
    """Keep a part of the benign rows from training, to measure the budget on.

    Args:
        benign: Benign rows.
        args: For the budget, the part and the seed.

    Returns:
        The rows to train on and the others; all of them and None where no budget is measured, or too few would be.
    """
    count = int(args.budget_holdout * len(benign))
    if args.benign_budget is None or count < _FEWEST_HELD_OUT:
        return benign, None
    seed = args.data_seed if args.data_seed is not None else args.seed
    order = np.random.default_rng([seed, len(benign)]).permutation(len(benign)).tolist()
    parts = sorted(order[count:]), sorted(order[:count])
    if isinstance(benign, ImageRows):
        return benign.subset(parts[0]), benign.subset(parts[1])
    return torch.utils.data.Subset(benign, parts[0]), torch.utils.data.Subset(benign, parts[1])
