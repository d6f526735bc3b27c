"""Image classifiers loaded whole: plain checkpoints, backbones with a head beside them, adapters on a base.

Transformers draws a weight that a checkpoint lacks at random, leaves one aside that it does not know, and goes on.
Here either is a named error, unless a new head was asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from hf_immunize.errors import WeightsError
from hf_immunize.vision.bare import (
    HEAD_CONFIG_FILE,
    HEAD_FILE,
    HUB_OPTIONS,
    LinearHeadForImageClassification,
    load_with_linear_head,
    with_linear_head,
)
from hf_immunize.vision.features import find_head


if TYPE_CHECKING:
    from transformers import PreTrainedModel


ADAPTER_FILES = ADAPTER_CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
_REMEDY = (
    "What is missing would be drawn at random, what has no place left out. Save the model again as its own class has "
    "it; to train one for another task, give it a new head (--new_head), and to take the backbone alone, say what a "
    "head shall see (--pooling)."
)


def load_classifier(
    source: str | os.PathLike[str], *, new_head: bool = False, kind: Any = None, **options: Any
) -> PreTrainedModel:
    """Load an image classifier with every one of its weights.

    Args:
        source: A folder or a repository on the Hub. With ``head_config.json`` it is a backbone with a linear head
            beside it; with ``adapter_config.json`` an adapter, which is merged into its base.
        new_head: Whether the classifier may be missing or of another size, since it will be trained anew.
        kind: Class that loads a plain checkpoint; `AutoModelForImageClassification` by default.
        **options: As for ``from_pretrained``; the type of the weights is float32 by default.

    Returns:
        The model, in eval mode.

    Raises:
        WeightsError: If a weight is missing, has another shape, or has no place in the model.
        CheckpointError: If a head's files are damaged.
    """
    name, hub = os.fspath(source), {key: options[key] for key in HUB_OPTIONS if key in options}
    # Said in so many words: where transformers is told nothing about code, it asks at the keyboard.
    options = {"dtype": torch.float32, "trust_remote_code": False, **options}
    if find_adapter_config_file(name, **hub) is not None:
        return _load_adapted(name, hub, **options)
    if _file_of(name, HEAD_CONFIG_FILE, hub) is not None:
        model, info = load_with_linear_head(
            name, output_loading_info=True, **{"ignore_mismatched_sizes": True, **options}
        )
        _check_whole(info, model, name)
        return model
    return _load_plain(kind or AutoModelForImageClassification, name, new_head, **options)


def checkpoint_form(folder: str | os.PathLike[str]) -> str:
    """What a folder holds: "adapter", "pooled" (a backbone with a head beside it) or "plain".

    Args:
        folder: The checkpoint's folder.

    Returns:
        The form's name.
    """
    if (Path(folder) / ADAPTER_CONFIG_FILE).is_file():
        return "adapter"
    return "pooled" if (Path(folder) / HEAD_CONFIG_FILE).is_file() else "plain"


def load_backbone(source: str | os.PathLike[str], pooling: str, **options: Any) -> PreTrainedModel:
    """Load a backbone that will get a head; the head of a classifier that it may come from is left behind.

    Args:
        source: A folder or a repository on the Hub.
        pooling: What the new head will see, see `with_linear_head`; without "pooler", a pooler may be missing.
        **options: As for ``from_pretrained``.

    Returns:
        The backbone.

    Raises:
        WeightsError: If one of its weights is missing or has another shape.
    """
    options["ignore_mismatched_sizes"] = True
    backbone, info = AutoModel.from_pretrained(source, output_loading_info=True, **options)
    unread = [name for name in info["missing_keys"] if pooling != "pooler" and name.startswith("pooler.")]
    _check_whole({**info, "unexpected_keys": ()}, backbone, source, unread)
    return backbone


def _load_plain(kind: Any, source: str, new_head: bool, **options: Any) -> PreTrainedModel:
    options["ignore_mismatched_sizes"] = True  # what does not fit is told below, with all the rest
    model, info = kind.from_pretrained(source, output_loading_info=True, **options)
    drawn: list[str] = []
    if new_head:
        head, _ = find_head(model)
        drawn = [name for name in model.state_dict() if name.startswith(f"{head}.")]
        info = {**info, "unexpected_keys": ()}  # of the head before, or of what pretraining needed
    _check_whole(info, model, source, drawn)
    return model.eval()


def _load_adapted(source: str, hub: dict[str, Any], **options: Any) -> PreTrainedModel:
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise WeightsError(
            f"Expected the library peft to load the adapter {source}, found none. Run pip install peft."
        ) from error
    adapter = PeftConfig.from_pretrained(source, **hub)
    base = adapter.base_model_name_or_path
    if not base:
        raise WeightsError(
            f"Expected the adapter {source} to name its base model, found none: it was made on a model in memory. "
            "Merge it there (model.merge_and_unload()) and save the result."
        )
    # Of the base alone: files and revision of the adapter are others.
    options = {name: value for name, value in options.items() if name not in ("revision", "local_files_only")}
    options["revision"] = adapter.revision
    about, head = _head_beside(source, hub)
    if about and about["pooling"] != "head_input":
        model: Any = with_linear_head(
            load_backbone(base, about["pooling"], **options), about["num_labels"], about["pooling"]
        )
        missing: set[str] = set()
    else:
        if about:
            keys = ("trust_remote_code", "token", "revision")
            known = {name: options[name] for name in keys if name in options}
            options["config"] = AutoConfig.from_pretrained(base, **known, num_labels=about["num_labels"])
        model, info = AutoModelForImageClassification.from_pretrained(
            base, output_loading_info=True, **{**options, "ignore_mismatched_sizes": True}
        )
        missing = _absent(info)
    if about.get("id2label"):
        model.config.id2label = {int(number): name for number, name in about["id2label"].items()}
        model.config.label2id = {name: number for number, name in model.config.id2label.items()}
    provided: set[str] = set()
    if head:
        name, module = find_head(model)
        module.load_state_dict(head)
        provided |= {f"{name}.{part}" for part in head}
    weights = _file_of(source, ADAPTER_FILE, hub)
    if weights is None:
        raise WeightsError(f"Expected {ADAPTER_FILE} of the adapter {source}, found none. Fetch it again.")
    with safe_open(weights, "pt") as file:
        provided |= {key.removeprefix("base_model.model.") for key in file.keys()}  # noqa: SIM118
    _check_whole({"missing_keys": missing}, model, base, provided)
    model = PeftModel.from_pretrained(model, source, **hub)
    if not hasattr(model, "merge_and_unload"):
        raise WeightsError(
            f"Expected an adapter that can be merged into its base in {source}, found {adapter.peft_type}. Use LoRA."
        )
    return model.merge_and_unload().eval()


def _head_beside(source: str, hub: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    about, weights = (_file_of(source, name, hub) for name in (HEAD_CONFIG_FILE, HEAD_FILE))
    try:
        described = json.loads(Path(about).read_text(encoding="utf-8")) if about is not None else {}
        if described and not {"pooling", "num_labels"} <= set(described):
            raise ValueError(f"only {sorted(described)}")
        return described, load_file(weights) if weights is not None else {}
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise WeightsError(
            f"Expected {HEAD_CONFIG_FILE} and {HEAD_FILE} of the adapter {source}, found: {error}. Fetch them again."
        ) from error


def _file_of(source: str, name: str, hub: dict[str, Any]) -> str | None:
    return cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,  # what cannot be reached is named when weights are asked for
        **hub,
    )


def _absent(info: dict[str, Any]) -> set[str]:
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in info.get("mismatched_keys", ())}
    return set(info["missing_keys"]) | mismatched


def _check_whole(info: dict[str, Any], model: Any, source: Any, drawn: Iterable[str] = ()) -> None:
    """Refuse what was not loaded, but for the weights that may be drawn or come from elsewhere."""
    missing, unexpected = sorted(_absent(info) - set(drawn)), sorted(info.get("unexpected_keys", ()))
    if missing or unexpected:
        found = [f"none that fits {', '.join(missing[:4])}"] if missing else []
        found += [f"no place for {', '.join(unexpected[:4])}"] if unexpected else []
        name = model.backbone if isinstance(model, LinearHeadForImageClassification) else model
        raise WeightsError(
            f"Expected all weights of a {type(name).__name__} in {source}, found {', and '.join(found)}. {_REMEDY}"
        )
