"""How much each regularization term counts beside the benign loss.

Three rules, which share one form: the weight of a term R with features Z is ``factor · scale / ‖∂R/∂Z‖``, so that its
gradient on the features has the norm ``factor · scale`` whatever the size of R.

- fixed: the user's number, and nothing else (the paper's way);
- by gradient norm: factor is ``auto_weight_ratio``, scale the norm of the benign loss's gradient;
- by a multiplier (``benign_budget``): factor grows while the benign side moves less than the budget, and falls while
  it moves more.

Where terms look inside the network and tell that their work is nearly done (`InnerTerm.left`), all weights but fixed
ones are multiplied by what is left, and the multiplier grows by as much less: it would spend the budget on nothing.

The features are the last tensor that all terms share, so these norms cost no pass through the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_immunize.spectra.hessian_functions import Hessian
from hf_immunize.training.distributed import process_mean
from hf_immunize.training.objectives import Terms


# In a step the multiplier changes by this power of budget over measure, within these bounds: slower the nearer the
# budget is, so that it settles there, and faster down than up, which keeps excursions above the budget short.
_POWER = 0.1
_LARGEST, _SMALLEST = 1.03, 0.9
_START = 0.02


@dataclass(frozen=True)
class WeightRule:
    """What decides the weights.

    Attributes:
        benign: Weight of the benign terms: a number, or "auto".
        harmful: Weight of the harmful terms, likewise.
        ratio: With "auto" and no budget, the norm of a term's gradient on the features over the benign scale.
        averaging: Share of the past in the running mean of the benign loss's gradient norm, in [0, 1).
        bound: The benign scale counts at most this many times the smallest running mean so far: a benign loss that
            rises because the weights are too large must not raise them further.
        warmup_steps: Steps over which all weights rise linearly from zero; a function of the step alone.
        budget: Largest running divergence of the benign side, or None for no multiplier.
    """

    benign: str | float = "auto"
    harmful: str | float = "auto"
    ratio: float = 0.3
    averaging: float = 0.9
    bound: float = 3.0
    warmup_steps: int = 0
    budget: float | None = None


def gradient_norm(value: Tensor, features: Tensor | Hessian) -> Tensor:
    """Norm of the gradient of a scalar with respect to the features, without a pass through the network.

    Where the scalar depends on the features by their Hessian H alone, with gradient M with respect to it, that with
    respect to the features Z is ``2ZM``, of norm ``2·sqrt(tr(M·H·M))``, which takes no features.

    Args:
        value: 0-D tensor that depends on the features.
        features: Shape ``(N, D)``, in the autograd graph; or their Hessian. The graph is kept.

    Returns:
        ``‖∂value/∂features‖_F``, 0-D, float32 at least, detached, on the features' device.

    Example:
        >>> rows = torch.tensor([[3.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> hessian = Hessian.of(rows)
        >>> trace = hessian.matrix.diagonal().sum()
        >>> [round(gradient_norm(trace, given).item(), 4) for given in (rows, hessian)]
        [6.3246, 6.3246]
    """
    given = features.matrix if isinstance(features, Hessian) else features
    (gradient,) = torch.autograd.grad(value, given, retain_graph=True)
    dtype = torch.promote_types(features.dtype, torch.float32)
    if not isinstance(features, Hessian):
        return torch.linalg.vector_norm(gradient, dtype=dtype)
    gradient = (gradient + gradient.mT) / 2
    return 2 * (gradient @ given.detach() * gradient).sum().clamp_min(0).sqrt().to(dtype)


def balanced_weight(scale: Tensor, term_norm: Tensor, factor: Tensor | float) -> Tensor:
    """Weight under which a term's gradient on the features has the norm ``factor · scale``.

    Args:
        scale: 0-D, such as the norm of the benign loss's gradient on the features.
        term_norm: Norm of the term's gradient.
        factor: The wanted proportion.

    Returns:
        0-D tensor; zero where the term has no gradient, as ``R_well`` at κ = 1.

    Example:
        >>> balanced_weight(torch.tensor(2.0), torch.tensor(4.0), factor=0.5).item()
        0.25
    """
    return torch.where(term_norm > 0, factor * scale / term_norm, torch.zeros_like(term_norm))


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Linear rise of all weights, a function of the step alone.

    Args:
        step: Steps done before this one.
        warmup_steps: Length of the rise; 0 for none.

    Returns:
        Between 0 (exclusive) and 1.

    Example:
        >>> warmup_factor(0, 4), warmup_factor(3, 4), warmup_factor(9, 4)
        (0.25, 1.0, 1.0)
    """
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


class Weighting:
    """The weights of a run, with what they remember.

    Args:
        rule: What decides them.

    Example:
        >>> weighting = Weighting(WeightRule(budget=0.1))
        >>> for step in range(2):
        ...     weighting.observe(torch.tensor(0.5), step)  # far above the budget: the multiplier falls
        >>> round(float(weighting.factor / _START), 4)
        0.9
    """

    def __init__(self, rule: WeightRule) -> None:
        self.rule = rule
        self._multiplier = torch.tensor(_START)
        self._divergence = torch.tensor(0.0)  # running mean over steps
        self._pending = torch.zeros(2)  # sum and count over the micro-batches of the step at hand
        self._left = torch.zeros(2)  # likewise, of the share of inner terms' work that is left
        self._step = -1
        self._norm = torch.tensor(0.0)  # running mean over micro-batches, not yet corrected for its start at zero
        self._norm_weight = 0.0
        self._smallest = torch.tensor(torch.inf)

    @property
    def factor(self) -> Tensor:
        """The multiplier under a budget, else the fixed ratio; 0-D."""
        return self._multiplier if self.rule.budget is not None else torch.tensor(self.rule.ratio)

    def spent(self) -> tuple[float, float] | None:
        """How far the benign side has moved of late, and the multiplier over its start; None without a budget.

        It waits for the device: not for every step.
        """
        if self.rule.budget is None:
            return None
        return float(self._divergence), float(self._multiplier) / _START

    def observe(self, divergence: Tensor, step: int) -> None:
        """Take note of how far the benign side has moved, and adapt the multiplier between steps.

        The multiplier of a step depends on the steps before it alone, so it is one for all its micro-batches. What is
        kept is of all processes, so that a run resumed from the first one's state goes on as it was.

        Args:
            divergence: 0-D, of one micro-batch.
            step: Steps done before this one.
        """
        self._to(divergence.device)
        if step != self._step:
            self._adapt()
            self._step = step
        if self.rule.budget is not None:
            mean = process_mean(divergence.detach().to(torch.promote_types(divergence.dtype, torch.float32)))
            self._pending = self._pending + torch.stack([mean, torch.ones_like(mean)])

    def _adapt(self) -> None:
        if self._step < 0 or self.rule.budget is None:
            return
        mean = self._pending[0] / self._pending[1]
        keep = self.rule.averaging if self._step > 0 else 0.0
        self._divergence = keep * self._divergence + (1 - keep) * mean
        # A loss may have fallen, which has no logarithm.
        part = (self._divergence / self.rule.budget).clamp_min(torch.finfo(self._divergence.dtype).eps)
        change = part.pow(-_POWER).clamp(_SMALLEST, _LARGEST)
        # Nothing is spent where there is nothing left to gain.
        left = torch.where(self._left[1] > 0, self._left[0] / self._left[1].clamp_min(1), 1)
        change = torch.where(change > 1, change.pow(left), change)
        self._multiplier = self._multiplier * change
        self._pending, self._left = torch.zeros_like(self._pending), torch.zeros_like(self._left)

    def benign_scale(self, norm: Tensor) -> Tensor:
        """The benign loss's gradient norm, averaged over steps and bounded.

        Args:
            norm: 0-D, of one micro-batch.

        Returns:
            0-D.
        """
        self._to(norm.device)
        keep = self.rule.averaging
        self._norm = keep * self._norm + (1 - keep) * norm.detach()
        self._norm_weight = keep * self._norm_weight + (1 - keep)
        mean = self._norm / self._norm_weight
        self._smallest = torch.minimum(self._smallest, mean)
        return torch.minimum(mean, self.rule.bound * self._smallest)

    def weigh(
        self,
        benign_loss: Tensor,
        terms: Terms,
        features: dict[str, Tensor | Hessian],
        benign_scale: Callable[[], Tensor],
        step: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch: benign loss plus weighted terms.

        Where inner terms tell how much is left of their work, each weight that is "auto" is multiplied by it: their
        own by their own, those of the benign side by the largest.

        Args:
            benign_loss: 0-D.
            terms: The objective's terms.
            features: For "benign" and "harmful" the batch's features, with respect to which gradients are measured, or
                their Hessian.
            benign_scale: Computes the unit of these gradients; called where a weight is "auto".
            step: Steps done before this one.

        Returns:
            The 0-D loss, and all terms and weights by the names they are logged under.
        """
        total = benign_loss
        logged: dict[str, Tensor] = {}
        scale: Tensor | None = None
        warmup = warmup_factor(step, self.rule.warmup_steps)
        left = _most_left(terms)
        if left is not None:
            self._left = self._left + torch.stack([left, torch.ones_like(left)]).to(self._left)
        for side, given, named in (
            ("benign", self.rule.benign, terms.benign),
            ("harmful", self.rule.harmful, terms.harmful),
        ):
            for name, term in named.items():
                if isinstance(given, str):
                    scale = benign_scale() if scale is None else scale
                    weight = balanced_weight(scale, gradient_norm(term, features[side]), self._factor_on(term))
                    weight = weight if left is None else left * weight
                else:
                    weight = self._given(given, term)
                weight = warmup * weight
                total = total + weight * term
                logged |= {name: term, f"{side}_weight": weight}
        for name, inner in terms.inner.items():
            given, term = self.rule.harmful, inner.value
            if isinstance(given, str):
                weight = balanced_weight(inner.scale, inner.gradient_norm, self._factor_on(term))
                weight = weight if inner.left is None else inner.left * weight
            else:
                weight = self._given(given, term)
            total = total + warmup * weight * term
            logged[name] = term
        if self.rule.budget is not None:
            logged["multiplier"] = self.factor
        return total, logged

    def _factor_on(self, term: Tensor) -> Tensor | float:
        # A number as it is: a tensor made of it would be copied to the device in every step.
        return self.factor.to(term.device) if self.rule.budget is not None else self.rule.ratio

    def _given(self, weight: float, term: Tensor) -> Tensor:
        number = term.detach().new_full((), weight)
        return number if self.rule.budget is None else number * self.factor.to(term.device)

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on exactly."""
        return {
            "multiplier": self._multiplier,
            "divergence": self._divergence,
            "pending": self._pending,
            "left": self._left,
            "norm": self._norm,
            "smallest": self._smallest,
            "counters": torch.tensor([self._step, self._norm_weight], dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        self._multiplier, self._divergence = state["multiplier"], state["divergence"]
        self._pending, self._norm, self._smallest = state["pending"], state["norm"], state["smallest"]
        self._left = state.get("left", torch.zeros_like(self._pending))
        step, self._norm_weight = state["counters"].tolist()
        self._step = int(step)

    def _to(self, device: torch.device) -> None:
        if self._multiplier.device != device:
            for name in ("_multiplier", "_divergence", "_pending", "_left", "_norm", "_smallest"):
                setattr(self, name, getattr(self, name).to(device))


def _most_left(terms: Terms) -> Tensor | None:
    """The largest share of work that is left of inner terms; None where one does not tell."""
    lefts = [inner.left for inner in terms.inner.values() if inner.left is not None]
    return torch.stack(lefts).max() if lefts and len(lefts) == len(terms.inner) else None
