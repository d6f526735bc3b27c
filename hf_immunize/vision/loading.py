"""Image classifiers loaded whole: plain checkpoints, backbones with a head beside them, adapters on a base.

A weight that a checkpoint lacks, or that has no place, is a named error here, unless a new head was asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from hf_immunize.errors import HeadError, WeightsError, named_extras
from hf_immunize.vision.bare import (
    HEAD_CONFIG_FILE,
    HUB_OPTIONS,
    LinearHeadForImageClassification,
    load_with_linear_head,
    read_head,
    whole_weights,
    with_linear_head,
    write_head,
)
from hf_immunize.vision.families import image_shape
from hf_immunize.vision.head import adapter_parameters, find_head, in_eval_mode, running_modules, without_wrapper


if TYPE_CHECKING:
    from transformers import PreTrainedModel


# What transformers raises of files that are damaged, absent or of another kind.
LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError)
_IMAGES = 2
# What a class raises that cannot be built from its config alone.
_NO_CLASS = (TypeError, ValueError, RuntimeError, NotImplementedError, ImportError)
# Seeds of random copies begin here: with small ones a model may have been drawn before its training.
_FRESH = 2**31
# Convolutional networks, whose configs name no size, take any.
_ANY_SIZE = 64
_WRAPPERS = re.compile(r"^base_model\.model\.|\.modules_to_save\.[^.]+|\.original_module\b|\.base_layer\b")


def plain_names(model: Any, head_module: str | None = None) -> dict[str, str]:
    """Names under which a model's class loads its weights, where they are not the model's own."""
    plain = without_wrapper(model)
    expected = _expected_shapes(plain)
    own = _own_shapes(plain)
    if expected is None or own == expected:
        return {}
    head, _ = find_head(plain, head_module)
    head = _WRAPPERS.sub("", head)
    place = "classifier" if _pooled(plain) else find_head(_skeleton(plain, "meta"))[0]
    names = {name: f"{place}{name[len(head) :]}" for name in own if name.startswith(f"{head}.")}
    renamed = {names.get(name, name): shape for name, shape in own.items()}
    wrapped = plain is not model
    if renamed != expected or wrapped or not _same_as_class(plain, names):
        differing = sorted(name for name in {**renamed, **expected} if renamed.get(name) != expected.get(name))
        found = ", ".join(differing[:4]) or f"another computation in {head}"
        raise HeadError(
            f"Expected the parts that {type(plain).__name__} loads by itself, found a difference in {found}: what "
            "this model learns would be lost on loading. Give it one nn.Linear as classifier "
            "(model.classifier = nn.Linear(...)), with config.num_labels outputs and before PEFT wraps it."
        )
    return {name: new for name, new in names.items() if name != new}


def describe_adapter(folder: str | os.PathLike[str], model: Any, head_module: str | None = None) -> None:
    """Write with an adapter what its base may not know: the labels, the pooling, and a head that it lacks."""
    plain, (name, head) = without_wrapper(model), find_head(model, head_module)
    about = {
        "pooling": getattr(plain, "pooling", "head_input"),
        "num_labels": plain.config.num_labels,
        "feature_dim": head.in_features,
        "id2label": plain.config.id2label,
    }
    held = any(parameter.startswith(f"{name}.") for parameter in adapter_parameters(model) or ())
    write_head(folder, about, {} if held else dict(head.named_parameters()))


def difference_on_loading(folder: str | os.PathLike[str], model: Any) -> str | None:
    """What a checkpoint that was just written has lost of the model in memory."""
    registered = type(without_wrapper(model).config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    kind = AutoModelForImageClassification if registered else type(without_wrapper(model))
    with torch.random.fork_rng(devices=[]):  # a resumed run draws what an uninterrupted one draws
        try:
            loaded = load_classifier(folder, kind=kind, local_files_only=True, use_safetensors=True)
        except LOADING_ERRORS as error:
            return str(error)
    return None if same_logits(model, loaded) else "a model with other logits"


@torch.no_grad()
def same_logits(one: Any, other: Any) -> bool:
    """Whether two models give the same logits, up to rounding, on a few images of noise."""
    found = [_logits(model) for model in (one, other)]
    exact = all(p.dtype == torch.float32 and p.device.type == "cpu" for m in (one, other) for p in m.parameters())
    scale = max(float(logits.nan_to_num(0.0, 0.0, 0.0).abs().max()) for logits in found)
    bound = 1e-3 if exact else 3e-2
    return found[0].shape == found[1].shape and torch.allclose(
        found[0], found[1], rtol=0, atol=bound * scale, equal_nan=True
    )


def _logits(model: nn.Module) -> Tensor:
    weight = next(p for p in model.parameters() if p.is_floating_point())
    shape = image_shape(without_wrapper(model).config, default=_ANY_SIZE)
    pixels = torch.randn(_IMAGES, *shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    with in_eval_mode(model), torch.autocast(weight.device.type, enabled=False):
        # The class's own: what accelerate put in its place runs under autocast.
        return type(model).forward(model, pixel_values=pixels).logits.float().cpu()


def _pooled(model: Any) -> bool:
    return isinstance(model, LinearHeadForImageClassification)


def _own_shapes(plain: Any) -> dict[str, torch.Size]:
    """Shapes of weights and statistics by the names they have without PEFT's wrappers."""
    found = {}
    for name, module in running_modules(plain):
        place = _WRAPPERS.sub("", name)
        for part, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if part not in module._non_persistent_buffers_set:
                found[f"{place}.{part}" if place else part] = tensor.shape
    return found


