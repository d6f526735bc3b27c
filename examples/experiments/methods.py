"""The methods that the experiments compare, as arguments that differ from the library's defaults.

`default` is what a user gets who sets nothing; `concentration` and `dead_relu` are other objectives by name. `kappa`,
`r_ill`, `opt_kappa` and `imma` are the paper's objective and its three baselines with the paper's own recipe;
`kappa_ours`, … are the same objectives under ours, so that only the objective differs from `default`.

To add one: its arguments, its title and its colour here; an objective that is not in the library goes into
`hf_immunize.training.objectives.OBJECTIVES` first.
"""

from typing import Any


# Zheng et al. 2025 (arXiv:2505.23760): the task's own loss beside the regularizers, no budget, weights by gradient
# norm, SGD with momentum. Learning rate, schedule and the ratio of norms are not given there; these are ours.
PAPER: dict[str, Any] = {
    "benign_loss": "task",
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
    "scale_free": False,
}

# Of the paper: name to what the page calls it under the paper's recipe, and under ours.
BASELINES = {
    "kappa": ("paper (κ)", "κ"),
    "r_ill": ("R_ill only", "R_ill only"),
    "opt_kappa": ("Opt κ", "Opt κ"),
    "imma": ("IMMA", "IMMA"),
}

METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "concentration": {"objective": "concentration"},
    "dead_relu": {"objective": "dead_relu"},
    **{name: {"objective": name, **PAPER} for name in BASELINES},
    **{f"{name}_ours": {"objective": name} for name in BASELINES},
}

TITLES = {
    "default": "default",
    "concentration": "concentration",
    "dead_relu": "dead ReLU",
    **{name: title for name, (title, _) in BASELINES.items()},
    **{f"{name}_ours": f"{title}, our recipe" for name, (_, title) in BASELINES.items()},
}

# Of a figure's points; Okabe and Ito's palette, which colour-blind readers distinguish too. Two recipes share one.
COLOURS = {"default": "#000000", "concentration": "#E69F00", "dead_relu": "#F0E442"}
COLOURS |= {"kappa": "#D55E00", "r_ill": "#0072B2", "opt_kappa": "#009E73", "imma": "#CC79A7"}
