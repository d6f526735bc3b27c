"""Features under attack: the split an attacker tunes on, and the decompositions that its probes share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from hf_immunize.errors import DataError, NonFiniteError


T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """What one attack found; `Outcome` has the meaning of the fields.

    `validation` is the accuracy by which the settings were chosen, where it is known.
    """

    accuracy: float | None
    steps: list[int] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    trials: int = 1
    status: str = "done"
    note: str = ""
    validation: float | None = None


class Spectrum(NamedTuple):
    """``Z = U diag(s) Vᵀ`` with the directions at rounding level left out."""

    U: Tensor  # (N, r)
    s: Tensor  # (r,)
    V: Tensor  # (D, r)


class Part(NamedTuple):
    """Rows to learn from and rows to measure on."""

    Z: Tensor  # (n, D)
    y: Tensor  # (n,)
    Z_test: Tensor  # (m, D)
    y_test: Tensor  # (m,)


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows to choose settings on, class by class.

    A class of one image is fitted on. Where no class has two, both parts are all rows.

    Args:
        labels: Class numbers, ``(N,)``.
        fraction: Part of each class to choose settings on, rounded, at least one of two or more.
        seed: Seed of the draw.

    Returns:
        Indices of both parts, in ascending order.

    Example:
        >>> fit, validation = stratified_split(torch.tensor([0, 0, 0, 0, 0, 1]), 0.2, seed=0)
        >>> len(fit), len(validation), 5 in fit
        (5, 1, True)
    """
    generator = np.random.default_rng(seed)
    values = labels.cpu().numpy()
    held = np.zeros(len(values), dtype=bool)
    for label in np.unique(values):
        rows = generator.permutation(np.flatnonzero(values == label))
        if len(rows) > 1:
            held[rows[: max(1, min(len(rows) - 1, round(fraction * len(rows))))]] = True
    everything = torch.arange(len(values))
    if not held.any():
        return everything, everything
    mask = torch.from_numpy(held)
    return everything[~mask], everything[mask]


class ProbeData:
    """Features and labels of one task at one layer of one model.

    Args:
        Z: Training features, ``(N, D)``.
        y: Their class numbers, ``(N,)``.
        Z_test: Test features, ``(M, D)``.
        y_test: Their class numbers, ``(M,)``.
        num_classes: Number of classes.

    Raises:
        DataError: If sizes do not fit.
        NonFiniteError: If a feature is NaN or infinite.

    Example:
        >>> data = ProbeData(torch.randn(6, 2), torch.tensor([0, 1] * 3), torch.randn(2, 2), torch.tensor([0, 1]), 2)
        >>> [tuple(part.shape) for part in data.tuning(0, 0.34, torch.float64)]
        [(4, 2), (4,), (2, 2), (2,)]
    """

    def __init__(self, Z: Tensor, y: Tensor, Z_test: Tensor, y_test: Tensor, num_classes: int) -> None:
        if len(Z) != len(y) or len(Z_test) != len(y_test) or len(Z) < 2 or len(Z_test) < 1:
            raise DataError(
                f"Expected one label a row, at least two training rows and a test row, found {len(Z)} rows with "
                f"{len(y)} labels, and {len(Z_test)} with {len(y_test)} to test on."
            )
        for name, features in (("training", Z), ("test", Z_test)):
            if not bool(torch.isfinite(features).all()):
                raise NonFiniteError(
                    f"Expected finite {name} features, found NaN or infinity. Check the model's weights and precision."
                )
        self.Z, self.y, self.Z_test, self.y_test, self.num_classes = Z, y, Z_test, y_test, num_classes
        self._kept: dict[Any, Any] = {}
        self._seed: int | None = None
        self._kept_of_seed: dict[Any, Any] = {}

    def whole(self, dtype: torch.dtype) -> Part:
        """All training rows, and the test rows."""
        return self.keep(
            None, ("whole", dtype), lambda: Part(self.Z.to(dtype), self.y, self.Z_test.to(dtype), self.y_test)
        )

    def tuning(self, seed: int, fraction: float, dtype: torch.dtype) -> Part:
        """The training rows divided by a seed: what settings are tried on."""

        def divide() -> Part:
            fit, validation = stratified_split(self.y, fraction, seed)
            return Part(self.Z[fit].to(dtype), self.y[fit], self.Z[validation].to(dtype), self.y[validation])

        return self.keep(seed, ("tuning", fraction, dtype), divide)

    def spectrum(self, part: Part, seed: int | None, dtype: torch.dtype) -> Spectrum:
        """Singular value decomposition of a part's training rows, computed once.

        Args:
            part: What `whole` or `tuning` returned.
            seed: The seed of `tuning`; None for `whole`.
            dtype: Precision of the computation.

        Returns:
            The decomposition.
        """
        return self.keep(seed, ("spectrum", dtype), lambda: decompose(part.Z))

    def keep(self, seed: int | None, key: Any, make: Callable[[], T]) -> T:
        """What was made before under this key, else what `make` makes.

        Args:
            seed: Whose draw it depends on; things of one seed are dropped when the next one comes. None: of none.
            key: Anything hashable.
            make: Called when there is none yet.

        Returns:
            The thing.
        """
        store = self._kept
        if seed is not None:
            if seed != self._seed:
                self._seed, self._kept_of_seed = seed, {}
            store = self._kept_of_seed
        if key not in store:
            store[key] = make()
        found: T = store[key]
        return found

    def forget(self) -> None:
        """Drop what was kept for later attacks."""
        self._kept, self._kept_of_seed, self._seed = {}, {}, None


