"""How much each regularization term counts in addition to the benign loss.

The weight of a term R with features Z is the user's number, or ``factor · scale / ‖∂R/∂Z‖``: its gradient on the
features then has the norm ``factor · scale`` whatever the size of R. Scale is the norm of the benign loss's gradient;
factor is ``auto_weight_ratio``, or with ``benign_budget`` a multiplier, which grows while the benign side moves less
than the budget and falls while it moves more. The features are the last tensor that all terms share, so these norms
cost no pass through the network.

Where terms inside the network say how much of their work remains (`InnerTerm.left`), all weights but fixed ones are
multiplied by it, and the multiplier grows by as much less: it would spend the budget on nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_immunize.spectra.hessian_functions import Hessian
from hf_immunize.training.distributed import process_mean
from hf_immunize.training.objectives import Terms, gradient_norm


if TYPE_CHECKING:
    from hf_immunize.training.arguments import Method


# In a step the multiplier changes by this power of budget over measure, within these bounds: slower the nearer the
# budget is, so that it settles there, and faster down than up, which keeps excursions above the budget short.
_POWER = 0.1
_LARGEST, _SMALLEST = 1.03, 0.9
_START = 0.02


def balanced_weight(scale: Tensor, term_norm: Tensor, factor: Tensor | float) -> Tensor:
    """Weight under which a term's gradient on the features has the norm ``factor · scale``; 0 where it has none."""
    return torch.where(term_norm > 0, factor * scale / term_norm, torch.zeros_like(term_norm))


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Linear rise of all weights to 1, a function of the steps done before this one alone."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


