"""Full precision, whatever a checkpoint was stored in.

Transformers loads weights in their own type. Features of half precision have a rounding noise of 1e-3 and more, which
hides every small singular value: κ and rank would be those of the noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_immunize.errors import ArgumentError


if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.get_logger(__name__)


def half_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The floating-point parameters and buffers of a model that are narrower than float32.

    Args:
        model: The model.

    Returns:
        Name to tensor.
    """
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor for name, tensor in named.items() if tensor.is_floating_point() and tensor.itemsize < 4}


def to_full_precision(model: PreTrainedModel) -> PreTrainedModel:
    """Turn weights of half precision into float32, in place, and say so; parameters stay the objects they are.

    Args:
        model: The model. One in float32 or float64 is left as it is.

    Returns:
        The same model.

    Raises:
        ArgumentError: If its weights are quantized, so that they cannot be trained.
    """
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
    """Refuse a model with weights of half precision, where it is too late to turn them into float32.

    Args:
        model: The model.

    Raises:
        ArgumentError: If a weight or a statistic is narrower than float32.
    """
    half = half_tensors(model)
    if half:
        raise ArgumentError(
            f"Expected weights in float32, found {_kinds(half)} in {type(model).__name__} ({next(iter(half))}): steps "
            "and singular values would be lost in rounding. Load it with dtype=torch.float32; bf16=True trains in "
            "mixed precision."
        )


def full_precision_forward(model: PreTrainedModel) -> Callable[..., Any]:
    """The forward pass of a model with float32 weights at least and without what accelerate wrapped around it.

    Weights of half precision are widened for the pass alone, exactly, and gradients reach them; the model itself
    stays as it is. Call it outside of autocast.

    Args:
        model: The model.

    Returns:
        A function of ``pixel_values``.

    Examples:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        ...                    image_size=32, patch_size=16, num_labels=3)
        >>> model = ViTForImageClassification(config).bfloat16()
        >>> full_precision_forward(model)(torch.zeros(2, 3, 32, 32)).logits.dtype, model.dtype
        (torch.float32, torch.bfloat16)
    """
    half = half_tensors(model)
    if not half:
        # accelerate prepares a model for mixed precision by putting a forward under autocast in place of the class's.
        plain = type(model).forward.__get__(model) if "_original_forward" in vars(model) else model
        return lambda pixel_values: plain(pixel_values=pixel_values)
    logger.warning_once(
        f"{type(model).__name__} has weights in {_kinds(half)}: it is measured in float32, to which they are widened."
    )
    wide = {name: tensor.to(torch.float32) for name, tensor in half.items()}

    def forward(pixel_values: Tensor) -> Any:
        pixel_values = pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32))
        return torch.func.functional_call(model, wide, (), {"pixel_values": pixel_values})

    return forward


def _kinds(tensors: dict[str, Tensor]) -> str:
    return " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))
