"""One attack: its name, what it may spend, what it is given, how it runs, and what it found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from hf_immunize.errors import NonFiniteError


T = TypeVar("T")


@dataclass(frozen=True)
class Attacker:
    """One attacker. Its module lists it in ``ATTACKERS``; presets, labels, tables and the report read that list."""

    name: str  # in commands and files
    label: str  # in reports
    access: Literal["head_input", "fine_tuning"]  # what it has: the features at the classifier's input, or the weights
    closed_form: bool  # takes no gradient steps, which ill-conditioning slows
    # (ProbeData, ProbeBudget, seed) for features, (model, Part, TuningBudget, seed) with head_module and chosen for
    # fine-tuning.
    run: Callable[..., Found]
    preset: str = "full"  # the smallest that runs it: "quick", "standard" or "full"
    where: str = ""  # what it trains, with access to the weights
    counts: Literal["steps", "images"] = "steps"  # what `Found.steps` are: labelled images of an attack on few of them
    restores: bool = False  # puts the public starting weights back: reads the reference's features
    applies: Callable[[Any], bool] = lambda model: True  # whether the model has what it attacks


@dataclass(frozen=True)
class Found:
    """What one attack found; `Outcome` has the meaning of the fields."""

    accuracy: float | None
    steps: list[int] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    trials: int = 1
    status: str = "done"
    note: str = ""


@dataclass(frozen=True)
class ProbeBudget:
    """What one probe may spend, tuning included."""

    descent_steps: int = 10_000  # of gradient descent with exact line search, each over all data
    iterations: int = 100  # a third as many of L-BFGS for each penalty
    steps: int = 300  # of optimizers on mini-batches; half as many for each learning rate tried
    batch_size: int = 128
    # Multiples of a natural learning rate on features scaled to a mean square of 1.
    rates: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)
    ridge_decades: int = 18  # below σ_max² that the strengths of ridge reach
    validation_fraction: float = 0.2  # of the training images, on which settings are chosen


@dataclass(frozen=True)
class TuningBudget:
    """What one fine-tuning attack may spend."""

    steps: int = 300
    trial_steps: int = 100  # of each setting tried
    batch_size: int = 32
    # To the learning rates tried.
    optimizers: dict[str, tuple[float, ...]] = field(default_factory=lambda: {"adamw": (3e-4,), "sgd": (1e-2,)})
    max_images: int = 5000
    max_test_images: int = 2000
    evaluations: int = 8  # along the way


def guarded(attack: Callable[[], Found]) -> Found:
    """Run an attack; if memory runs out or its decomposition fails, that is what it found."""
    try:
        return attack()
    except torch.linalg.LinAlgError as error:
        return Found(None, status="diverged", note=f"the decomposition failed: {str(error).splitlines()[0]}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        return Found(None, status="skipped", note=f"not enough memory: {str(error).partition(chr(10))[0]}")


# What it is given


class Spectrum(NamedTuple):
    """``Z = U diag(s) Vᵀ``, of ``(N, r)``, ``(r,)`` and ``(D, r)``, without the directions at rounding level."""

    U: Tensor
    s: Tensor
    V: Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """Rows to learn from and rows to measure on: features, or pixel values."""

    Z: Tensor  # (n, …)
    y: Tensor  # (n,)
    Z_test: Tensor  # (m, …)
    y_test: Tensor  # (m,)
    num_classes: int

    @cached_property
    def targets(self) -> Tensor:
        """One-hot labels of the rows to learn from, ``(n, C)``."""
        return torch.nn.functional.one_hot(self.y, self.num_classes).to(self.Z.dtype)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Decomposition of the rows to learn from."""
        return decompose(self.Z)

    def mapped(self, shift: Tensor | float, scale: Tensor | float) -> Part:
        """The same with ``(Z − shift)/scale`` on both sides."""
        return Part((self.Z - shift) / scale, self.y, (self.Z_test - shift) / scale, self.y_test, self.num_classes)

    def standardized(self) -> Part:
        """Every feature with mean 0 and variance 1 over the rows to learn from; constant features become 0."""
        mean, std = self.Z.mean(dim=0), self.Z.std(dim=0, unbiased=False)
        # Below this a feature is its own rounding.
        return self.mapped(mean, torch.where(std > 4 * torch.finfo(self.Z.dtype).eps * mean.abs(), std, torch.inf))

    def scaled(self) -> Part:
        """Divided by one number, such that the mean square is 1: the rate of the bias then fits the others."""
        size = float(self.Z.square().mean().sqrt())
        return self if size == 0 else self.mapped(0.0, size)