def _expected_shapes(plain: Any) -> dict[str, torch.Size] | None:
    """Shapes of what the model's class loads; None where the class cannot be built from its config alone."""
    if _pooled(plain):
        # The backbone may lack a pooler, and is loaded without one.
        own = {n: shape for n, shape in _own_shapes(plain).items() if n.startswith("backbone.")}
        labels, width = plain.config.num_labels, find_head(plain)[1].in_features
        return own | {"classifier.weight": torch.Size((labels, width)), "classifier.bias": torch.Size((labels,))}
    skeleton = _skeleton(plain, "meta")
    return None if skeleton is None else _own_shapes(skeleton)


def _skeleton(plain: Any, device: str) -> Any:
    """A model of the same class and config, its weights not filled."""
    try:
        with torch.random.fork_rng(devices=[]), no_init_weights(), torch.device(device):
            return type(plain)(plain.config)
    except _NO_CLASS:
        return None


def can_copy(model: Any) -> bool:
    """Whether `random_copy` can build a model like this one; asked without room for weights."""
    plain = without_wrapper(model)
    return _skeleton(plain.backbone if _pooled(plain) else plain, "meta") is not None


def random_copy(model: Any, seed: int) -> Any:
    """A model of the same class and config with weights drawn anew; None where its class cannot be built from it."""
    plain, first = without_wrapper(model), next(model.parameters())
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_FRESH + seed)
            if _pooled(plain):
                backbone = type(plain.backbone)(plain.backbone.config)
                copy = LinearHeadForImageClassification(backbone, plain.config.num_labels, plain.pooling)
            else:
                copy = type(plain)(plain.config)
    except _NO_CLASS:
        return None
    return copy.to(first.device, torch.promote_types(first.dtype, torch.float32)).eval()


def _same_as_class(plain: Any, names: dict[str, str]) -> bool:
    """Whether the class's own computation gives the model's logits, with the weights under the plain names."""
    state = {names.get(name, name): tensor for name, tensor in plain.state_dict().items()}
    if _pooled(plain):
        with torch.random.fork_rng(devices=[]):
            rebuilt: Any = LinearHeadForImageClassification(plain.backbone, plain.config.num_labels, plain.pooling)
    else:
        rebuilt = _skeleton(plain, "cpu")
    weight = next(plain.parameters())
    rebuilt = rebuilt.to(weight.device, weight.dtype)
    rebuilt.load_state_dict(state)
    return same_logits(plain, rebuilt)


# What cannot be reached is named when weights are asked for.
_IF_THERE = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
ADAPTER_FILES = ADAPTER_CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
_REMEDY = (
    "What is missing would be drawn at random, what has no place left out. Save the model again as its own class has "
    "it; to train one for another task, give it a new head (--new_head), and to take the backbone alone, say what a "
    "head shall see (--pooling)."
)


