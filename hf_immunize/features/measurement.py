"""κ of data sets through a model, and RIR against what it was before training."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_immunize.errors import NonFiniteError
from hf_immunize.spectra.ratio import relative_immunization_ratio
from hf_immunize.spectra.streaming import FeatureFactor


@dataclass
class Measurement:
    """Features of one data set through one state of the model, as a QR factor, with a checksum of the images.

    The checksum tells whether two measurements are of the same images, whatever the weights, the order of the images,
    and the processes they were dealt out to.
    """

    factor: FeatureFactor = field(default_factory=FeatureFactor)
    checksum: float = 0.0

    def update(self, features: Tensor, pixel_values: Tensor, produced_dtype: torch.dtype | None = None) -> None:
        """Fold in a batch.

        Args:
            features: Shape ``(n, D)``.
            pixel_values: The images they came from, shape ``(n, C, H, W)``.
            produced_dtype: See `FeatureFactor.update`.
        """
        self.checksum += images_checksum(pixel_values)
        self.factor.update(features, produced_dtype)

    def merge(self, other: Measurement) -> None:
        """Take in the measurement of other images through the same weights, as of another process.

        Args:
            other: It is left as it is.
        """
        self.checksum += other.checksum
        self.factor.merge(other.factor)

    def same_data(self, other: Measurement) -> bool:
        """Whether both measurements are of the same images, in whatever order."""
        return self.factor.num_samples == other.factor.num_samples and math.isclose(
            self.checksum, other.checksum, rel_tol=1e-6
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that `from_state_dict` restores."""
        return {**self.factor.state_dict(), "checksum": torch.tensor(self.checksum, dtype=torch.float64)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> Measurement:
        """Restore a measurement from the tensors of `state_dict`."""
        return cls(FeatureFactor.from_state_dict(state), float(state["checksum"]))


@contextmanager
def of_side(name: str) -> Iterator[None]:
    """Within, an error about features that are not finite says whose images they are of.

    Args:
        name: What to call the images, such as "harmful".

    Raises:
        NonFiniteError: As raised within.
    """
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"Of the {name} images: {error}") from error


def images_checksum(pixel_values: Tensor) -> float:
    """A number by which to know images again: a sum over them, so that it does not depend on their order.

    Each adds ``e + e²``, with e its mean squared pixel, where the weight of pixels rises from 1 to 2 over the image so
    that a flipped one is another one, and the square so that the sum says more than the mean of all images together.

    Args:
        pixel_values: Shape ``(n, C, H, W)``.

    Returns:
        The sum; that of two sets of images is the sum of their checksums.

    Example:
        >>> images = torch.arange(24.0).reshape(2, 3, 2, 2)
        >>> images_checksum(images) == images_checksum(images[:1]) + images_checksum(images[1:])
        True
        >>> [images_checksum(images) == images_checksum(images.flip(dim)) for dim in (0, 3)]
        [True, False]
    """
    rows = pixel_values.detach().float().flatten(1)
    weights = 1 + torch.arange(rows.shape[1], dtype=rows.dtype, device=rows.device) / rows.shape[1]
    energies = (rows.square() * weights).mean(dim=1).cpu().double()
    return float((energies + energies.square()).sum())


def spectral_metrics(
    benign: Measurement,
    benign_reference: Measurement | None,
    harmful: Measurement | None,
    harmful_reference: Measurement | None,
) -> dict[str, float]:
    """Metrics of an evaluation, by stable names and without a prefix.

    ``benign_log10_kappa``, ``benign_is_bound`` (1.0 where rank was lost, so that κ is only bounded from below),
    ``benign_rank``, ``benign_effective_rank``, the same for ``harmful``, and against the references ``rir``,
    ``log10_rir``, ``harmful_ratio``, ``benign_ratio`` with ``rir_is_lower_bound`` and ``rir_is_upper_bound``
    (both 1.0: no statement, and ``rir`` is NaN).

    Args:
        benign: The benign set now.
        benign_reference: The same set through the starting weights, if known; ignored if it is of other data.
        harmful: The harmful set now, if there is one.
        harmful_reference: The same set through the starting weights, if known; ignored if it is of other data.

    Returns:
        Name to number.
    """
    metrics: dict[str, float] = {}
    conditionings = {}
    for side, now, before in (("benign", benign, benign_reference), ("harmful", harmful, harmful_reference)):
        if now is None:
            continue
        start = before.factor.conditioning() if before is not None and now.same_data(before) else None
        conditioning = now.factor.conditioning(start)
        metrics[f"{side}_log10_kappa"] = conditioning.log10_kappa
        metrics[f"{side}_is_bound"] = float(conditioning.is_bound)
        metrics[f"{side}_rank"] = float(conditioning.rank)
        metrics[f"{side}_effective_rank"] = conditioning.effective_rank
        conditionings[side] = (conditioning, start)
    if len(conditionings) == 2 and all(start is not None for _, start in conditionings.values()):
        (b, b0), (h, h0) = conditionings["benign"], conditionings["harmful"]
        ratio = relative_immunization_ratio(harmful=h, harmful_reference=h0, benign=b, benign_reference=b0)
        metrics |= {
            "rir": ratio.rir,
            "log10_rir": ratio.log10_rir,
            "harmful_ratio": ratio.harmful_ratio,
            "benign_ratio": ratio.benign_ratio,
            "rir_is_lower_bound": float(ratio.bound in ("lower", "undetermined")),
            "rir_is_upper_bound": float(ratio.bound in ("upper", "undetermined")),
        }
    return metrics


def save_measurements(path: str | os.PathLike[str], measurements: dict[str, Measurement]) -> None:
    """Write measurements by name, as safetensors.

    Args:
        path: File to write.
        measurements: Name to measurement.
    """
    tensors = {
        f"{name}/{key}": value.cpu()
        for name, measurement in measurements.items()
        for key, value in measurement.state_dict().items()
    }
    save_file(tensors, path)


def load_measurements(path: str | os.PathLike[str]) -> dict[str, Measurement]:
    """Read what `save_measurements` wrote.

    Args:
        path: File to read.

    Returns:
        Name to measurement.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, value in load_file(path).items():
        name, key = full_name.rsplit("/", 1)
        states.setdefault(name, {})[key] = value
    return {name: Measurement.from_state_dict(state) for name, state in states.items()}
