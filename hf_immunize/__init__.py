"""Immunize vision models of Hugging Face Transformers, and measure how far the immunization holds.

Public names load on first use: ``import hf_immunize`` alone imports neither transformers nor datasets.
"""

from importlib import import_module
from typing import Any

from hf_immunize.errors import named_extras


__version__ = "0.1.0"

# Module -> the public names that it defines.
_PUBLIC = {
    "spectra.conditioning": ("Conditioning", "condition_number", "feature_conditioning"),
    "spectra.streaming": ("FeatureFactor",),
    "spectra.hessian_functions": ("r_well", "r_ill", "hessian_r_well", "hessian_r_ill", "spectral_concentration"),
    "spectra.ratio": ("ImmunizationRatio", "relative_immunization_ratio"),
    "linear.algorithm": ("immunize_linear",),
    "linear.optimum": ("Ceiling", "rir_ceiling"),
    "linear.probe": ("probe_convergence",),
    "linear.time": ("ProbingTime", "fitted_fraction", "probing_time"),
    "vision.head": ("penultimate_features",),
    "data.sources": ("split_benign_harmful",),
    "data.views": ("Views",),
    "hub.record": ("ImmunizationRecord",),
    "hub.load": ("load_immunized",),
    "hub.verify": ("verify",),
    "training.arguments": ("ImmunizationArguments", "Method"),
    "training.immunize": ("immunize",),
    "training.trainer": ("ImmunizationTrainer",),
    "training.immunization_callback": ("ImmunizationCallback",),
    "training.step": ("ImmunizationStep",),
    "training.callbacks": ("BenignUtilityCallback", "TargetRIRCallback"),
    "training.spectrum_figure": ("SpectrumFigureCallback",),
    "audit.report": ("AuditReport",),
    "audit.run": ("audit",),
}
_HOMES = {name: f"hf_immunize.{module}" for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_immunize' has no attribute {name!r}")
    with named_extras():
        value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
