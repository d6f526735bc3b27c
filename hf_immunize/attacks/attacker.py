"""All attackers on fixed features, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_immunize.attacks import descent as first_order
from hf_immunize.attacks import direct as nonlinear
from hf_immunize.attacks import direct as second_order
from hf_immunize.attacks import direct as softmax
from hf_immunize.attacks.presets import ProbeBudget
from hf_immunize.attacks.probe_data import Finding, ProbeData


Probe = Callable[[ProbeData, int, torch.dtype, ProbeBudget], Finding]

PROBES: dict[str, Probe] = {
    "ridge": second_order.ridge,
    "whitening": second_order.whitening,
    "lda": second_order.lda,
    "conjugate_gradient": second_order.conjugate_gradient,
    "gd_line_search": first_order.gd_line_search,
    "sgd": first_order.sgd,
    "momentum": first_order.momentum,
    "adam": first_order.adam,
    "adamw": first_order.adamw,
    "batchnorm_adamw": first_order.batchnorm_adamw,
    "lbfgs": softmax.lbfgs,
    "logistic_regression": softmax.logistic_regression,
    "knn": nonlinear.knn,
    "mlp": nonlinear.mlp,
}
