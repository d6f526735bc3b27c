"""What one training step computes between the batch and the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_immunize.errors import NonFiniteError
from hf_immunize.training.distributed import mean_gradient_norm, process_mean
from hf_immunize.training.objectives import Side, Terms
from hf_immunize.training.weighting import balanced_weight, gradient_norm
from hf_immunize.vision.features import HeadInput


def forward_both(
    model: nn.Module, head: nn.Module, benign: dict[str, Any], harmful: dict[str, Any], *, together: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Features and logits of a benign and a harmful batch, benign rows first.

    Args:
        model: The model, as wrapped for training.
        head: Its classifier, inside the wrapping.
        benign: ``pixel_values`` of shape ``(N_P, C, H, W)``.
        harmful: ``pixel_values`` of shape ``(N_H, C, H, W)``.
        together: Whether one pass over both is exact, which it is unless BatchNorm uses the statistics of its batch.

    Returns:
        Features ``(N_P + N_H, D)``, logits ``(N_P + N_H, C)``, and the features in the autograd graph of the benign
        logits: all of them after one pass, those of the benign pass after two.
    """
    if together:
        with HeadInput(head) as captured:
            outputs = model(pixel_values=torch.cat([benign["pixel_values"], harmful["pixel_values"]]))
        return captured.features, outputs["logits"], captured.features
    with HeadInput(head) as first:
        benign_logits = model(pixel_values=benign["pixel_values"])["logits"]
    # A harmful batch in the running statistics alone costs benign accuracy.
    with HeadInput(head) as second, _batchnorm_in_eval(model):
        harmful_logits = model(pixel_values=harmful["pixel_values"])["logits"]
    logits = torch.cat([benign_logits, harmful_logits])
    return torch.cat([first.features, second.features]), logits, first.features


def weigh(
    benign_loss: Tensor,
    benign: Side,
    harmful: Side,
    terms: Terms,
    weights: dict[str, str | float],
    ratio: float,
    loss_features: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step: benign loss plus weighted regularizers.

    Args:
        benign_loss: 0-D.
        benign: The benign side, whose features the benign terms are of.
        harmful: The harmful side, likewise.
        terms: The objective's terms.
        weights: For "benign" and "harmful" a number, or "auto" to balance gradients on the features.
        ratio: With "auto", the proportion of a term's gradient norm to the benign loss's.
        loss_features: This process's features, in the autograd graph of the benign loss.

    Returns:
        The 0-D loss, and all terms and weights by the names they are logged under.
    """
    total, logged = benign_loss, {"benign_loss": benign_loss}
    loss_norm = None
    for side, view, named in (("benign", benign, terms.benign), ("harmful", harmful, terms.harmful)):
        for name, term in named.items():
            given = weights[side]
            if isinstance(given, str):
                if loss_norm is None:
                    loss_norm = mean_gradient_norm(gradient_norm(benign_loss, loss_features))
                weight = balanced_weight(loss_norm, gradient_norm(term, view.features), ratio)
            else:
                weight = torch.tensor(given, device=term.device)
            total = total + weight * term
            logged |= {name: term, f"{side}_weight": weight}
    return total, logged


class RunningMeans:
    """Means of named scalars since they were last taken, kept on the device until then.

    Fetching every term in every step would stall a GPU.

    Example:
        >>> means = RunningMeans()
        >>> for value in (1.0, 3.0):
        ...     means.update({"r_well": torch.tensor(value)}, step=1)
        >>> means.take(step=2)
        {'r_well': 2.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def update(self, values: dict[str, Tensor], step: int) -> None:
        """Add the scalars of one micro-batch.

        Args:
            values: Name to 0-D tensor.
            step: The step they belong to.

        Raises:
            NonFiniteError: If one is NaN or infinite; on a GPU, `take` raises it.
        """
        for name, value in values.items():
            value = value.detach()
            if value.device.type == "cpu":
                _check_finite(name, float(value), step)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def take(self, step: int) -> dict[str, float]:
        """The means, over all processes as well, and start anew; a collective where there are several.

        Args:
            step: The last step they cover.

        Returns:
            Name to mean; empty where nothing was added.

        Raises:
            NonFiniteError: If one is NaN or infinite.
        """
        if not self._sums:
            return {}
        totals = process_mean(torch.stack(list(self._sums.values()))).tolist()
        means = {name: total / self._count for name, total in zip(self._sums, totals, strict=True)}
        for name, mean in means.items():
            _check_finite(name, mean, step)
        self._sums, self._count = {}, 0
        return means


def _check_finite(name: str, value: float, step: int) -> None:
    if value != value or value in (float("inf"), float("-inf")):
        raise NonFiniteError(
            f"Expected a finite {name} at step {step}, found {value}. Lower the learning rate or the weights, or "
            "train in full precision; the last checkpoint is sound."
        )


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
