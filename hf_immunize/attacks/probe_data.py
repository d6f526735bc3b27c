"""Features under attack: the split on which an attacker tunes, and the decompositions that its probes share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from hf_immunize.errors import DataError, NonFiniteError


T = TypeVar("T")


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
        if len(Z) != len(y) or len(Z_test) != len(y_test) or len(Z) < 2 or len(Z_test) < 1:
            raise DataError(
                f"Expected one label per row, at least two training rows and a test row, found {len(Z)} rows with "
                f"{len(y)} labels, and {len(Z_test)} with {len(y_test)} to test on."
            )
        for name, features in (("training", Z), ("test", Z_test)):
            if not bool(torch.isfinite(features).all()):
                raise NonFiniteError(
                    f"Expected finite {name} features, found NaN or infinity. Check the model's weights and precision."
                )
        self.Z, self.y, self.Z_test, self.y_test, self.num_classes = Z, y, Z_test, y_test, num_classes
        self.dtype = torch.float64  # of all arithmetic on them
        self._kept: dict[int | None, dict[Any, Any]] = {}

    def at(self, dtype: torch.dtype) -> ProbeData:
        """The same data for arithmetic in another precision; what is kept is shared."""
        view = copy.copy(self)
        view.dtype = dtype
        return view

    def whole(self) -> Part:
        """All training rows, and the test rows."""

        def make() -> Part:
            return Part(self.Z.to(self.dtype), self.y, self.Z_test.to(self.dtype), self.y_test, self.num_classes)

        return self.keep(None, ("whole", self.dtype), make)

    def tuning(self, seed: int, fraction: float) -> Part:
        """The training rows divided by a seed: what settings are tried on."""

        def divide() -> Part:
            fit, validation = stratified_split(self.y, fraction, seed)
            Z, Z_test = self.Z[fit].to(self.dtype), self.Z[validation].to(self.dtype)
            return Part(Z, self.y[fit], Z_test, self.y[validation], self.num_classes)

        return self.keep(seed, ("tuning", fraction, self.dtype), divide)

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
    if n > d:
        # Three times as fast as one decomposition of a tall matrix.
        Q, R = torch.linalg.qr(Z)
        U, s, Vh = torch.linalg.svd(R, full_matrices=False)
        U = Q @ U
    else:
        U, s, Vh = torch.linalg.svd(Z, full_matrices=False)
    keep = s > torch.finfo(Z.dtype).eps * max(n, d) ** 0.5 * (s[0] if len(s) else 0.0)
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