@whole_weights()
def load_classifier(
    source: str | os.PathLike[str], *, new_head: bool = False, kind: Any = None, **options: Any
) -> PreTrainedModel:
    """Load an image classifier with every one of its weights."""
    name, hub = os.fspath(source), {key: options[key] for key in HUB_OPTIONS if key in options}
    # Without a word on it, transformers asks at the keyboard.
    options = {"dtype": torch.float32, "trust_remote_code": False, **options}
    if find_adapter_config_file(name, **hub) is not None:
        return _load_adapted(name, hub, **options)
    if cached_file(name, HEAD_CONFIG_FILE, **_IF_THERE, **hub) is not None:
        options = {"ignore_mismatched_sizes": True, **options}
        model, info = load_with_linear_head(name, output_loading_info=True, **options)
        _check_whole(info, model, name)
        return model
    return _load_plain(kind or AutoModelForImageClassification, name, new_head, **options)


def checkpoint_form(folder: str | os.PathLike[str]) -> str:
    """What a folder holds: "adapter", "pooled" (a backbone with a head beside it) or "plain"."""
    if (Path(folder) / ADAPTER_CONFIG_FILE).is_file():
        return "adapter"
    return "pooled" if (Path(folder) / HEAD_CONFIG_FILE).is_file() else "plain"


@whole_weights()
def load_backbone(source: str | os.PathLike[str], pooling: str, **options: Any) -> PreTrainedModel:
    """Load a backbone that will get a head; the head of a classifier that it may come from is left behind."""
    options["ignore_mismatched_sizes"] = True
    backbone, info = AutoModel.from_pretrained(source, output_loading_info=True, **options)
    unread = [name for name in info["missing_keys"] if pooling != "pooler" and name.startswith("pooler.")]
    _check_whole({**info, "unexpected_keys": ()}, backbone, source, unread)
    return backbone


def _load_plain(kind: Any, source: str, new_head: bool, **options: Any) -> PreTrainedModel:
    options["ignore_mismatched_sizes"] = True  # what does not fit is named below, with all the rest
    model, info = kind.from_pretrained(source, output_loading_info=True, **options)
    drawn: list[str] = []
    if new_head:
        head, _ = find_head(model)
        drawn = [name for name in model.state_dict() if name.startswith(f"{head}.")]
        info = {**info, "unexpected_keys": ()}  # of the head before, or of what pretraining needed
    _check_whole(info, model, source, drawn)
    return model.eval()


def _load_adapted(source: str, hub: dict[str, Any], **options: Any) -> PreTrainedModel:
    with named_extras():
        from peft import PeftConfig, PeftModel  # which takes a second

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
    about, head = read_head(source, **_IF_THERE, **hub)
    if about and about["pooling"] != "head_input":
        backbone = load_backbone(base, about["pooling"], **options)
        model: Any = with_linear_head(backbone, about["num_labels"], about["pooling"])
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
    with safe_open(cached_file(source, ADAPTER_FILE, **hub), "pt") as file:
        provided |= {key.removeprefix("base_model.model.") for key in file.keys()}  # noqa: SIM118
    _check_whole({"missing_keys": missing}, model, base, provided)
    return PeftModel.from_pretrained(model, source, **hub).merge_and_unload().eval()


def _absent(info: dict[str, Any]) -> set[str]:
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in info.get("mismatched_keys", ())}
    return set(info["missing_keys"]) | mismatched


def _check_whole(info: dict[str, Any], model: Any, source: Any, drawn: Iterable[str] = ()) -> None:
    """Refuse what was not loaded, but for the weights that may be drawn or come from elsewhere."""
    missing, unexpected = sorted(_absent(info) - set(drawn)), sorted(info.get("unexpected_keys", ()))
    if missing or unexpected:
        found = [f"none that fits {', '.join(missing[:4])}"] if missing else []
        found += [f"no place for {', '.join(unexpected[:4])}"] if unexpected else []
        name = model.backbone if _pooled(model) else model
        raise WeightsError(
            f"Expected all weights of a {type(name).__name__} in {source}, found {', and '.join(found)}. {_REMEDY}"
        )
