"""The input of the final classifier: the one notion of features that all Hugging Face vision models share.

It is captured by a hook, so the forward pass stays the model's own (and, under data parallelism, the wrapper's own).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_immunize.errors import ArgumentError, HeadError, ImmunizationError, ShapeError
from hf_immunize.spectra.checks import as_matrix, as_values


if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


logger = logging.get_logger(__name__)


def half_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The floating-point parameters and buffers of a model that are narrower than float32."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor for name, tensor in named.items() if tensor.is_floating_point() and tensor.itemsize < 4}


def to_full_precision(model: PreTrainedModel) -> PreTrainedModel:
    """Turn weights of half precision into float32, in place, and say so; parameters stay the objects they are."""
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ArgumentError(
            f"Expected weights in floating point, found a quantized {type(model).__name__}. Load the model without "
            "quantization_config."
        )
    half = half_tensors(model)
    if half:
        logger.warning(
            f"{type(model).__name__} was loaded in {_kinds(half)}: its weights are turned into float32, in which they "
            "are trained, measured and saved. Use bf16=True for mixed precision."
        )
        model.float()
    return model


def check_full_precision(model: nn.Module) -> None:
    """Refuse a model with weights of half precision, where it is too late to turn them into float32."""
    half = half_tensors(model)
    if half:
        raise ArgumentError(
            f"Expected weights in float32, found {_kinds(half)} in {type(model).__name__} ({next(iter(half))}): steps "
            "and singular values would be lost in rounding. Load it with dtype=torch.float32; bf16=True trains in "
            "mixed precision."
        )


def fast_layout(model: nn.Module, images: Tensor) -> Tensor:
    """The same images, or activations, in the order in memory in which depthwise convolutions are quicker."""
    # Channels last: on a CPU a pass through MobileNetV2, forward or both ways, takes 0.64 to 0.75 of the time; one
    # through a ResNet 0.85 to 1.1, so that it keeps its own.
    depthwise = any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in model.modules())
    if not depthwise or images.ndim != 4 or images.device.type != "cpu":
        return images
    return images.contiguous(memory_format=torch.channels_last)


def full_precision_forward(model: PreTrainedModel) -> Callable[..., Any]:
    """The forward pass of a model with float32 weights at least and without what accelerate wrapped around it."""
    half = half_tensors(model)
    if not half:
        # accelerate prepares a model for mixed precision by putting a forward under autocast in place of the class's.
        plain = type(model).forward.__get__(model) if "_original_forward" in vars(model) else model
        return lambda pixel_values: plain(pixel_values=fast_layout(model, pixel_values))
    logger.warning_once(
        f"{type(model).__name__} has weights in {_kinds(half)}: it is measured in float32, to which they are widened."
    )
    wide = {name: tensor.to(torch.float32) for name, tensor in half.items()}

    def forward(pixel_values: Tensor) -> Any:
        pixel_values = pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32))
        return torch.func.functional_call(model, wide, (), {"pixel_values": fast_layout(model, pixel_values)})

    return forward


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode; every module gets its own mode back at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _kinds(tensors: dict[str, Tensor]) -> str:
    return " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))


def without_wrapper(model: Any) -> PreTrainedModel:
    """The transformers model inside a `peft.PeftModel`; any other model as it is."""
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        return model
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model.base_model.model


def running_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a model as its author built it: without an adapter's matrices or idle copies."""
    inner = _that_runs(module)
    if inner is not None:
        name, part = inner
        yield from running_modules(part, _joined(prefix, name))
        return
    yield prefix, module
    for name, child in module._modules.items():  # named_children() would leave out a module's second name
        if child is not None:
            yield from running_modules(child, _joined(prefix, name))


def adapter_parameters(model: Any) -> list[str] | None:
    """Names of the parameters that PEFT trains and saves with the active adapter; None without a wrapper."""
    if without_wrapper(model) is model:
        return None
    from peft import get_peft_model_state_dict

    parameters = dict(model.named_parameters())
    state = parameters | dict(model.named_buffers())
    saved: set[int] = set()
    for name in [model.active_adapter] if isinstance(model.active_adapter, str) else model.active_adapter:
        # PEFT renames what it saves; the objects are the same.
        kept = get_peft_model_state_dict(model, state, adapter_name=name, save_embedding_layers=False)
        saved |= {id(parameter) for parameter in kept.values()}
    return [name for name, parameter in parameters.items() if id(parameter) in saved]


