"""Whether a model can be saved as its class has it, and whether what was saved is the same model."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForImageClassification
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from hf_immunize.errors import HeadError, WeightsError
from hf_immunize.vision.adapters import adapter_parameters, running_modules, without_wrapper
from hf_immunize.vision.bare import LinearHeadForImageClassification, write_head
from hf_immunize.vision.features import find_head
from hf_immunize.vision.loading import load_classifier


if TYPE_CHECKING:
    from transformers import PreTrainedModel


_IMAGES = 2
# Convolutional networks, whose configs name no size, take any.
_ANY_SIZE = 64
_WRAPPERS = re.compile(r"^base_model\.model\.|\.modules_to_save\.[^.]+|\.original_module\b|\.base_layer\b")


def plain_names(model: Any, head_module: str | None = None) -> dict[str, str]:
    """Names under which a model's class loads its weights, where they are not the model's own.

    A linear head that a user put into a container of their own (``Sequential(Dropout, Linear)``) is saved as the
    head of the class: in eval mode both give the same logits, which is checked.

    Args:
        model: An image classifier of transformers, wrapped by PEFT or not.
        head_module: The classifier's name, where it cannot be found without help.

    Returns:
        Own name to plain name of the weights that differ; empty for most models.

    Raises:
        HeadError: If the model has parts that its class does not load.

    Examples:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        ...                    image_size=32, patch_size=16, num_labels=3)
        >>> model = ViTForImageClassification(config)
        >>> model.classifier = nn.Sequential(nn.Dropout(), model.classifier)
        >>> plain_names(model)
        {'classifier.1.weight': 'classifier.weight', 'classifier.1.bias': 'classifier.bias'}
    """
    plain = without_wrapper(model)
    expected = _expected_shapes(plain)
    own = _own_shapes(plain)
    if expected is None or own == expected:
        return {}
    head, _ = find_head(plain, head_module)
    head = _WRAPPERS.sub("", head)
    place = _head_of_class(plain)
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
    """Write beside an adapter what its base may not know: the labels, the pooling, and a head that it does not hold.

    Args:
        folder: Where PEFT has saved the adapter.
        model: The model, wrapped by PEFT.
        head_module: The classifier's name, where it cannot be found without help.
    """
    plain, (name, head) = without_wrapper(model), find_head(model, head_module)
    about = {
        "pooling": getattr(plain, "pooling", "head_input"),
        "num_labels": plain.config.num_labels,
        "feature_dim": head.in_features,
        "id2label": plain.config.id2label,
    }
    held = any(parameter.startswith(f"{name}.") for parameter in adapter_parameters(model) or ())
    write_head(folder, about, {} if held else dict(head.named_parameters()))


def difference_on_loading(folder: str | os.PathLike[str], model: Any, logits: bool = True) -> str | None:
    """What a checkpoint that was just written has lost of the model in memory.

    Args:
        folder: Where it lies.
        model: The model in memory, wrapped by PEFT or not.
        logits: Whether to compare logits; without it, only that all weights are there (of a model in shards).

    Returns:
        What differs, in words; None where it is the same model.
    """
    registered = type(without_wrapper(model).config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    kind = AutoModelForImageClassification if registered else type(without_wrapper(model))
    with torch.random.fork_rng(devices=[]):  # a resumed run draws what an uninterrupted one draws
        try:
            loaded = load_classifier(folder, kind=kind, local_files_only=True, use_safetensors=True)
        except WeightsError as error:
            return str(error)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            return str(error)
    if logits and not same_logits(model, loaded):
        return "a model with other logits"
    return None


@torch.no_grad()
def same_logits(one: Any, other: Any) -> bool:
    """Whether two models give the same logits, up to rounding, on a few images of noise.

    Args:
        one: A model.
        other: Another one, on any device and in any floating-point type.

    Returns:
        Whether they do.
    """
    found = [_logits(model) for model in (one, other)]
    exact = all(p.dtype == torch.float32 and p.device.type == "cpu" for m in (one, other) for p in m.parameters())
    scale = max(float(logits.nan_to_num(0.0, 0.0, 0.0).abs().max()) for logits in found)
    bound = 1e-3 if exact else 3e-2
    return found[0].shape == found[1].shape and torch.allclose(
        found[0], found[1], rtol=0, atol=bound * scale, equal_nan=True
    )


def _logits(model: nn.Module) -> Tensor:
    plain, weight = without_wrapper(model), next(p for p in model.parameters() if p.is_floating_point())
    pixels = noise_images(plain).to(weight.device, weight.dtype)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.autocast(weight.device.type, enabled=False):
            # The class's own: what accelerate put in its place runs under autocast.
            return type(model).forward(model, pixel_values=pixels).logits.float().cpu()
    finally:
        for module, training in modes:
            module.training = training


def noise_images(model: PreTrainedModel) -> Tensor:
    """A few images of noise, of the size that a model takes, always the same.

    Args:
        model: The model.

    Returns:
        Pixel values, ``(2, C, H, W)``.
    """
    config = model.config
    config = getattr(config, "vision_config", None) or config
    timm = getattr(config, "pretrained_cfg", None) or {}
    size = getattr(config, "image_size", None) or (timm.get("input_size") or [_ANY_SIZE])[-1]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(config, "num_channels", 3)
    return torch.randn(_IMAGES, channels, height, width, generator=torch.Generator().manual_seed(0))


def _own_shapes(plain: Any) -> dict[str, torch.Size]:
    """Shapes of weights and statistics by the names they have without PEFT's wrappers."""
    found = {}
    for name, module in running_modules(plain):
        place = _WRAPPERS.sub("", name)
        kept = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for part, tensor in kept:
            if part not in module._non_persistent_buffers_set:
                found[f"{place}.{part}" if place else part] = tensor.shape
    return found