def decompose(Z: Tensor) -> Spectrum:
    """Thin singular value decomposition, without the directions below the rounding of the arithmetic itself.

    An attacker keeps directions as small as his arithmetic can tell: the cut is at ``eps·sqrt(max(N, D))·σ_max`` of
    the precision computed in, not at the noise of the features.

    Args:
        Z: Features, ``(N, D)``.

    Returns:
        ``U``, ``s``, ``V``; of rank 0 where all features are zero.

    Example:
        >>> decompose(torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 1.0]])).s
        tensor([3., 1.])
    """
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


def one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """One-hot rows, ``(N, C)``."""
    return torch.nn.functional.one_hot(labels, num_classes).to(dtype)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy of scores ``(M, C)``; not a number among them counts as a miss."""
    hits = (scores.argmax(dim=1) == labels) & torch.isfinite(scores).all(dim=1)
    return float(hits.double().mean())


def log_steps(last: int, per_decade: int = 8) -> list[int]:
    """Whole numbers from 1 to `last`, evenly spaced in logarithm.

    Example:
        >>> log_steps(100, per_decade=3)
        [1, 2, 5, 10, 22, 46, 100]
    """
    count = max(2, round(per_decade * np.log10(max(last, 1))) + 1)
    return sorted({round(step) for step in np.geomspace(1, last, count)})


def best_index(accuracies: list[float]) -> int:
    """The best of settings in order of strength; of ties, which are frequent on few images, the middle one.

    Example:
        >>> best_index([0.1, 0.5, 0.5, 0.5, 0.2])
        2
    """
    top = max(accuracies)
    tied = [index for index, value in enumerate(accuracies) if value == top]
    return tied[len(tied) // 2]


def guarded(attack: Callable[[], Finding]) -> Finding:
    """Run an attack whose failure, for want of memory or of an algorithm that converges, is a finding.

    Args:
        attack: The attack.

    Returns:
        What it found; "skipped" or "diverged" where it failed so. Other errors are raised.

    Example:
        >>> def attack():
        ...     raise MemoryError("12 GiB")
        >>> guarded(attack).status, guarded(attack).note
        ('skipped', 'not enough memory: 12 GiB')
    """
    try:
        return attack()
    except MemoryError as error:
        return Finding(None, status="skipped", note=f"not enough memory: {error}")
    except torch.linalg.LinAlgError as error:
        return Finding(None, status="diverged", note=f"the decomposition failed: {str(error).splitlines()[0]}")
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        return Finding(None, status="skipped", note=f"not enough memory: {str(error).splitlines()[0]}")
