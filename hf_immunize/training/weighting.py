"""How much each regularization term counts in addition to the benign loss.

The weight of a term R with features Z is the user's number, else the objective's own, else
``auto_weight_ratio · scale / ‖∂R/∂Z‖``: its gradient on the features then has the norm ``auto_weight_ratio · scale``
whatever the size of R. Scale is the norm of the benign loss's gradient. The features are the last tensor that all
terms share, so these norms cost no pass through the network.

With a budget, all weights are multiplied by the share of it that is not spent: a function of the step alone, which
cannot overshoot and has nothing to remember.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_immunize.errors import ArgumentError
from hf_immunize.spectra.hessian_functions import Hessian
from hf_immunize.training.objectives import Terms, gradient_norm


if TYPE_CHECKING:
    from hf_immunize.training.arguments import Method


# Share of the past in the running mean of the benign loss's gradient norm, and how many times its smallest it counts
# at most: a benign loss that rises because the weights are too large must not raise them further.
_AVERAGING, _BOUND = 0.9, 3.0


def balanced_weight(scale: Tensor, term_norm: Tensor, ratio: float) -> Tensor:
    """Weight under which a term's gradient on the features has the norm ``ratio · scale``; 0 where it has none."""
    return torch.where(term_norm > 0, ratio * scale / term_norm, torch.zeros_like(term_norm))


class Weighting:
    """The weights of a run, with what they remember, which is the same on all processes."""

    def __init__(self, method: Method, own: float | None = None) -> None:
        self.method = method
        self.own = own  # the objective's, for a side whose weight is "auto"
        self._norm = torch.tensor(0.0)  # running mean over micro-batches, not yet corrected for its start at zero
        self._norm_weight = torch.tensor(0.0)
        self._smallest = torch.tensor(torch.inf)

    def benign_scale(self, norm: Tensor) -> Tensor:
        """The benign loss's gradient norm, averaged over micro-batches and bounded."""
        self._to(norm.device)
        self._norm = _AVERAGING * self._norm + (1 - _AVERAGING) * norm.detach()
        self._norm_weight = _AVERAGING * self._norm_weight + (1 - _AVERAGING)
        mean = self._norm / self._norm_weight
        self._smallest = torch.minimum(self._smallest, mean)
        return torch.minimum(mean, _BOUND * self._smallest)

    def weigh(
        self,
        benign_loss: Tensor,
        terms: Terms,
        features: dict[str, Tensor | Hessian],
        benign_scale: Callable[[], Tensor],
        spent: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, and all terms and weights by the names they are logged under.

        ``benign_scale`` computes the unit of gradients on the features, and is called where norms decide; ``spent`` is
        the part of the budget that is.
        """
        left = None if spent is None else (1 - spent.detach()).clamp(0, 1)
        total, logged = benign_loss, dict[str, Tensor]()
        scale: Tensor | None = None
        for side, named in (("benign", terms.benign), ("harmful", terms.harmful), ("harmful", terms.inner)):
            for name, term in named.items():
                weight = self._fixed(side, term)
                if weight is None and named is terms.inner:
                    raise ArgumentError(
                        f"Expected a weight for {name}, which is inside the network, found none. Set `weight` on the "
                        "objective, or harmful_weight= as a number."
                    )
                if weight is None:
                    scale = benign_scale() if scale is None else scale
                    norm = gradient_norm(term, features[side])
                    weight = balanced_weight(scale, norm, self.method.auto_weight_ratio)
                weight = weight if left is None else left * weight
                total = total + weight * term
                logged |= {name: term, f"{side}_weight": weight}
        return total, logged

    def _fixed(self, side: str, term: Tensor) -> Tensor | None:
        """The user's number for a side, or the objective's own; None where norms of gradients decide."""
        given = getattr(self.method, f"{side}_weight")
        given = self.own if given == "auto" else given
        return None if given is None else term.detach().new_full((), float(given))

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on exactly."""
        return {name: getattr(self, f"_{name}") for name in _REMEMBERED}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        for name in _REMEMBERED:
            setattr(self, f"_{name}", state[name])

    def _to(self, device: torch.device) -> None:
        if self._norm.device != device:
            for name in _REMEMBERED:
                setattr(self, f"_{name}", getattr(self, f"_{name}").to(device))


_REMEMBERED = ("norm", "norm_weight", "smallest")
