"""What an objective gives: terms to be minimized, by what they look at."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class InnerTerm:
    """A term that looks at something inside the network instead of at the classifier's input.

    Attributes:
        value: 0-D, the same on every process.
        gradient_norm: Norm of its gradient on what it looks at, 0-D, detached.
        scale: The unit in which that norm is weighed, 0-D, detached.
        left: Share of its work that is left, between 0 and 1, 0-D, detached; None for all of it. Balanced by its norm,
            a term would push as hard for the last trifle as at the start, and a multiplier would rise for it until the
            budget is spent.
    """

    value: Tensor
    gradient_norm: Tensor
    scale: Tensor
    left: Tensor | None = None


@dataclass(frozen=True)
class Terms:
    """Regularization terms to be minimized, by the side whose features they look at.

    Attributes:
        benign: Name to 0-D tensor; weighted by ``benign_weight``.
        harmful: Name to 0-D tensor; weighted by ``harmful_weight``.
        inner: Name to a term of what harmful images are inside the network; weighted by ``harmful_weight`` too.
    """

    benign: dict[str, Tensor] = field(default_factory=dict)
    harmful: dict[str, Tensor] = field(default_factory=dict)
    inner: dict[str, InnerTerm] = field(default_factory=dict)
