"""Data and model of ``hf-immunize train``, from the names a person typed."""

from __future__ import annotations

from typing import Any

from datasets import ClassLabel, DatasetDict
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.utils import logging

from hf_immunize.errors import DataError, HeadError
from hf_immunize.train_arguments import DataArguments
from hf_immunize.training.arguments import ImmunizationArguments
from hf_immunize.vision.columns import find_columns
from hf_immunize.vision.data import split_benign_harmful
from hf_immunize.vision.sources import load_image_dataset


logger = logging.get_logger(__name__)


def load_splits(data: DataArguments, args: ImmunizationArguments) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Benign and harmful images, each to train on and to measure on.

    Args:
        data: Where they come from.
        args: For the seed and the names of columns.

    Returns:
        (benign, benign_eval), (harmful, harmful_eval).
    """
    if data.dataset is not None:
        whole, whole_eval = _train_and_eval(data.dataset, None, data, args)
        names = _class_keys(whole, data.harmful_classes, args.label_column_name)
        # Both splits in one call, so that a class has the same number in both.
        benign_parts, harmful_parts = split_benign_harmful(
            DatasetDict({"train": whole, "test": whole_eval}), names, args.label_column_name
        )
        benign, benign_eval = benign_parts["train"], benign_parts["test"]
        harmful, harmful_eval = harmful_parts["train"], harmful_parts["test"]
    else:
        benign, benign_eval = _train_and_eval(str(data.benign), data.benign_eval, data, args)
        harmful, harmful_eval = _train_and_eval(str(data.harmful), data.harmful_eval, data, args)
    parts = [_first(part, data.max_images, args.seed) for part in (benign, benign_eval, harmful, harmful_eval)]
    return (parts[0], parts[1]), (parts[2], parts[3])


def match_labels(dataset: Any, config: Any, label_column: str | None) -> Any:
    """A data set with its classes numbered as the model numbers them, by name where both have names.

    Args:
        dataset: A `datasets.Dataset` with class names.
        config: The model's config, whose ``id2label`` names its outputs.
        label_column: The label column, where it cannot be found.

    Returns:
        The data set; unchanged where one side has no names, or where no name is shared, which is logged.

    Raises:
        DataError: If some names are the model's and some are not.
    """
    _, label = find_columns(dataset, label_column=label_column)
    names = getattr(dataset.features.get(label), "names", None)
    known = {name: int(index) for index, name in config.id2label.items()}
    if names is None or all(name == f"LABEL_{index}" for name, index in known.items()):
        return dataset
    missing = [name for name in names if name not in known]
    if len(missing) == len(names):
        logger.warning(
            f"No class of the data ({', '.join(names[:5])}, …) is named like one of the model's "
            f"({', '.join(known)[:80]}…): label i is taken for output i. Use --new_head for another task."
        )
        return dataset
    if missing:
        raise DataError(
            f"Expected all benign classes among the model's, found {missing[:5]} that are not. Rename them, drop "
            "them, or use --new_head."
        )
    if all(known[name] == index for index, name in enumerate(names)):
        return dataset
    numbers = [known[names[value]] for value in dataset.with_format(None)[label]]
    every = [name for name, _ in sorted(known.items(), key=lambda item: item[1])]
    return dataset.remove_columns(label).add_column(label, numbers, feature=ClassLabel(names=every))


def load_distillation(data: DataArguments, args: ImmunizationArguments) -> Any:
    """The images of ``--distillation``, or None; at most ``--max_images`` of them."""
    if data.distillation is None:
        return None
    return _first(load_image_dataset(data.distillation), data.max_images, args.seed)


def load_model(data: DataArguments, benign: Any, args: ImmunizationArguments) -> Any:
    """The model to immunize, with its own head or, with ``--new_head``, one for the benign classes."""
    if data.new_head:
        return _model_with_new_head(data, benign, args)
    options: dict[str, Any] = {"revision": data.model_revision, "trust_remote_code": data.trust_remote_code}
    if args.pooling is not None:  # the Trainer puts a head on it
        return AutoModel.from_pretrained(data.model, **options)
    model, info = AutoModelForImageClassification.from_pretrained(data.model, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise HeadError(
            f"Expected a trained classifier at --model {data.model}, found a checkpoint without {missing[0]}, which "
            "would be drawn at random. Train one for the benign classes with --new_head, or name what a head shall "
            "see with --pooling."
        )
    return model


def _train_and_eval(
    source: str, eval_source: str | None, data: DataArguments, args: ImmunizationArguments
) -> tuple[Any, Any]:
    train = load_image_dataset(source)
    if eval_source is not None:
        evaluated = load_image_dataset(eval_source)
        classes = [_class_names(part, args.label_column_name) for part in (train, evaluated)]
        if classes[0] and classes[1] and classes[0] != classes[1]:
            raise DataError(
                f"Expected the classes of {source} in {eval_source} too, in the same order, found {classes[1][:5]} "
                f"for {classes[0][:5]}. Add the missing folders, empty if need be."
            )
        return train, evaluated
    for split in ("validation", "test"):
        try:
            return train, load_image_dataset(source, split)
        except DataError:
            continue
    # By image. Not stratified: many data sets have classes with a single image.
    parts = train.train_test_split(data.eval_fraction, seed=args.seed)
    logger.warning(f"{source} has no validation or test split: {data.eval_fraction:.0%} held out (seed {args.seed}).")
    return parts["train"], parts["test"]


def _class_names(dataset: Any, label_column: str | None) -> list[str]:
    _, label = find_columns(dataset, label_column=label_column, need_label=False)
    return getattr(dataset.features.get(label), "names", None) or []


def _class_keys(dataset: Any, asked: list[Any], label_column: str | None) -> list[str | int]:
    """Classes as typed: by name where there is such a name, else by number."""
    names = _class_names(dataset, label_column)
    return [key if key in names or not key.isdigit() else int(key) for key in map(str, asked)]


def _first(dataset: Any, limit: int | None, seed: int) -> Any:
    if limit is None or len(dataset) <= limit:
        return dataset
    return dataset.shuffle(seed=seed).select(range(limit))


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
    kind = AutoModelForImageClassification if args.pooling is None else AutoModel
    return kind.from_pretrained(
        data.model,
        config=config,
        revision=data.model_revision,
        trust_remote_code=data.trust_remote_code,
        ignore_mismatched_sizes=True,
    )
