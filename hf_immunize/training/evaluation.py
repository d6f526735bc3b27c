"""What one evaluation of the Trainer keeps and computes beside the loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import EvalPrediction

from hf_immunize.vision.measurement import Measurement


@dataclass
class Evaluation:
    """What one call of `ImmunizationTrainer.evaluate` has measured so far.

    Attributes:
        other_data: Whether the data are others than the constructor's, so that they are no reference.
        benign: The benign set at hand.
        harmful: The harmful set, measured once for several benign ones.
    """

    other_data: bool
    benign: Measurement | None = None
    harmful: Measurement | None = None


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
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}