def outermost_name(name: str) -> str:
    """The name of the outermost wrapper that PEFT put around a module; its own name where there is none."""
    return re.split(r"\.modules_to_save\.|\.original_module\b|\.base_layer\b", name)[0]


def _that_runs(module: nn.Module) -> tuple[str, nn.Module] | None:
    """Of one of PEFT's wrappers, the module that does the work of the one it replaced."""
    peft = sys.modules.get("peft")
    if peft is None:
        return None
    if isinstance(module, peft.utils.ModulesToSaveWrapper):
        for active in module.active_adapters[:1]:
            if active in module.modules_to_save and not module.disable_adapters:
                return f"modules_to_save.{active}", module.modules_to_save[active]
        return "original_module", module.original_module
    if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) and hasattr(module, "base_layer"):
        return "base_layer", module.base_layer
    return None


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def find_head(model: PreTrainedModel, head_module: str | None = None) -> tuple[str, nn.Linear]:
    """Name and module of the final classifier, the only ``nn.Linear`` of a head with one output per label."""
    if not isinstance(model, nn.Module) or not hasattr(without_wrapper(model), "base_model"):
        raise HeadError(
            f"Expected an image classifier of transformers, found {type(model).__name__}. Load it with "
            "AutoModelForImageClassification.from_pretrained."
        )
    return _named_head(model, head_module) if head_module is not None else _only_head(model)


def _named_head(model: PreTrainedModel, head_module: str) -> tuple[str, nn.Linear]:
    modules = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(modules.get(head_module), nn.Linear):
        # A user knows the head by the name it had before PEFT wrapped it.
        inside = {n: m for n, m in running_modules(model) if isinstance(m, nn.Linear)}
        wrapped = [n for n in inside if outermost_name(n).endswith((f".{head_module}", head_module))]
        if len(wrapped) == 1:
            return wrapped[0], inside[wrapped[0]]
        found = f"a {type(modules[head_module]).__name__}" if head_module in modules else "no module of that name"
        raise HeadError(
            f"Expected head_module= as the name of an nn.Linear in {_kind(model)}, found {found} under "
            f"{head_module!r}. Name one such as {_shown(list(inside)[-3:])}."
        )
    return head_module, modules[head_module]


