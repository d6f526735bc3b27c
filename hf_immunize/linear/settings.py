"""The constants of Algorithm 1 and its baselines."""

from dataclasses import dataclass

import torch

from hf_immunize.errors import ArgumentError
from hf_immunize.spectra.checks import check_count, check_number


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
        check_count(self.epochs, "epochs")
        check_number(self.lr, "lr", 0)
        if self.batch_size is not None:
            check_count(self.batch_size, "batch_size", least=2)
        check_number(self.share, "share", 0, 1)
        check_number(self.growth, "growth", 1)
        check_count(self.inner_steps, "inner_steps")
        check_count(self.record_every, "record_every", least=0)
        check_count(self.seed, "seed", least=-(2**63), most=2**63 - 1)
        for name, fine, wanted in (
            ("lr", self.lr > 0, "above 0"),
            ("share", self.share < 1, "below 1"),
            ("growth", self.growth > 1, "above 1"),
        ):
            if not fine:
                raise ArgumentError(f"{name} must be {wanted}, found {getattr(self, name)!r}.")
        if self.step not in ("fixed", "rule"):
            raise ArgumentError(f"step must be 'fixed' or 'rule', found {self.step!r}.")
        if self.step == "rule" and method not in ("kappa", "r_ill"):
            raise ArgumentError(f"step='rule' is proved for methods 'kappa' and 'r_ill' alone, found {method!r}.")
        for name in ("benign_weight", "harmful_weight"):
            weight = getattr(self, name)
            if not (isinstance(weight, str) and weight == "balanced"):
                check_number(weight, f"{name}, unless 'balanced',", 0)
