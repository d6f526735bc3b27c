"""The methods that the experiments compare, as arguments that differ from the library's defaults.

`default` is what a user gets who sets nothing: dead ReLUs where the trainable part has such a ReLU and the two sides
are separable, else concentration. `concentration` and `silence` are each of the two by name. `kappa`, `r_ill`,
`opt_kappa` and `imma` are the paper's objective and its three baselines with the paper's own recipe; `kappa_ours`, …
are the same objectives under ours, so that only the objective differs from `default`. `inner_ridge` and
`class_collapse` are under our recipe too; they were tried and are not in the library (see `trials.py`).
"""

from typing import Any

from examples.networks.trials import TRIALS


# Zheng et al. 2025 (arXiv:2505.23760): the task's own loss beside the regularizers, no budget, weights by gradient
# norm, SGD with momentum. Learning rate, schedule and the ratio of norms are not given there; these are ours.
PAPER: dict[str, Any] = {
    "benign_loss": "task",
    "benign_budget": None,
    "benign_weight": "auto",
    "harmful_weight": "auto",
    "auto_weight_ratio": 0.3,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    # What the paper has not, whatever the library's defaults come to be.
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "weight_warmup_steps": 0,
    "scale_free": False,
    "queue_size": 0,
}

BASELINES = ("kappa", "r_ill", "opt_kappa", "imma")

METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "concentration": {"objective": "concentration"},
    "silence": {"objective": "dead_relu"},  # what `dead_relu` was called when the committed rows were made
    **{name: {"objective": name, **PAPER} for name in BASELINES},
    **{f"{name}_ours": {"objective": name} for name in BASELINES},
    **{name: {"objective": name} for name in TRIALS},
}

# How the page calls them.
TITLES = {
    "default": "default",
    "concentration": "concentration",
    "silence": "rectifiers off",
    "kappa": "paper (κ)",
    "r_ill": "R_ill only",
    "opt_kappa": "Opt κ",
    "imma": "IMMA",
    **{
        f"{name}_ours": f"{title}, our recipe"
        for name, title in (("kappa", "κ"), ("r_ill", "R_ill only"), ("opt_kappa", "Opt κ"), ("imma", "IMMA"))
    },
    "inner_ridge": "inner ridge probe",
    "class_collapse": "between-class collapse",
}
