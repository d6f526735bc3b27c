"""What an audit measures beside its attacks: spectra, RIR, and what the released classifier is still good for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_immunize.audit.result import FeatureSpectrum, Utility
from hf_immunize.audit.statistics import paired_utility
from hf_immunize.audit.tasks import AttackedTask
from hf_immunize.data.columns import outputs_by_name
from hf_immunize.spectra.conditioning import Conditioning, feature_conditioning, singular_values
from hf_immunize.spectra.ratio import relative_immunization_ratio


if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FeatureMetrics:
    """Noted while features pass by; the reference has to come before the immunized model."""

    def __init__(self, warnings: list[str]) -> None:
        self.warnings = warnings
        self._conditioning: dict[tuple[str, str], Conditioning] = {}
        self._sigma: dict[tuple[str, str], list[float]] = {}
        self._hits: dict[str, Tensor] = {}

    def note_features(self, subject: str, task: str, features: Tensor, produced_dtype: torch.dtype) -> None:
        """Measure the spectrum of the classifier's input."""
        before = self._conditioning.get(("reference", task)) if subject == "immunized" else None
        if before is None and not features.any():
            self.warnings.append(
                f"All features of the {task} images through the {subject} model are zero: its κ is undefined."
            )
            return
        self._conditioning[subject, task] = feature_conditioning(
            features, reference=before, produced_dtype=produced_dtype
        )
        self._sigma[subject, task] = singular_values(features).tolist()

    def note_logits(self, model: PreTrainedModel, subject: str, task: AttackedTask, logits: Tensor) -> None:
        """Compare the released classifier's answers on benign test images with their labels."""
        self._hits[subject] = logits.argmax(dim=1) == expected_outputs(model, task, self.warnings)

    def spectra(self) -> list[FeatureSpectrum]:
        """One for each subject and task seen."""
        return [
            FeatureSpectrum(
                subject, task, self._sigma[subject, task], c.num_samples, c.rank, c.log10_kappa, c.is_bound
            )
            for (subject, task), c in self._conditioning.items()
        ]

    def ratio(self) -> dict[str, Any]:
        """RIR by the exact protocol and its parts; empty without benign data or without a reference."""
        needed = [(subject, task) for subject in ("immunized", "reference") for task in ("harmful", "benign")]
        if not all(pair in self._conditioning for pair in needed):
            return {}
        h, b, h0, b0 = (self._conditioning[pair] for pair in needed)
        ratio = relative_immunization_ratio(harmful=h, harmful_reference=h0, benign=b, benign_reference=b0)
        names = ("rir", "log10_rir", "harmful_ratio", "benign_ratio", "bound")
        return {name: getattr(ratio, name) for name in names}

    def utility(self) -> Utility | None:
        """Benign accuracy of the classifiers, or None without benign data."""
        if "immunized" not in self._hits:
            return None
        return paired_utility(self._hits["immunized"], self._hits.get("reference"))


def expected_outputs(model: PreTrainedModel, task: AttackedTask, warnings: list[str]) -> Tensor:
    """The output of the classifier that stands for each benign test image's label, by name where both have names."""
    names, labels = task.label_names, task.utility.labels
    outputs = outputs_by_name(names, model.config)
    if outputs is not None:
        return torch.tensor(outputs)[labels]
    sentence = "No benign class is named like one of the model's: label i is taken for output i."
    if names and sentence not in warnings:
        warnings.append(sentence)
    return labels