def _expected_shapes(plain: Any) -> dict[str, torch.Size] | None:
    """Shapes of what the model's class loads; None where the class cannot be built from its config alone."""
    if isinstance(plain, LinearHeadForImageClassification):
        # The backbone may lack a pooler, and is loaded without one.
        own = {n: shape for n, shape in _own_shapes(plain).items() if n.startswith("backbone.")}
        head = {
            "weight": (plain.config.num_labels, find_head(plain)[1].in_features),
            "bias": (plain.config.num_labels,),
        }
        return own | {f"classifier.{part}": torch.Size(shape) for part, shape in head.items()}
    skeleton = _skeleton(plain, "meta")
    return None if skeleton is None else _own_shapes(skeleton)


def _skeleton(plain: Any, device: str) -> Any:
    """A model of the same class and config, its weights not filled."""
    try:
        with torch.random.fork_rng(devices=[]), no_init_weights(), torch.device(device):
            return type(plain)(plain.config)
    except (TypeError, ValueError, RuntimeError, NotImplementedError, ImportError):
        return None


def _head_of_class(plain: Any) -> str:
    if isinstance(plain, LinearHeadForImageClassification):
        return "classifier"
    return find_head(_skeleton(plain, "meta"))[0]


def _same_as_class(plain: Any, names: dict[str, str]) -> bool:
    """Whether the class's own computation gives the model's logits, with the weights under the plain names."""
    state = {names.get(name, name): tensor for name, tensor in plain.state_dict().items()}
    if isinstance(plain, LinearHeadForImageClassification):
        with torch.random.fork_rng(devices=[]):
            rebuilt: Any = LinearHeadForImageClassification(plain.backbone, plain.config.num_labels, plain.pooling)
    else:
        rebuilt = _skeleton(plain, "cpu")
    weight = next(plain.parameters())
    rebuilt = rebuilt.to(weight.device, weight.dtype)
    rebuilt.load_state_dict(state)
    return same_logits(plain, rebuilt)
