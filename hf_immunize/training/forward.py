"""The forward pass over the images of all sides, in one pass wherever that is exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_immunize.vision.features import HeadInput


def forward_both(
    model: nn.Module, head: nn.Module, benign: dict[str, Any], others: dict[str, Any], *, together: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Features and logits of benign and other images, benign rows first.

    Args:
        model: The model, as wrapped for training.
        head: Its classifier, inside the wrapping.
        benign: ``pixel_values`` of shape ``(N_P, C, H, W)``.
        others: ``pixel_values`` of shape ``(N_O, C, H, W)``: harmful images, and those of the distillation set.
        together: Whether one pass over both is exact, which it is unless BatchNorm uses the statistics of its batch.

    Returns:
        Features ``(N_P + N_O, D)``, logits ``(N_P + N_O, C)``, and the features in the autograd graph of the benign
        logits: all of them after one pass, those of the benign pass after two.
    """
    if together:
        with HeadInput(head) as captured:
            outputs = model(pixel_values=torch.cat([benign["pixel_values"], others["pixel_values"]]))
        return captured.features, outputs["logits"], captured.features
    with HeadInput(head) as first:
        benign_logits = model(pixel_values=benign["pixel_values"])["logits"]
    # A harmful batch in the running statistics alone costs benign accuracy.
    with HeadInput(head) as second, _batchnorm_in_eval(model):
        other_logits = model(pixel_values=others["pixel_values"])["logits"]
    logits = torch.cat([benign_logits, other_logits])
    return torch.cat([first.features, second.features]), logits, first.features


@contextmanager
def _batchnorm_in_eval(model: nn.Module) -> Iterator[None]:
    modules = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True
