"""What one evaluation of the Trainer keeps and computes beside the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from hf_immunize.vision.measurement import Measurement


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
