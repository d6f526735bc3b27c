"""The methods that the experiments compare, as arguments that differ from the library's defaults.

`default` is what a user gets who sets nothing; `concentration` and `dead_relu` are its two choices by name. `kappa`,
`r_ill`, `opt_kappa` and `imma` are the paper's objective and its three baselines with the paper's own recipe;
`kappa_ours`, … are the same objectives under ours, so that only the objective differs from `default`. `inner_ridge`
and `class_collapse` are under our recipe too; they are not in the library: `known` adds them for the time of a run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_immunize.errors import DataError
from hf_immunize.spectra.hessian_functions import Hessian
from hf_immunize.spectra.regularizers import spectral_concentration
from hf_immunize.training.objectives import OBJECTIVES, Objective, Side, Terms


# Where no class mean differs from another, the logarithm stays finite.
_FLOOR = 1e-12


class InnerRidge(Objective):
    """A closed-form ridge probe of half of the harmful batch shall read the other half badly."""

    needs_harmful_labels = True

    def __call__(self, benign: Side, harmful: Side) -> Terms:
        """Terms ``spread`` (benign) and ``readable`` (harmful, between 0 and 1; differentiated through the solve)."""
        spread = -spectral_concentration(benign.features)
        return Terms(benign={"spread": spread}, harmful={"readable": ridge_resistance(*_labelled(harmful))})


def ridge_resistance(features: Tensor, labels: Tensor) -> Tensor:
    """How well kernel ridge on half of the rows reads the other half: 0 (nothing) to 1 (all); differentiable.

    Each row's squared error counts up to that of the mean label, so that nothing is gained by errors beyond chance.
    """
    rows = features.double() / features.double().square().mean().sqrt().clamp_min(1e-30)
    targets = F.one_hot(labels, int(labels.max()) + 1).double()
    half = len(rows) // 2
    mean, center = targets[:half].mean(0), rows[:half].mean(0)
    fit, test = rows[:half] - center, rows[half:] - center
    kernel = fit @ fit.mT
    chance = (targets[half:] - mean).square().sum(1)
    errors = []
    for strength in (1e-4, 1e-2):  # the better one for the probe counts
        ridge = strength * kernel.diagonal().mean().clamp_min(1e-12)
        solved = torch.linalg.solve(kernel + ridge * torch.eye(half, dtype=rows.dtype), targets[:half] - mean)
        error = (targets[half:] - mean - test @ fit.mT @ solved).square().sum(1)
        errors.append(torch.minimum(error, chance).sum() / chance.sum())
    return (1 - torch.stack(errors).min()).to(features.dtype)


class ClassCollapse(Objective):
    """Harmful classes onto one mean: ``log(tr S_between / tr S_within)`` of the batch.

    Example:
        >>> rows, labels = torch.tensor([[1.0], [3.0], [-1.0], [-3.0]]), torch.tensor([0, 0, 1, 1])
        >>> term = ClassCollapse()(Side(torch.eye(2)), Side(rows, labels=labels)).harmful["between_classes"]
        >>> round(term.exp().item(), 4)  # means 2 and -2; all are 1 away from theirs
        4.0
    """

    needs_harmful_labels = True

    def __call__(self, benign: Side, harmful: Side) -> Terms:
        """Terms ``spread`` (benign) and ``between_classes`` (harmful)."""
        features, labels = _labelled(harmful)
        rows = features.to(torch.promote_types(features.dtype, torch.float32))
        present, classes = torch.unique(labels, return_inverse=True)
        members = F.one_hot(classes, len(present)).to(rows.dtype)
        means = (members.mT @ rows / members.sum(0).unsqueeze(1))[classes]
        between, within = (means - rows.mean(0)).square().sum(), (rows - means).square().sum()
        # Classes of a single image in the batch are all mean; where all are, nothing is within.
        ratio = between / within.clamp_min(_FLOOR * rows.detach().square().sum().clamp_min(_FLOOR))
        spread = -spectral_concentration(benign.features)
        return Terms(benign={"spread": spread}, harmful={"between_classes": torch.log(ratio + _FLOOR)})


TRIALS: dict[str, type[Objective]] = {"inner_ridge": InnerRidge, "class_collapse": ClassCollapse}


@contextmanager
def known() -> Iterator[None]:
    """Let the library know the trials' names, as it would know those of a user's own fork."""
    OBJECTIVES.update(TRIALS)
    try:
        yield
    finally:
        for name in TRIALS:
            OBJECTIVES.pop(name, None)


def _labelled(side: Side) -> tuple[Tensor, Tensor]:
    if side.labels is None:
        raise DataError("Expected labels of the harmful images, found none. Give the data set a label column.")
    assert not isinstance(side.features, Hessian)  # rows are gathered where labels are
    return side.features, side.labels


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
    **{name: {"objective": name} for name in TRIALS},
}

TITLES = {
    "default": "default",
    "concentration": "concentration",
    "dead_relu": "dead ReLU",
    **{name: title for name, (title, _) in BASELINES.items()},
    **{f"{name}_ours": f"{title}, our recipe" for name, (_, title) in BASELINES.items()},
    "inner_ridge": "inner ridge probe",
    "class_collapse": "between-class collapse",
}
