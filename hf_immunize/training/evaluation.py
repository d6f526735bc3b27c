"""What one evaluation of the Trainer computes in addition to the loss: means, accuracy, features of all images.

Over several processes, each folds the images that it was dealt into a QR factor of its own, and the factors are merged
at the end: what is found does not depend on the number of processes, and no features travel but those of images that
have no class, whose probing time is compared image by image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from transformers import EvalPrediction
from transformers.utils import logging

from hf_immunize.features.extract import BY_IMAGE, Measurement
from hf_immunize.training.distributed import process_mean, world_size


logger = logging.get_logger(__name__)


@dataclass
class Evaluation:
    """What one call of `ImmunizationTrainer.evaluate` has measured so far."""

    other_data: bool  # than the constructor's, so that they are no reference
    prefix: str = "eval"
    one: str | None = None  # of several sets, by its name
    benign: Measurement | None = None
    harmful: Measurement | None = None  # once for several benign sets

    def name_of(self, prefix: str) -> str:
        """What the set with this prefix is called among the references, whatever prefix was asked for."""
        return f"{'eval' if self.one is None else f'eval_{self.one}'}{prefix.removeprefix(self.prefix)}"


class MeanLoss:
    """The mean of a loss over the images of all processes; the Trainer's own counts repeats that fill up a batch."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, int]] = []  # losses stay on their device until they are needed

    def add(self, loss: Tensor, images: int) -> None:
        """Add the mean loss of a batch."""
        self._batches.append((loss.detach(), images))

    def value(self, device: torch.device) -> float | None:
        """The mean; a collective where there are several processes."""
        if not self._batches:
            return None
        losses, counts = zip(*self._batches, strict=True)
        weights = torch.tensor(counts, dtype=torch.float64)
        parts = torch.stack([weights @ torch.stack(losses).cpu().double(), weights.sum()])
        # One process needs no device; not all of them have float64.
        total, images = (parts if world_size() == 1 else process_mean(parts.to(device))).tolist()
        return total / images


class Accuracy:
    """Top-1 accuracy of logits, the default `compute_metrics`; with ``batch_eval_metrics=True``, batch by batch."""

    def __init__(self) -> None:
        self._hits: list[Tensor] = []

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """The accuracy of all that was added since the last result, where one is asked for."""
        predictions, labels = prediction.predictions, prediction.label_ids
        # Lists are of each batch by itself, with eval_do_concat_batches=False.
        batches = zip(predictions, labels, strict=True) if isinstance(labels, list) else [(predictions, labels)]
        for outputs, targets in batches:
            logits = torch.as_tensor(outputs[0] if isinstance(outputs, tuple) else outputs).cpu()
            # With preprocess_logits_for_metrics they may be classes already.
            classes = logits if logits.ndim == 1 else logits.argmax(-1)
            self._hits.append((classes == torch.as_tensor(targets).cpu()).double())
        if not compute_result:
            return {}
        hits, self._hits = torch.cat(self._hits), []
        return {"accuracy": float(hits.mean())}


def fold(measurement: Measurement, batch: tuple[Any, ...], accelerator: Accelerator) -> None:
    """Fold in this process's features, pixel values, labels and logits, without repeats that fill up a batch."""
    count = own_images(len(batch[0]), accelerator)
    if count:
        measurement.update(*(part[:count] if isinstance(part, Tensor) else None for part in batch))  # type: ignore[arg-type]


def is_filled_up(count: int, accelerator: Accelerator) -> bool:
    """Whether accelerate has filled up the batch at hand, of this or another process; the same on every process."""
    if world_size() == 1 or not accelerator.gradient_state.end_of_dataloader:
        return False
    return 0 < accelerator.gradient_state.remainder < world_size() * count


def own_images(count: int, accelerator: Accelerator) -> int:
    """How many images of a process's batch at hand are its own, without the repeats that fill up the last one."""
    if world_size() == 1 or not accelerator.gradient_state.end_of_dataloader:
        return count
    remainder = accelerator.gradient_state.remainder
    if remainder < 0:
        logger.warning_once(
            "Expected an evaluation set of known length, found a stream: the images with which its last batch is "
            "filled up count twice. Store the set, or leave dispatch_batches in accelerator_config alone."
        )
    # accelerate deals in the order of ranks, and then repeats.
    return count if remainder <= 0 else min(max(remainder - dist.get_rank() * count, 0), count)


def merged(measurement: Measurement, device: torch.device) -> Measurement:
    """The measurement of all processes' images, merged in the order of ranks on each of them."""
    if world_size() == 1:
        return measurement
    own = measurement.state_dict() if measurement.factor.num_samples else {}
    states: list[Any] = [None] * world_size()
    dist.all_gather_object(states, {name: value.cpu() for name, value in own.items()})
    total = Measurement()
    for state in filter(None, states):
        on_device = {name: value.to(device) for name, value in state.items() if name not in BY_IMAGE}
        total.merge(Measurement.from_state_dict({**state, **on_device}))
    return total