class ProbeData:
    """Features ``(N, D)`` and class numbers of one task at one layer of one model, and what attacks made of them."""

    def __init__(self, Z: Tensor, y: Tensor, Z_test: Tensor, y_test: Tensor, num_classes: int) -> None:
        for name, features in (("training", Z), ("test", Z_test)):
            if not bool(torch.isfinite(features).all()):
                raise NonFiniteError(
                    f"Expected finite {name} features, found NaN or infinity. Check the model's weights and precision."
                )
        self.Z, self.y, self.Z_test, self.y_test, self.num_classes = Z, y, Z_test, y_test, num_classes
        self._kept: dict[int | None, dict[Any, Any]] = {}

    def whole(self) -> Part:
        """All training rows, and the test rows."""

        def make() -> Part:
            return Part(self.Z.double(), self.y, self.Z_test.double(), self.y_test, self.num_classes)

        return self.keep(None, "whole", make)

    def tuning(self, seed: int, fraction: float, dtype: torch.dtype = torch.float64) -> Part:
        """The training rows divided by a seed: what settings are tried on."""

        def divide() -> Part:
            fit, validation = stratified_split(self.y, fraction, seed)
            Z, Z_test = self.Z[fit].to(dtype), self.Z[validation].to(dtype)
            return Part(Z, self.y[fit], Z_test, self.y[validation], self.num_classes)

        return self.keep(seed, ("tuning", fraction, dtype), divide)

    def keep(self, seed: int | None, key: Any, make: Callable[[], T]) -> T:
        """What was made under this key, else what `make` makes; things of one seed go when the next seed comes."""
        if seed not in self._kept:
            for other in [one for one in self._kept if None not in (one, seed)]:
                del self._kept[other]
        store = self._kept.setdefault(seed, {})
        if key not in store:
            store[key] = make()
        found: T = store[key]
        return found

    def forget(self) -> None:
        """Drop what was kept for later attacks."""
        self._kept.clear()


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows to choose settings on, class by class; a class of one row is fitted on."""
    generator = np.random.default_rng(seed)
    values = labels.cpu().numpy()
    validation = torch.zeros(len(values), dtype=torch.bool)
    for label in np.unique(values):
        rows = generator.permutation(np.flatnonzero(values == label))
        if len(rows) > 1:
            validation[rows[: max(1, min(len(rows) - 1, round(fraction * len(rows))))]] = True
    every = torch.arange(len(values))
    # Where no class has two rows, both parts are all rows.
    return (every[~validation], every[validation]) if validation.any() else (every, every)


def decompose(Z: Tensor) -> Spectrum:
    """Thin singular value decomposition, cut at ``eps·sqrt(max(N, D))·σ_max``: the rounding of its own arithmetic."""
    n, d = Z.shape
    if n < d:
        other = decompose(Z.mT)
        return Spectrum(other.V, other.s, other.U)
    if n > 1.25 * d:
        # Two to four times as fast as one decomposition of a long matrix.
        Q, R = torch.linalg.qr(Z)
        U, s, Vh = torch.linalg.svd(R, full_matrices=False)
        U = Q @ U
    else:
        U, s, Vh = torch.linalg.svd(Z, full_matrices=False)
    keep = s > torch.finfo(Z.dtype).eps * n**0.5 * (s[0] if len(s) else 0.0)
    return Spectrum(U[:, keep], s[keep], Vh[keep].mT.contiguous())


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy of scores ``(M, C)``; NaN among them counts as a miss."""
    hits = (scores.argmax(dim=1) == labels) & torch.isfinite(scores).all(dim=1)
    return float(hits.double().mean())


def log_steps(last: int, per_decade: int = 8) -> list[int]:
    """Whole numbers from 1 to `last`, evenly spaced in logarithm."""
    count = max(2, round(per_decade * np.log10(max(last, 1))) + 1)
    return sorted({round(step) for step in np.geomspace(1, last, count)})


def best_index(accuracies: list[float]) -> int:
    """The best of settings in order of strength; of ties, which are frequent on few images, the middle one."""
    tied = [index for index, value in enumerate(accuracies) if value == max(accuracies)]
    return tied[len(tied) // 2]
