"""The constants of Algorithm 1 and its baselines."""

from dataclasses import dataclass

import torch

from hf_immunize.errors import ArgumentError


@dataclass(frozen=True)
class LinearSettings:
    """Constants of the iterative methods; the defaults are those of the paper's house-price experiment.

    Attributes:
        epochs: Passes over the data.
        lr: η of θ and of the classifier ω. Under ``step="rule"`` of the task loss alone, and no larger than one over
            its curvature.
        batch_size: Rows of each task in a step; None for all of them.
        step: ``"fixed"``: η times the weighted gradients, as in the paper. ``"rule"`` (``kappa`` and ``r_ill``): the
            largest step of R_well that provably lowers κ(H_P), then a step of R_ill that provably raises κ(H_H), both
            for the rows of the step; then θ is rescaled so that the benign features keep their size.
        share: Under ``"rule"``, the part of what R_well gained in log κ(H_P) that R_ill may spend, below 1. A step of
            R_ill that raises κ(H_H) by a factor raises κ(H_P) by no more than it, so κ(H_P) falls in every pair.
        growth: Under ``"rule"``, the largest factor by which a step raises κ(H_H); with ``r_ill`` every step does.
        benign_weight: λ_P under ``"fixed"``; ``"balanced"`` scales its gradient to the norm of the task loss's.
        harmful_weight: λ_H, likewise.
        theta_init: ``"identity"``, ``"random"`` (normal, variance 1/D) or a ``(D, D)`` tensor.
        inner_steps: Steps of the simulated attacker of ``imma``.
        record_every: Epochs between records of the history, each of which takes two decompositions; 0 for the first
            and last alone.
        seed: Of ω, of a random θ and of the order of the batches.
    """

    epochs: int = 100
    lr: float = 0.005
    batch_size: int | None = None
    step: str = "fixed"
    share: float = 0.6
    growth: float = 1.2
    benign_weight: float | str = "balanced"
    harmful_weight: float | str = "balanced"
    theta_init: str | torch.Tensor = "identity"
    inner_steps: int = 5
    record_every: int = 1
    seed: int = 0

    def check(self, method: str) -> None:
        """Refuse impossible values.

        Raises:
            ArgumentError: Names the option, what it may be and what it is.
        """
        numbers = [
            ("epochs", self.epochs >= 1, "at least 1"),
            ("lr", self.lr > 0, "positive"),
            ("batch_size", self.batch_size is None or self.batch_size >= 2, "at least 2, or None for all rows"),
            ("share", 0 <= self.share < 1, "from 0 to below 1"),
            ("growth", self.growth > 1, "above 1"),
            ("inner_steps", self.inner_steps >= 1, "at least 1"),
            ("record_every", self.record_every >= 0, "at least 0"),
        ]
        for name, fine, wanted in numbers:
            if not fine:
                raise ArgumentError(f"{name} must be {wanted}, found {getattr(self, name)!r}.")
        if self.step not in ("fixed", "rule"):
            raise ArgumentError(f"step must be 'fixed' or 'rule', found {self.step!r}.")
        if self.step == "rule" and method not in ("kappa", "r_ill"):
            raise ArgumentError(f"step='rule' is proved for methods 'kappa' and 'r_ill' alone, found {method!r}.")
        for name in ("benign_weight", "harmful_weight"):
            weight = getattr(self, name)
            if weight != "balanced" and (isinstance(weight, str) or not weight >= 0):
                raise ArgumentError(f"{name} must be 'balanced' or a number of at least 0, found {weight!r}.")
