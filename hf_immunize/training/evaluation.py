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
        prefix: Of the metrics, as the user asked for it; that of a set named x is ``{prefix}_x``.
    """

    other_data: bool
    benign: Measurement | None = None
    harmful: Measurement | None = None
    prefix: str = "eval"


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    def name_of(self, prefix: str) -> str:
        """What the set with this prefix is called among the references, whatever prefix was asked for."""
        return f"eval{prefix.removeprefix(self.prefix)}"

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
