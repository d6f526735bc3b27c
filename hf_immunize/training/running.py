"""Means of what is logged, kept on the device until they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_immunize.errors import NonFiniteError
from hf_immunize.training.distributed import process_mean


class RunningMeans:
    """Means of named scalars since they were last taken, kept on the device until then.

    Fetching every term in every step would stall a GPU.

    Args:
        deferred: Whether values are looked at when they are taken, not when they are added; by default on every device
            but the CPU.

    Example:
        >>> means = RunningMeans()
        >>> for value in (1.0, 3.0):
        ...     means.update({"r_well": torch.tensor(value)}, step=1)
        >>> means.take(step=2)
        {'r_well': 2.0}
    """

    def __init__(self, deferred: bool | None = None) -> None:
        self._deferred = deferred
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._finite: dict[str, Tensor] = {}

    def update(self, values: dict[str, Tensor], step: int, finite: dict[str, Tensor] | None = None) -> None:
        """Add the scalars of one micro-batch.

        Args:
            values: Name to 0-D tensor.
            step: The step they belong to.
            finite: Side to whether the features of its images are finite, 0-D, to be named in the error.

        Raises:
            NonFiniteError: If one is NaN or infinite; where that is deferred, `take` raises it.
        """
        for side, whole in (finite or {}).items():
            self._finite[side] = self._finite[side] & whole if side in self._finite else whole
        for name, value in values.items():
            value = value.detach()
            deferred = value.device.type != "cpu" if self._deferred is None else self._deferred
            if not deferred:
                self._check_finite(name, float(value), step)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def take(self, step: int) -> dict[str, float]:
        """The means, over all processes as well, and start anew; a collective where there are several.

        Args:
            step: The last step they cover.

        Returns:
            Name to mean; empty where nothing was added.

        Raises:
            NonFiniteError: If one is NaN or infinite.
        """
        if not self._sums:
            return {}
        totals = process_mean(torch.stack(list(self._sums.values()))).tolist()
        means = {name: total / self._count for name, total in zip(self._sums, totals, strict=True)}
        for name, mean in means.items():
            self._check_finite(name, mean, step)
        self._sums, self._count, self._finite = {}, 0, {}
        return means

    def _check_finite(self, name: str, value: float, step: int) -> None:
        if math.isfinite(value):
            return
        lost = [side for side, whole in self._finite.items() if not bool(whole)]
        where = f", with features of the {' and '.join(lost)} images that are not finite" if lost else ""
        raise NonFiniteError(
            f"Expected a finite {name} at step {step}, found {value}{where}. Lower the learning rate or the weights, "
            "or train in full precision; the last checkpoint is sound. On a GPU a term that is undefined is NaN too: "
            "features that are all zero, and for R_ill samples that are all alike."
        )
