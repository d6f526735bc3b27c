"""Fine-tuning of the last stage: what stays frozen before it is computed once, not at every step."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_immunize.errors import HeadError, TrunkError
from hf_immunize.features.layers import pass_size
from hf_immunize.features.trunk import TrunkSplit, split_trunk


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FrozenPart:
    """Where a model's frozen part ends, and what it gives for the images of an attack.

    Attributes:
        split: Where it ends.
        train: Its activations for the training images, ``(N, …)``.
        test: The same for the test images.
    """

    split: TrunkSplit
    train: Tensor
    test: Tensor

    def replayed(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within, the model takes activations as its pixel values, and computes what moves alone."""
        return self.split.replayed(model)


def frozen_part(
    model: PreTrainedModel, train: Tensor, test: Tensor, head_module: str | None = None
) -> FrozenPart | None:
    """Compute the frozen part of a model for all images.

    Args:
        model: Prepared for the attack, in eval mode: what moves takes gradients.
        train: Pixel values to learn from, ``(N, C, H, W)``.
        test: Pixel values to measure on.
        head_module: The classifier's name.

    Returns:
        The frozen part; None where the model has none, or where its activations are larger than twice the images.
    """
    moving = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    shape = tuple(train.shape[1:])
    try:
        # In these attacks every module stays in eval mode.
        split = split_trunk(model, moving, shape, still=list(model.modules()), head_module=head_module)
    except (TrunkError, HeadError):
        return None
    if torch.Size(split.activation_shape).numel() > 2 * torch.Size(shape).numel():
        return None
    device, size = next(model.parameters()).device, pass_size(model)

    def through(pixels: Tensor) -> Tensor:
        return torch.cat([split.activations(model, part.to(device)).cpu() for part in pixels.split(size)])

    return FrozenPart(split, through(train), through(test))
