"""Data and model of ``hf-immunize train``, from the names a person typed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import AutoConfig
from transformers.utils import logging

from hf_immunize.cli.train_arguments import DataArguments
from hf_immunize.data.columns import find_columns
from hf_immunize.data.sources import load_image_dataset
from hf_immunize.data.splits import HeldOut, Parts, choose, divide, divide_classes
from hf_immunize.errors import DataError
from hf_immunize.training.arguments import ImmunizationArguments
from hf_immunize.vision.loading import load_backbone, load_classifier


logger = logging.get_logger(__name__)


def load_splits(data: DataArguments, args: ImmunizationArguments) -> tuple[Parts, Parts]:
    """Benign and harmful images, each to train on and to measure on.

    Args:
        data: Where they come from.
        args: For the seed and the names of columns.

    Returns:
        The benign and the harmful ones.
    """
    draw = HeldOut(data.eval_fraction, args.seed)
    if data.dataset is not None:
        whole = divide(data.dataset, draw)
        benign, harmful = divide_classes(whole, data.harmful_classes, args.label_column_name)
        sources = {data.dataset: whole}
    else:
        benign = divide(data.benign, draw, test=data.benign_eval, name="benign images")
        harmful = divide(data.harmful, draw, test=data.harmful_eval, name="harmful images")
        sources = {str(data.benign): benign, str(data.harmful): harmful}
    for source, parts in sources.items():
        _check_classes(source, parts, args.label_column_name)
        if parts.held_out is not None:
            logger.warning(
                f"{source} has no validation or test split: {draw.fraction:.0%} held out (seed {draw.seed})."
            )
    return _limited(benign, data.max_images, args.seed), _limited(harmful, data.max_images, args.seed)


def load_distillation(data: DataArguments, args: ImmunizationArguments) -> Any:
    """The images of ``--distillation``, or None; at most ``--max_images`` of them."""
    if data.distillation is None:
        return None
    return _first(load_image_dataset(data.distillation), data.max_images, args.seed)


def load_model(data: DataArguments, benign: Any, args: ImmunizationArguments) -> Any:
    """The model to immunize, with its own head or, with ``--new_head``, one for the benign classes."""
    if data.new_head:
        return _model_with_new_head(data, benign, args)
    return _load(data, args)


def _check_classes(source: str, parts: Parts, label_column: str | None) -> None:
    """Labels of both parts must mean the same classes."""
    train, test = (_class_names(part, label_column) for part in (parts.train, parts.test))
    if train and test and train != test:
        raise DataError(
            f"Expected the classes of {source} in the images to measure on too, in the same order, found {test[:5]} "
            f"for {train[:5]}. Add the missing folders, empty if need be."
        )


def _class_names(dataset: Any, label_column: str | None) -> list[str]:
    _, label = find_columns(dataset, label_column=label_column, need_label=False)
    return getattr(dataset.features.get(label), "names", None) or []


def _limited(parts: Parts, limit: int | None, seed: int) -> Parts:
    return replace(parts, train=_first(parts.train, limit, seed), test=_first(parts.test, limit, seed))


def _first(dataset: Any, limit: int | None, seed: int) -> Any:
    return dataset if limit is None else dataset.select(choose(len(dataset), limit, seed))


def _model_with_new_head(data: DataArguments, benign: Any, args: ImmunizationArguments) -> Any:
    _, label = find_columns(benign, args.image_column_name, args.label_column_name)
    names = getattr(benign.features[label], "names", None)
    if names is None:
        raise DataError(
            f"Expected class names in column {label!r} for --new_head, found plain values. Encode them with "
            "dataset.class_encode_column."
        )
    if args.benign_loss != "task" and args.pooling is None:  # of that head, the Trainer says it
        logger.warning(
            f"A new head has learned nothing yet that --benign_loss {args.benign_loss} could keep: benign accuracy "
            "stays near chance. Train the classifier first, or set --benign_loss task --benign_budget none."
        )
    config = AutoConfig.from_pretrained(
        data.model,
        revision=data.model_revision,
        trust_remote_code=data.trust_remote_code,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return _load(data, args, config=config)


def _load(data: DataArguments, args: ImmunizationArguments, **options: Any) -> Any:
    options |= {"revision": data.model_revision, "trust_remote_code": data.trust_remote_code}
    if args.pooling is None:
        return load_classifier(data.model, new_head=data.new_head, **options)
    return load_backbone(data.model, args.pooling, **options)  # the Trainer puts a head on it
