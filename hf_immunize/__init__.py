"""Immunize vision models of Hugging Face Transformers, and measure how far the immunization holds.

Public names load on first use: ``import hf_immunize`` alone imports neither transformers nor datasets.
"""

from importlib import import_module
from typing import Any


__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOMES = {
    "Conditioning": "hf_immunize.spectra.conditioning",
    "condition_number": "hf_immunize.spectra.conditioning",
    "feature_conditioning": "hf_immunize.spectra.conditioning",
    "FeatureFactor": "hf_immunize.spectra.streaming",
    "r_well": "hf_immunize.spectra.regularizers",
    "r_ill": "hf_immunize.spectra.regularizers",
    "hessian_r_well": "hf_immunize.spectra.regularizers",
    "hessian_r_ill": "hf_immunize.spectra.regularizers",
    "spectral_concentration": "hf_immunize.spectra.regularizers",
    "ImmunizationRatio": "hf_immunize.spectra.ratio",
    "relative_immunization_ratio": "hf_immunize.spectra.ratio",
    "immunize_linear": "hf_immunize.linear.algorithm",
    "Ceiling": "hf_immunize.linear.optimum",
    "rir_ceiling": "hf_immunize.linear.optimum",
    "probe_convergence": "hf_immunize.linear.probe",
    "ProbingTime": "hf_immunize.linear.time",
    "fitted_fraction": "hf_immunize.linear.time",
    "probing_time": "hf_immunize.linear.time",
    "penultimate_features": "hf_immunize.vision.head",
    "split_benign_harmful": "hf_immunize.data.sources",
    "ImmunizationRecord": "hf_immunize.hub.record",
    "load_immunized": "hf_immunize.hub.load",
    "verify": "hf_immunize.hub.verify",
    "ImmunizationArguments": "hf_immunize.training.arguments",
    "ImmunizationTrainer": "hf_immunize.training.trainer",
    "ImmunizationCallback": "hf_immunize.training.immunization_callback",
    "ImmunizationStep": "hf_immunize.training.step",
    "Method": "hf_immunize.training.arguments",
    "BenignUtilityCallback": "hf_immunize.training.callbacks",
    "TargetRIRCallback": "hf_immunize.training.callbacks",
    "SpectrumFigureCallback": "hf_immunize.training.spectrum_figure",
    "AuditReport": "hf_immunize.audit.report",
    "audit": "hf_immunize.audit.run",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_immunize' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
