"""What one evaluation of the Trainer keeps and computes beside the loss.

Over several processes, each folds the images that it was dealt into a QR factor of its own, and the factors are merged
at the end: no features travel, and what is found does not depend on the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import EvalPrediction
from transformers.utils import logging

from hf_immunize.errors import NonFiniteError
from hf_immunize.features.extract import Measurement, run_batches, spectral_metrics
from hf_immunize.training.distributed import process_mean, world_size


logger = logging.get_logger(__name__)


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


@dataclass
class Evaluation:
    """What one call of `ImmunizationTrainer.evaluate` has measured so far.

    Attributes:
        other_data: Whether the data are others than the constructor's, so that they are no reference.
        prefix: Of the metrics, as the user asked for it; that of a set named x is ``{prefix}_x``.
        one: Name of the one set asked for, out of several.
        benign: The benign set at hand.
        harmful: The harmful set, measured once for several benign ones.
    """

    other_data: bool
    prefix: str = "eval"
    one: str | None = None
    benign: Measurement | None = None
    harmful: Measurement | None = None

    def name_of(self, prefix: str) -> str:
        """What the set with this prefix is called among the references, whatever prefix was asked for."""
        return f"{'eval' if self.one is None else f'eval_{self.one}'}{prefix.removeprefix(self.prefix)}"


class MeanLoss:
    """The mean of a loss over the images of all processes.

    The Trainer's own gives each image of a process's batch the mean of that batch, in which the repeats count that
    fill up the last one: what it finds depends on the number of processes and on the size of batches.

    Example:
        >>> mean = MeanLoss()
        >>> mean.add(torch.tensor(1.0), 3)
        >>> mean.add(torch.tensor(2.0), 1)
        >>> mean.value(torch.device("cpu"))
        1.25
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []  # on their device until they are needed
        self._counts: list[int] = []

    def add(self, loss: Tensor, images: int) -> None:
        """Take in a batch.

        Args:
            loss: 0-D, the mean over its images.
            images: How many there are.
        """
        self._losses.append(loss.detach())
        self._counts.append(images)

    def value(self, device: torch.device) -> float | None:
        """The mean; a collective where there are several processes.

        Args:
            device: Where the processes' communication happens.

        Returns:
            The same on every process; None where there was no loss.
        """
        if not self._losses:
            return None
        counts = torch.tensor(self._counts, dtype=torch.float64)
        parts = torch.stack([counts @ torch.stack(self._losses).cpu().double(), counts.sum()])
        # One process needs no device; not all of them have float64.
        total, images = (parts if world_size() == 1 else process_mean(parts.to(device))).tolist()
        return total / images


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 accuracy of logits, the default `compute_metrics`.

    Args:
        prediction: Logits of shape ``(N, C)``, alone or first of several outputs, and labels of shape ``(N,)``.

    Returns:
        ``{"accuracy": fraction between 0 and 1}``.

    Example:
        >>> accuracy(EvalPrediction(np.array([[1.0, 0.0], [0.2, 0.9]]), np.array([0, 0])))
        {'accuracy': 0.5}
    """
    predictions, labels = prediction.predictions, prediction.label_ids
    if isinstance(labels, list):  # of each batch by itself, with eval_do_concat_batches=False
        hits = [_hits(*batch) for batch in zip(predictions, labels, strict=True)]
        return {"accuracy": float(np.concatenate(hits).mean())}
    return {"accuracy": float(_hits(predictions, labels).mean())}


class RunningAccuracy:
    """Top-1 accuracy, batch by batch: the default `compute_metrics` with ``batch_eval_metrics=True``.

    Example:
        >>> running = RunningAccuracy()
        >>> _ = running(EvalPrediction(np.array([[1.0, 0.0]]), np.array([1])), compute_result=False)
        >>> running(EvalPrediction(np.array([[1.0, 0.0]]), np.array([0])), compute_result=True)
        {'accuracy': 0.5}
    """

    def __init__(self) -> None:
        self._hits: list[np.ndarray] = []

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Take in a batch.

        Args:
            prediction: As for `accuracy`, as arrays or tensors.
            compute_result: Whether it is the last one.

        Returns:
            The accuracy of all batches since the last result; nothing before the last one.
        """
        predictions = prediction.predictions
        logits = predictions[0] if isinstance(predictions, tuple) else predictions
        logits, labels = (torch.as_tensor(part).cpu() for part in (logits, prediction.label_ids))
        self._hits.append(_hits(logits.float().numpy(), labels.numpy()))
        if not compute_result:
            return {}
        hits, self._hits = np.concatenate(self._hits), []
        return {"accuracy": float(hits.mean())}


def _hits(predictions: Any, labels: np.ndarray) -> np.ndarray:
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    # With preprocess_logits_for_metrics they may be classes already.
    return (logits if np.ndim(logits) == 1 else np.argmax(logits, axis=-1)) == labels


