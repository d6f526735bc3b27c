"""What the candidates add to the loss, as functions of tensors; the two that need a model take a copy's parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_immunize.attacks.finetune import prepare
from hf_immunize.spectra.regularizers import spectral_concentration
from hf_immunize.vision.head import HeadInput, find_head


if TYPE_CHECKING:
    from transformers import PreTrainedModel


# As the attackers of the audit draw theirs.
HEAD_STD = 0.01


def layer_concentration(values: Tensor) -> Tensor:
    """Spectral concentration of what leaves a layer, flattened: all positions towards one pattern.

    Args:
        values: Of harmful images, shape ``(N, ...)``.

    Returns:
        0-D, to be minimized.

    Example:
        >>> images = torch.ones(4, 2, 3, 3) * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1, 1)
        >>> layer_concentration(images).item() < -20  # one pattern at four strengths
        True
    """
    return spectral_concentration(values.flatten(1))


def ridge_resistance(features: Tensor, labels: Tensor, strengths: Sequence[float] = (1e-4, 1e-2)) -> Tensor:
    """How well ridge regression, fitted to half of the rows, predicts the other half; differentiable.

    The inner attacker of the whole batch in closed form: kernel ridge on rows of mean square 1, one-hot labels, each
    row's squared error counted up to that of the mean label, so that nothing is gained by errors beyond chance.

    Args:
        features: Of harmful images, shape ``(N, D)``.
        labels: Class numbers, shape ``(N,)``.
        strengths: Of the penalty, relative to the kernel's trace; the best of them for the attacker counts.

    Returns:
        0-D, between 0 (reads nothing) and 1 (reads all); to be minimized.

    Example:
        >>> labels = torch.tensor([0, 1] * 8)
        >>> rows = F.one_hot(labels, 2).float()
        >>> round(ridge_resistance(rows, labels).item(), 3)
        1.0
    """
    rows = features.flatten(1)
    rows = rows.double() / rows.double().square().mean().sqrt().clamp_min(1e-30)
    targets = F.one_hot(labels, int(labels.max()) + 1).double()
    half = len(rows) // 2
    fit, test = rows[:half], rows[half:]
    mean, center = targets[:half].mean(0), fit.mean(0)
    fit, test = fit - center, test - center
    kernel = fit @ fit.mT
    chance = (targets[half:] - mean).square().sum(1)
    found = []
    for strength in strengths:
        ridge = strength * kernel.diagonal().mean().clamp_min(1e-12)
        solved = torch.linalg.solve(kernel + ridge * torch.eye(half, dtype=rows.dtype), targets[:half] - mean)
        error = (targets[half:] - mean - test @ fit.mT @ solved).square().sum(1)
        found.append(torch.minimum(error, chance).sum() / chance.sum())
    return (1 - torch.stack(found).min()).to(features.dtype)


def flatness(features: Tensor, labels: Tensor, parameters: Sequence[Tensor], head: Tensor) -> Tensor:
    """``log ‖∂L/∂θ‖²`` of the harmful loss under a new head: how strongly fine-tuning is pulled anywhere at first.

    Args:
        features: Classifier inputs of harmful images, ``(N, D)``, in the graph of the parameters.
        labels: ``(N,)``.
        parameters: θ, those that move.
        head: Weight of the new head, ``(C, D)``.

    Returns:
        0-D, to be minimized, differentiable once more.
    """
    loss = F.cross_entropy(features @ head.mT, labels)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    squares = torch.stack([one.square().sum() for one in gradients if one is not None])
    return torch.log(squares.sum() + 1e-20)


def after_tuning(
    model: PreTrainedModel,
    moving: Sequence[str],
    pixels: Tensor,
    labels: Tensor,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
) -> dict[str, Tensor]:
    """Gradient that makes a fine-tuned copy of the model do badly, to first order as that of the model itself.

    A copy with a new head is trained for some steps of AdamW on half of the images; the gradient of its loss on the
    other half, up to that of chance, is taken where the copy has come to (as in first-order MAML, Finn et al. 2017;
    against fine-tuning, Henderson et al. 2023, Tamirisa et al. 2024).

    Args:
        model: It is left as it is.
        moving: Names of its parameters that immunization moves.
        pixels: Harmful images, ``(N, C, H, W)``.
        labels: ``(N,)``.
        steps: Of the inner attacker.
        learning_rate: Likewise.
        seed: Of the new head.

    Returns:
        Name to gradient of ``−min(loss, log C)``; empty where the copy is at chance.
    """
    classes = int(labels.max()) + 1
    copy = prepare(model, "whole_network", classes, seed)
    head_name, head = find_head(copy)
    names = [name for name in moving if not name.startswith(f"{head_name}.")]
    known = dict(copy.named_parameters())
    for name, parameter in known.items():
        parameter.requires_grad_(name in names or name.startswith(f"{head_name}."))
    inner = [known[name] for name in names]
    optimizer = torch.optim.AdamW([*inner, *head.parameters()], lr=learning_rate)
    half = len(pixels) // 2
    with torch.enable_grad():
        for _ in range(steps):
            loss = F.cross_entropy(copy(pixel_values=pixels[:half]).logits, labels[:half])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses = F.cross_entropy(copy(pixel_values=pixels[half:]).logits, labels[half:], reduction="none")
        total = -losses.clamp(max=math.log(classes)).mean()
        if not total.requires_grad or float(total.detach()) <= -math.log(classes) + 1e-6:
            return {}
        found = torch.autograd.grad(total, inner, allow_unused=True)
    return {name: one for name, one in zip(names, found, strict=True) if one is not None}


def captured_features(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """Classifier inputs in the graph of the parameters, ``(N, D)``."""
    with HeadInput(find_head(model)[1]) as captured:
        model(pixel_values=pixels)
    return captured.features
