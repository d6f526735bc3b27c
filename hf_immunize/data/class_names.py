"""Which of a model's outputs stands for which class of a data set, by name: one answer for whoever counts hits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from transformers.utils import logging

from hf_immunize.data.columns import is_transformed, listed, read_labels
from hf_immunize.errors import DataError


logger = logging.get_logger(__name__)


def outputs_by_name(names: Sequence[str], config: Any) -> list[int] | None:
    """For each class, the output that bears its name.

    Args:
        names: Names of the classes, in the order of their labels.
        config: The model's config; of its names, only ``id2label`` is read.

    Returns:
        Output numbers, −1 for a class that is none of the model's; None where the model's outputs have no names, or
        none that the data know: then label i can only be output i.

    Examples:
        >>> from transformers import ViTConfig
        >>> outputs_by_name(["dog", "eel", "cat"], ViTConfig(id2label={0: "cat", 1: "dog"}))
        [1, -1, 0]
        >>> outputs_by_name(["dog", "cat"], ViTConfig(num_labels=2)) is None
        True
    """
    held = _model_names(config)
    count = Counter(held.values())
    # A name that two outputs bear tells nothing, unless the classes stand in the model's own order.
    alone = {name: index for index, name in held.items() if count[name] == 1}
    found = [index if held.get(index) == name else alone.get(name, -1) for index, name in enumerate(names)]
    return None if all(index < 0 for index in found) else found


def label_outputs(dataset: Any, label_column: str, config: Any, name: str) -> list[int] | None:
    """For each label of a data set, the output that stands for its class.

    Args:
        dataset: The data set; names are known of a `datasets.Dataset` alone.
        label_column: Its label column.
        config: The model's config.
        name: What to call the data in an error.

    Returns:
        Output numbers; None where label i is output i.

    Raises:
        DataError: If some classes that occur are the model's and some are not, or none is and there are fewer classes
            than outputs, so that they cannot be the model's in its order.
    """
    features = getattr(dataset, "features", None) or {}
    names = getattr(features.get(label_column), "names", None)
    if not names:
        if is_transformed(dataset):
            _warn_of_order([feature.names for feature in features.values() if hasattr(feature, "names")], config, name)
        return None
    outputs = outputs_by_name(names, config)
    held = list(_model_names(config).values())
    if outputs is None:
        if len(names) < config.num_labels:
            raise DataError(
                f"Expected the classes of {name} among the model's {config.num_labels}"
                f"{f' ({listed(held, 3)})' if held else ', which have no names'}, found {len(names)} others "
                f"({listed(names, 3)}). Name the model's outputs in model.config.id2label, rename the classes, or "
                f"load the model with a new head of num_labels={len(names)} (--new_head True on the command line)."
            )
        if held:
            logger.warning_once(
                f"No class of {name} ({listed(names, 3)}) is named like one of the model's ({listed(held, 3)}): label "
                "i is taken for output i. Rename the classes, or give the model a new head for another task."
            )
        return None
    unknown = {label for label, output in enumerate(outputs) if output < 0}
    if unknown and not is_transformed(dataset):
        unknown &= set(read_labels(dataset, label_column))
    if unknown:
        raise DataError(
            f"Expected all classes of {name} among the model's, found {listed((names[i] for i in sorted(unknown)), 5)}"
            " that are not. Rename them, drop them, or give the model a new head (--new_head True on the command "
            "line)."
        )
    return None if outputs == list(range(len(outputs))) else outputs


def _warn_of_order(stored: list[list[str]], config: Any, name: str) -> None:
    """A transform makes the labels, and nobody knows whether it numbers classes as the model does."""
    outputs = outputs_by_name(stored[0], config) if len(stored) == 1 else None
    if outputs is not None and outputs != list(range(len(outputs))):
        logger.warning_once(
            f"The classes of {name} stand in another order than the model's, and a transform makes the labels: they "
            "are taken for outputs as they come. Let the transform number them as model.config.id2label does."
        )


def _model_names(config: Any) -> dict[int, str]:
    """Names of the outputs; empty where they are those that transformers gives for want of others."""
    held = {int(index): str(name) for index, name in (getattr(config, "id2label", None) or {}).items()}
    return {} if all(name == f"LABEL_{index}" for index, name in held.items()) else held