def _only_head(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    plain = without_wrapper(model)
    base, num_labels = plain.base_model, plain.config.num_labels
    inside = set() if base is plain else set(base.modules())
    running = list(running_modules(model))
    # Outside the base model alone, where a block may be as wide as the number of labels.
    candidates: dict[str, nn.Linear] = {}
    for name, module in running:
        if isinstance(module, nn.Linear) and module.out_features == num_labels and module not in inside:
            candidates |= {} if module in candidates.values() else {name: module}
    if not candidates and callable(getattr(base, "get_classifier", None)):
        # timm builds the classifier into what transformers calls the base model.
        asked = base.get_classifier()
        heads = asked if isinstance(asked, (tuple, list)) else [asked]
        candidates = {n: m for n, m in running if isinstance(m, nn.Linear) and any(_holds(head, m) for head in heads)}
    if not candidates:
        raise HeadError(
            f"Expected a classifier with {num_labels} outputs in {_kind(model)}, found none outside its backbone. "
            "Load AutoModelForImageClassification with num_labels >= 1, give a bare backbone a head by "
            'pooling="cls", or name the classifier with head_module=.'
        )
    if len(candidates) > 1:
        raise HeadError(
            f"Expected one linear module with {num_labels} outputs in {_kind(model)}, found "
            f"{_shown(list(candidates))}. Name the classifier with head_module=."
        )
    name, head = next(iter(candidates.items()))
    if base is not plain:
        _check_single(plain, head, inside)
    return name, head


def _check_single(model: PreTrainedModel, head: nn.Linear, inside: set[nn.Module]) -> None:
    """Refuse a head of several layers: a probe of the backbone does not read features in the middle of a head."""
    for top, part in model.named_children():
        running = [(name, module) for name, module in running_modules(part, top) if module not in inside]
        if all(module is not head for _, module in running):
            continue
        weighted = [(name, module) for name, module in running if isinstance(module, (nn.Linear, nn.Conv2d))]
        if len(weighted) > 1:
            raise HeadError(
                f"Expected a head of one linear layer, found the {len(weighted)} of {top!r} in {_kind(model)}: "
                f"{_shown([name for name, _ in weighted])}. Put all but the last into the backbone, or measure what "
                f"that one receives with head_module={next(name for name, m in weighted if m is head)!r}."
            )


class HeadInput:
    """Record what the head receives during one forward pass."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        self._features: Tensor | None = None
        self._handle: RemovableHandle | None = None

    @property
    def features(self) -> Tensor:
        """The head's input, ``(N, D)``, in the autograd graph of the forward pass."""
        if self._features is None:
            raise HeadError(
                f"Expected the head {self.head} to run within HeadInput, found that it did not. Run the whole model, "
                "or name the classifier with head_module=."
            )
        return self._features

    def __enter__(self) -> HeadInput:
        self._features = None
        self._handle = self.head.register_forward_pre_hook(self._record)
        return self

    def __exit__(self, *error: object) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    # Not traced by torch.compile, which then ends a graph before the head: compiled as one, logits would not be a
    # function of the features to autograd, and the hook of the first pass would stand for those of all others.
    @torch.compiler.disable
    def _record(self, head: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._features is not None:
            raise HeadError(
                f"Expected the head {head} to run once within HeadInput, found a second time. Use one block per "
                "forward pass, or name another module with head_module=."
            )
        features = inputs[0]
        if features.dim() != 2:
            raise HeadError(
                f"Expected one row of features per image, (N, D), as input of {head}, found {tuple(features.shape)}. "
                "Name the classifier with head_module=."
            )
        self._features = features


def penultimate_features(model: PreTrainedModel, pixel_values: Tensor, head_module: str | None = None) -> Tensor:
    """Compute the features a linear probe sees: the input of the model's classifier.

    The model's train or eval mode and the grad mode stay as they are. Weights of half precision are widened to float32
    for the pass.

    Args:
        model: An image classifier of transformers.
        pixel_values: Images, ``(N, C, H, W)``.
        head_module: The classifier's name, where it cannot be found without help; see `find_head`.

    Returns:
        Features ``(N, D)``, in the autograd graph; of float32 at least, unless autocast is on.

    Raises:
        HeadError: If the classifier cannot be found or does not see one row an image.
        ArgumentError: If the images are no floating-point numbers.
        NonFiniteError: If they hold NaN or infinity.
        ShapeError: If they are not images of the size that the model takes.

    Examples:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        ...                    image_size=32, patch_size=16, num_labels=3)
        >>> penultimate_features(ViTForImageClassification(config), torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 16])
    """
    _, head = find_head(model, head_module)
    images = as_values(pixel_values, "pixel_values")
    if images.ndim != 4 or images.numel() == 0:
        raise ShapeError(f"Expected images of shape (N, C, H, W), found {tuple(images.shape)}. Stack them first.")
    as_matrix(images.flatten(1), "pixel_values")
    try:
        with HeadInput(head) as captured:
            full_precision_forward(model)(images)
    except (ImmunizationError, torch.OutOfMemoryError):
        raise
    except (ValueError, RuntimeError) as error:  # of the model, whose own words say most
        said = " ".join(str(error).split())
        raise ShapeError(
            f"Expected images that {_kind(model)} takes, found {tuple(images.shape)} of {images.dtype} on "
            f"{images.device} ({said[:300]}). Prepare them with the model's image processor."
        ) from error
    return captured.features


def _holds(head: object, module: nn.Module) -> bool:
    return isinstance(head, nn.Module) and any(part is module for _, part in running_modules(head))


def _kind(model: PreTrainedModel) -> str:
    return type(without_wrapper(model)).__name__


def _shown(names: list[str]) -> str:
    return ", ".join(map(repr, names)) or "absent"
