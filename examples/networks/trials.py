"""Objectives that were tried and are not in the library: classes like those of `hf_immunize.training.objectives`.

They read the harmful images' labels. `known` adds them to the library for the time of a run.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.fine_tuning.terms import ridge_resistance
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