class Weighting:
    """The weights of a run, with what they remember, which is the same on all processes."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self._multiplier = torch.tensor(_START)
        self._divergence = torch.tensor(0.0)  # running mean over steps
        self._pending = torch.zeros(2)  # sum and count over the micro-batches of the step at hand
        self._left = torch.zeros(2)  # likewise, of the share of inner terms' work that remains
        self._step = -1
        self._norm = torch.tensor(0.0)  # running mean over micro-batches, not yet corrected for its start at zero
        self._norm_weight = 0.0
        self._smallest = torch.tensor(torch.inf)

    @property
    def factor(self) -> Tensor:
        """The multiplier under a budget, else the fixed ratio; 0-D."""
        return (
            self._multiplier if self.method.benign_budget is not None else torch.tensor(self.method.auto_weight_ratio)
        )

    def spent(self) -> tuple[float, float] | None:
        """How far the benign side has moved of late, and the multiplier over its start: a wait for the device."""
        if self.method.benign_budget is None:
            return None
        return float(self._divergence), float(self._multiplier) / _START

    def observe(self, divergence: Tensor, step: int) -> None:
        """Take note of how far the benign side has moved in a micro-batch, and adapt the multiplier between steps."""
        self._to(divergence.device)
        if step != self._step:
            self._adapt()
            self._step = step
        if self.method.benign_budget is not None:
            mean = process_mean(divergence.detach().to(torch.promote_types(divergence.dtype, torch.float32)))
            self._pending = self._pending + torch.stack([mean, torch.ones_like(mean)])

    def _adapt(self) -> None:
        if self._step < 0 or self.method.benign_budget is None:
            return
        mean = self._pending[0] / self._pending[1]
        keep = self.method.auto_weight_averaging if self._step > 0 else 0.0
        self._divergence = keep * self._divergence + (1 - keep) * mean
        # A loss may have fallen, which has no logarithm.
        part = (self._divergence / self.method.benign_budget).clamp_min(torch.finfo(self._divergence.dtype).eps)
        change = part.pow(-_POWER).clamp(_SMALLEST, _LARGEST)
        left = torch.where(self._left[1] > 0, self._left[0] / self._left[1].clamp_min(1), 1)
        change = torch.where(change > 1, change.pow(left), change)
        self._multiplier = self._multiplier * change
        self._pending, self._left = torch.zeros_like(self._pending), torch.zeros_like(self._left)

    def benign_scale(self, norm: Tensor) -> Tensor:
        """The benign loss's gradient norm, averaged over micro-batches and bounded."""
        self._to(norm.device)
        keep = self.method.auto_weight_averaging
        self._norm = keep * self._norm + (1 - keep) * norm.detach()
        self._norm_weight = keep * self._norm_weight + (1 - keep)
        mean = self._norm / self._norm_weight
        # A benign loss that rises because the weights are too large must not raise them further.
        self._smallest = torch.minimum(self._smallest, mean)
        return torch.minimum(mean, self.method.auto_weight_bound * self._smallest)

    def weigh(
        self,
        benign_loss: Tensor,
        terms: Terms,
        features: dict[str, Tensor | Hessian],
        benign_scale: Callable[[], Tensor],
        step: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, and all terms and weights by the names they are logged under.

        ``benign_scale`` computes the unit of gradients on the features, and is called where a weight is "auto".
        """
        warmup, left = warmup_factor(step, self.method.weight_warmup_steps), _most_left(terms)
        if left is not None:
            self._left = self._left + torch.stack([left, torch.ones_like(left)]).to(self._left)
        total, logged = benign_loss, dict[str, Tensor]()
        scale: Tensor | None = None
        for side, named in (("benign", terms.benign), ("harmful", terms.harmful)):
            for name, term in named.items():
                weight = self._fixed(side, term)
                if weight is None:
                    scale = benign_scale() if scale is None else scale
                    weight = self._balanced(scale, gradient_norm(term, features[side]), left)
                total = total + warmup * weight * term
                logged |= {name: term, f"{side}_weight": warmup * weight}
        for name, inner in terms.inner.items():
            weight = self._fixed("harmful", inner.value)
            if weight is None:
                weight = self._balanced(inner.scale, inner.gradient_norm, inner.left)
            total = total + warmup * weight * inner.value
            logged[name] = inner.value
        if self.method.benign_budget is not None:
            logged["multiplier"] = self.factor
        return total, logged

    def _balanced(self, scale: Tensor, norm: Tensor, left: Tensor | None) -> Tensor:
        # A number stays a number: a tensor made of it would be copied to the device in every step.
        factor = (
            self.factor.to(norm.device) if self.method.benign_budget is not None else self.method.auto_weight_ratio
        )
        weight = balanced_weight(scale, norm, factor)
        return weight if left is None else left * weight

    def _fixed(self, side: str, term: Tensor) -> Tensor | None:
        """The user's number for a side, under a budget times the multiplier; None for "auto"."""
        given = getattr(self.method, f"{side}_weight")
        if given == "auto":
            return None
        number = term.detach().new_full((), float(given))
        return number if self.method.benign_budget is None else number * self.factor.to(term.device)

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on exactly."""
        counters = torch.tensor([self._step, self._norm_weight], dtype=torch.float64)
        return {name: getattr(self, f"_{name}") for name in _REMEMBERED} | {"counters": counters}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        for name in _REMEMBERED:
            setattr(self, f"_{name}", state[name])
        step, self._norm_weight = state["counters"].tolist()
        self._step = int(step)

    def _to(self, device: torch.device) -> None:
        if self._multiplier.device != device:
            for name in _REMEMBERED:
                setattr(self, f"_{name}", getattr(self, f"_{name}").to(device))


_REMEMBERED = ("multiplier", "divergence", "pending", "left", "norm", "smallest")


def _most_left(terms: Terms) -> Tensor | None:
    """The largest share of the harmful terms' work that remains; None where one does not say."""
    if terms.left is not None:
        return terms.left
    lefts = [inner.left for inner in terms.inner.values() if inner.left is not None]
    return torch.stack(lefts).max() if lefts and len(lefts) == len(terms.inner) else None
