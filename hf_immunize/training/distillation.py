"""Staying close to the starting model: losses on its logits and features, and the means to run it.

They need no labels, so that any images can take part, and hold what the starting model does on classes that a small
benign training set does not show.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_immunize.errors import ArgumentError
from hf_immunize.vision.head import HeadInput, fast_layout, in_eval_mode


# Benign images that show what is harmful (a fire engine, where that is cars) are lost first and wholly: two of them
# among 70 would use up the budget of all others.
MAX_TV_PER_IMAGE = 0.2


def _widened(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def logit_divergence(logits: Tensor, start_logits: Tensor) -> Tensor:
    """``KL(start ‖ now)`` in nats, mean over rows of logits ``(N, C)``."""
    now, start = (F.log_softmax(_widened(rows), dim=1) for rows in (logits, start_logits))
    return F.kl_div(now, start, log_target=True, reduction="batchmean")


def total_variation(logits: Tensor, start_logits: Tensor, most: float = MAX_TV_PER_IMAGE) -> Tensor:
    """``½ Σ_c |p_c − p⁰_c|`` of logits ``(N, C)``, of which a row counts ``most`` at most, mean over rows."""
    # The largest change in the probability of any event, such as the right class. Unlike the divergence it is bounded.
    now, start = (F.softmax(_widened(rows), dim=1) for rows in (logits, start_logits))
    return ((now - start).abs().sum(1) / 2).clamp(max=most).mean()


def feature_error(features: Tensor, start_features: Tensor) -> Tensor:
    """Mean over rows of ``‖z − z₀‖²/‖z₀‖²``: how far features ``(N, D)`` moved, in units of their own size."""
    now, start = _widened(features), _widened(start_features)
    sizes = start.square().sum(1)
    # An image whose features the starting model leaves at zero is measured against the others' size.
    sizes = torch.maximum(sizes, 1e-6 * sizes.mean()).clamp_min(torch.finfo(sizes.dtype).tiny)
    return ((now - start).square().sum(1) / sizes).mean()


class StartingModel:
    """The model as it was, run through the modules of the model that is being trained.

    Only the tensors that training can change are kept: the trainable parameters and all buffers. With ``head``, the
    whole of the model is copied, and run in its place: processes that hold parts of the weights cannot run others.
    """

    def __init__(self, model: nn.Module, head: nn.Module | None = None) -> None:
        trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._tensors = {
            name: value.detach().clone() for name, value in (trainable | dict(model.named_buffers())).items()
        }
        self._copy: tuple[Any, Any] | None = None if head is None else copy.deepcopy((model, head))

    @torch.no_grad()
    def __call__(self, model: nn.Module, head: nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(N, D)`` and logits ``(N, C)`` through the starting weights; ``model`` has no wrapper."""
        tensors: dict[str, Tensor] = {}
        if self._copy is not None:
            model, head = self._copy[0].to(pixel_values.device), self._copy[1]
            pixel_values = pixel_values.to(next(model.parameters()).dtype)  # DeepSpeed casts them
        elif self._tensors:
            if next(iter(self._tensors.values())).device != pixel_values.device:
                self._tensors = {name: value.to(pixel_values.device) for name, value in self._tensors.items()}
            tensors = self._tensors
        with in_eval_mode(model), HeadInput(head) as captured:
            outputs = torch.func.functional_call(
                model, tensors, (), {"pixel_values": fast_layout(model, pixel_values)}
            )
        return captured.features, outputs["logits"]

    @contextmanager
    def in_place(self, model: Any, head: Any) -> Iterator[tuple[Any, Any]]:
        """Within, a model with the starting weights, and its head: the one given, or the copy where there is one."""
        if self._copy is not None:
            self._copy[0].to(next(model.parameters()).device)
            yield self._copy
            return
        kept = {name: value.clone() for name, value in model.state_dict().items() if name in self._tensors}
        try:
            model.load_state_dict(self._tensors, strict=False)
            yield model, head
        finally:
            model.load_state_dict(kept, strict=False)

    def state_dict(self) -> dict[str, Tensor]:
        """The starting tensors, by their names in the model."""
        return dict(self._tensors)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the starting tensors of an earlier run of the same model and scope."""
        for name, value in self._tensors.items():
            found = state.get(name)
            if found is None or found.shape != value.shape:
                raise ArgumentError(
                    f"Expected starting weights for {name} of shape {tuple(value.shape)} in the checkpoint, found "
                    f"{'none' if found is None else tuple(found.shape)}. Resume with the model, trainable= and "
                    "benign_loss= of the interrupted run."
                )
        self._tensors = {name: state[name].to(value.device) for name, value in self._tensors.items()}
        if self._copy is not None:
            self._copy[0].load_state_dict(self._tensors, strict=False)


class StartedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Stored activations, each with what the starting model makes of it: computed once, since neither changes."""

    def __init__(self, rows: Any, run: Callable[[Tensor], tuple[Tensor, Tensor]], batch_size: int) -> None:
        self.rows, parts = rows, []
        for first in range(0, len(rows), batch_size):
            batch = [rows[row]["pixel_values"] for row in range(first, min(first + batch_size, len(rows)))]
            parts.append([part.cpu() for part in run(torch.stack(batch))])
        self.features, self.logits = (torch.cat(part) for part in zip(*parts, strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.rows[row] | {"start_features": self.features[row], "start_logits": self.logits[row]}