def add_metrics(
    metrics: dict[str, float],
    prefix: str,
    benign: Measurement,
    harmful: Measurement | None,
    references: dict[str, Measurement],
    name: str | None = None,
) -> None:
    """Add the metrics of the spectra, and other names of loss and accuracy, to those of the Trainer.

    Args:
        metrics: With the prefix; is added to.
        prefix: Of all names.
        benign: Features of the benign set.
        harmful: Of the harmful set, if there is one.
        references: Features through the starting weights, by name of the set and "harmful".
        name: Of the benign set among the references; by default the prefix.
    """
    for metric in (f"{prefix}_loss", f"{prefix}_accuracy"):
        if metric in metrics:
            metrics[metric.replace(prefix, f"{prefix}_benign", 1)] = metrics[metric]
    found = spectral_metrics(benign, references.get(name or prefix), harmful, references.get("harmful"))
    metrics.update({f"{prefix}_{metric}": value for metric, value in found.items()})


def measure(
    model: nn.Module,
    head: nn.Module,
    loader: Iterable[Any],
    accelerator: Accelerator,
    *,
    forward: Callable[..., Any],
    prepare: Callable[[Any], Any],
    description: str,
    quiet: bool,
) -> Measurement:
    """Features of a data set through one state of a model; of all processes' images, the same on every process."""
    measurement = Measurement()
    batches = map(prepare, tqdm(loader, desc=description, disable=quiet, leave=False))
    for batch in run_batches(model, head, batches, forward=forward):
        fold(measurement, batch.features, batch.pixel_values, accelerator)
    return merged(measurement, accelerator.device)


def fold(measurement: Measurement, features: Tensor, pixel_values: Tensor, accelerator: Accelerator) -> None:
    """Fold in this process's batch, without the repeats with which accelerate fills up the last one.

    Args:
        measurement: Of this process.
        features: Shape ``(n, D)``.
        pixel_values: The images they came from, shape ``(n, C, H, W)``.
        accelerator: Knows how far its loader is.
    """
    count = own_images(len(features), accelerator)
    if count:
        measurement.update(features[:count].detach(), pixel_values[:count])


def is_filled_up(count: int, accelerator: Accelerator) -> bool:
    """Whether accelerate has filled up the batch at hand, of this or another process; the same on every process.

    Args:
        count: Rows of this process's batch.
        accelerator: Knows how far its loader is.

    Returns:
        Whether some of all processes' images are repeats.
    """
    if world_size() == 1 or not accelerator.gradient_state.end_of_dataloader:
        return False
    return 0 < accelerator.gradient_state.remainder < world_size() * count


def own_images(count: int, accelerator: Accelerator) -> int:
    """How many images of a process's batch at hand are its own, without the repeats that fill up the last one.

    Args:
        count: Rows of this process's batch.
        accelerator: Knows how far its loader is.

    Returns:
        Between 0 and `count`.
    """
    if world_size() == 1 or not accelerator.gradient_state.end_of_dataloader:
        return count
    remainder = accelerator.gradient_state.remainder
    if remainder < 0:
        logger.warning_once(
            "Expected an evaluation set of known length, found a stream: the images with which its last batch is "
            "filled up count twice. Store the set, or leave dispatch_batches in accelerator_config alone."
        )
    return own_rows(count, dist.get_rank(), remainder)


def own_rows(count: int, rank: int, remainder: int) -> int:
    """How many rows of a process's last batch are images of their own, the rest being repeats from the beginning.

    Accelerate deals the last batches to processes in their order, all of one size, and fills up from the beginning.

    Args:
        count: Rows of this process's batch, the same on every process.
        rank: Its number.
        remainder: Images left for the last batch of all processes together; 0 where it was full, below 0 where that is
            not known.

    Returns:
        Between 0 and `count`.

    Example:
        >>> [own_rows(4, rank, remainder=5) for rank in range(3)]  # the last 5 images of 17, over three processes
        [4, 1, 0]
        >>> own_rows(4, rank=2, remainder=0)
        4
    """
    return count if remainder <= 0 else min(max(remainder - rank * count, 0), count)


def merged(measurement: Measurement, device: torch.device) -> Measurement:
    """The measurement of all processes' images, merged in the order of ranks on each of them.

    Args:
        measurement: Of this process's images; maybe of none.
        device: Where the processes' communication happens.

    Returns:
        The same on every process; the argument itself on one.
    """
    if world_size() == 1:
        return measurement
    total = Measurement()
    for rank in range(world_size()):
        total.merge(_from_process(measurement, rank, device))
    return total


def _from_process(measurement: Measurement, rank: int, device: torch.device) -> Measurement:
    mine = rank == dist.get_rank()
    state = measurement.state_dict() if mine and measurement.factor.num_samples else {}
    described = [{name: (tuple(value.shape), value.dtype) for name, value in state.items()}]
    broadcast_object_list(described, from_process=rank)
    received = {}
    for name, (shape, dtype) in described[0].items():
        received[name] = state[name].to(device) if mine else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(received[name], src=rank)
    return Measurement.from_state_dict(received) if received else Measurement()
