"""The named regularization terms of each method, as functions of features, logits and labels.

A term knows nothing of models, trainers or weights, so a bare PyTorch loop uses the same functions. Adding an
objective is one function here and one line in `OBJECTIVES`; one that reads harmful labels is named in `LABELLED` too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from hf_immunize.errors import DataError, ScopeError
from hf_immunize.spectra.hessian_functions import Hessian
from hf_immunize.spectra.regularizers import hessian_log_kappa, hessian_r_ill, hessian_r_well, spectral_concentration
from hf_immunize.training.inner import adapted_loss
from hf_immunize.training.rectifying import rectifier_activity
from hf_immunize.training.terms import Terms


@dataclass(frozen=True)
class Side:
    """One side, benign or harmful, of a batch after the forward pass.

    Attributes:
        features: Classifier inputs, shape ``(N, D)``, in the autograd graph; of all processes where there are several.
            Objectives of the spectrum take their `Hessian` instead as well.
        logits: Classifier outputs, shape ``(N, C)``.
        labels: Class indices, shape ``(N,)``; None where the data have none.
        rectified: Name to what enters a rectifier that no shortcut bypasses, ``(N, ...)``, of this process alone; of
            objectives that look there.
    """

    features: Tensor | Hessian
    logits: Tensor | None = None
    labels: Tensor | None = None
    rectified: dict[str, Tensor] = field(default_factory=dict)


def kappa(benign: Side, harmful: Side, scale_free: bool = False) -> Terms:
    """The paper's objective: ``R_well`` of the benign Hessian and ``R_ill`` of the harmful one.

    Eq. 9 of Zheng et al. 2025 (arXiv:2505.23760), with H = ZᵀZ of the batch.

    Args:
        benign: The benign side; its features are used.
        harmful: The harmful side; its features are used.
        scale_free: Take both of ``H·D/tr(H)``.

    Returns:
        Terms ``r_well`` (benign) and ``r_ill`` (harmful).

    Raises:
        NonFiniteError, RankError, PerfectConditioningError: See `hessian_r_well` and `hessian_r_ill`.

    Example:
        >>> import torch
        >>> Z = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> terms = kappa(Side(Z), Side(Z))
        >>> terms.benign["r_well"].item(), round(terms.harmful["r_ill"].item(), 4)
        (3.75, 0.2667)
    """
    return Terms(
        benign={"r_well": hessian_r_well(benign.features, scale_free=scale_free)},
        harmful={"r_ill": hessian_r_ill(harmful.features, scale_free=scale_free)},
    )


def r_ill(benign: Side, harmful: Side, scale_free: bool = False) -> Terms:
    """The paper's baseline "R_ill only": nothing keeps the benign features well conditioned.

    Args:
        benign: The benign side; not used.
        harmful: The harmful side; its features are used.
        scale_free: Take it of ``H·D/tr(H)``.

    Returns:
        The term ``r_ill`` (harmful).
    """
    return Terms(harmful={"r_ill": hessian_r_ill(harmful.features, scale_free=scale_free)})


def concentration(benign: Side, harmful: Side, scale_free: bool = False) -> Terms:
    """Spectral concentration: harmful features towards one direction, benign features away from one.

    ``C(Z) = log((tr H − σ_1)/σ_1)`` bounds log κ from below by ``log(k − 1) − C(Z)``; unlike `kappa` it moves every
    singular value but the first, so that no linear probe finds much to read (see `spectral_concentration`).

    Args:
        benign: The benign side; its features are used.
        harmful: The harmful side; its features are used.
        scale_free: Changes nothing: it is scale-free by itself.

    Returns:
        Terms ``spread`` (benign, −C) and ``concentration`` (harmful, C).

    Raises:
        NonFiniteError, RankError: See `spectral_concentration`.

    Example:
        >>> import torch
        >>> Z = torch.diag(torch.tensor([10.0, 1.0]))
        >>> terms = concentration(Side(Z), Side(Z))
        >>> round(terms.harmful["concentration"].item(), 4), round(terms.benign["spread"].item(), 4)
        (-4.6052, 4.6052)
    """
    return Terms(
        benign={"spread": -spectral_concentration(benign.features)},
        harmful={"concentration": spectral_concentration(harmful.features)},
    )


def silence(benign: Side, harmful: Side, scale_free: bool = False) -> Terms:
    """Rectifiers off on harmful images, benign features away from one direction.

    Where a rectifier is off everywhere, every image has the same features behind it, exactly (see
    `rectifier_activity`): the harmful rank falls to one or to zero, and nothing is left at any scale.
    `ImmunizationStep` takes the last one that no shortcut bypasses.

    Args:
        benign: The benign side; its features and what enters its rectifiers are used.
        harmful: The harmful side; what enters its rectifiers is used.
        scale_free: Changes nothing: it is scale-free by itself.

    Returns:
        Terms ``spread`` (benign, −C) and, one a rectifier, ``activity`` (inner).

    Raises:
        ScopeError: If there is no rectifier to switch off.
        NonFiniteError, RankError: See `spectral_concentration`.
    """
    if not harmful.rectified:
        raise ScopeError(
            "Expected rectifiers (ReLU, ReLU6) in the part that moves, around which no shortcut leads to the "
            "classifier, found none: objective='silence' has nothing to switch off. Take objective='concentration', "
            "or with trainable= a part that holds some (of ResNet and MobileNet the last stage does)."
        )
    return Terms(
        benign={"spread": -spectral_concentration(benign.features)},
        inner={
            f"activity_{index}": rectifier_activity(values, benign.rectified[name])
            for index, (name, values) in enumerate(harmful.rectified.items())
        },
    )


def auto(benign: Side, harmful: Side, scale_free: bool = False) -> Terms:
    """What stops linear probes best: `silence` where there are rectifiers to switch off, else `concentration`.

    `ImmunizationStep` gives none to switch off where features hardly tell harmful from benign images (see
    `hf_immunize.training.telling_apart`).

    Args:
        benign: The benign side.
        harmful: The harmful side; whether it has ``rectified`` decides.
        scale_free: Changes nothing: both are scale-free by themselves.

    Returns:
        The terms of the one that is taken.

    Raises:
        NonFiniteError, RankError: See `spectral_concentration`.

    Example:
        >>> import torch
        >>> list(auto(Side(torch.eye(2)), Side(torch.eye(2))).harmful)
        ['concentration']
    """
    return (silence if harmful.rectified else concentration)(benign, harmful, scale_free)


def opt_kappa(benign: Side, harmful: Side, scale_free: bool = False) -> Terms:
    """The paper's baseline "Opt κ": ``log κ`` itself, down for benign and up for harmful features.

    Args:
        benign: The benign side; its features are used.
        harmful: The harmful side; its features are used.
        scale_free: Changes nothing: κ is scale-free by itself.

    Returns:
        Terms ``benign_log_kappa`` and ``negative_log_kappa`` (harmful).

    Raises:
        NonFiniteError, RankError: See `hessian_log_kappa`.
    """
    return Terms(
        benign={"benign_log_kappa": hessian_log_kappa(benign.features)},
        harmful={"negative_log_kappa": -hessian_log_kappa(harmful.features)},
    )


def imma(benign: Side, harmful: Side, scale_free: bool = False) -> Terms:
    """IMMA (Zheng & Yeh, ECCV 2024, arXiv:2311.18815): a harmful head that was fitted for some steps shall do badly.

    Bi-level on the head: inner gradient steps fit it to the harmful features, and the outer step, differentiated
    through them, raises the harmful loss that it then has.

    Args:
        benign: The benign side; not used.
        harmful: The harmful side; its features and labels are used.
        scale_free: Changes nothing.

    Returns:
        The term ``negative_adapted_loss`` (harmful).

    Raises:
        DataError: If the harmful side has no labels.
    """
    if harmful.labels is None:
        raise DataError(
            "Expected labels of the harmful images, which objective='imma' fits a head to, found none. Give the "
            "harmful dataset a label column, or choose another objective."
        )
    assert isinstance(harmful.features, Tensor)  # rows beside their labels are gathered for this objective
    return Terms(harmful={"negative_adapted_loss": -adapted_loss(harmful.features, harmful.labels)})


# In the order in which `--help` names them.
OBJECTIVES: dict[str, Callable[[Side, Side, bool], Terms]] = {
    "auto": auto,
    "silence": silence,
    "concentration": concentration,
    "kappa": kappa,
    "r_ill": r_ill,
    "opt_kappa": opt_kappa,
    "imma": imma,
}
# Those that look at what enters rectifiers, if there are any.
INSIDE = ("auto", "silence")
# Those that read the harmful images' labels.
LABELLED = {"imma"}
