"""The named regularization terms of each method, as functions of features, logits and labels.

A term knows nothing of models, trainers or weights, so a bare PyTorch loop uses the same functions. Adding an
objective is one function here and one line in `OBJECTIVES`; one that reads harmful labels is named in `LABELLED` too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_immunize.errors import DataError, ScopeError
from hf_immunize.spectra.hessian_functions import Hessian
from hf_immunize.spectra.regularizers import hessian_log_kappa, hessian_r_ill, hessian_r_well, spectral_concentration
from hf_immunize.training.distributed import process_mean, sum_over_processes, world_size


@dataclass(frozen=True)
class InnerTerm:
    """A term that looks at something inside the network instead of at the classifier's input.

    Attributes:
        value: 0-D, the same on every process.
        gradient_norm: Norm of its gradient on what it looks at, 0-D, detached.
        scale: The unit in which that norm is weighed, 0-D, detached.
        left: Share of its work that is left, between 0 and 1, 0-D, detached; None for all of it. Balanced by its norm,
            a term would push as hard for the last trifle as at the start, and a multiplier would rise for it until the
            budget is spent.
    """

    value: Tensor
    gradient_norm: Tensor
    scale: Tensor
    left: Tensor | None = None


@dataclass(frozen=True)
class Terms:
    """Regularization terms to be minimized, by the side whose features they look at.

    Attributes:
        benign: Name to 0-D tensor; weighted by ``benign_weight``.
        harmful: Name to 0-D tensor; weighted by ``harmful_weight``.
        inner: Name to a term of what harmful images are inside the network; weighted by ``harmful_weight`` too.
    """

    benign: dict[str, Tensor] = field(default_factory=dict)
    harmful: dict[str, Tensor] = field(default_factory=dict)
    inner: dict[str, InnerTerm] = field(default_factory=dict)


def adapted_loss(features: Tensor, labels: Tensor, steps: int = 5) -> Tensor:
    """Cross-entropy of a linear head after some steps of gradient descent from zero, differentiable in the features.

    The inner problem of IMMA (Zheng & Yeh, ECCV 2024, arXiv:2311.18815) for linear probing: ``W ← W − α ∇_W CE(ZW)``,
    with the graph kept through every step. ``α = 2N/σ_1(ZᵀZ)``, one over a bound on the curvature of the mean loss, is
    a constant for the outer gradient: the attacker always descends, whatever the features' scale.

    Args:
        features: Z, shape ``(N, D)``.
        labels: Class indices, shape ``(N,)``; only the classes present matter.
        steps: Inner steps.

    Returns:
        0-D tensor, in nats; at most ``log(number of classes present)``, its value at ``W = 0``.

    Example:
        >>> Z, y = torch.eye(4), torch.tensor([0, 1, 2, 3])
        >>> bool(adapted_loss(Z, y, steps=9) < adapted_loss(Z, y, steps=1) < torch.log(torch.tensor(4.0)))
        True
    """
    rows = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
    present, targets = torch.unique(labels, return_inverse=True)
    wanted = F.one_hot(targets, len(present)).to(rows.dtype)
    rate = 2 * len(rows) / torch.linalg.matrix_norm(rows.detach(), 2).square()
    weight = rows.new_zeros(rows.shape[1], len(present))
    for _ in range(steps):
        # The gradient is written out: autograd then differentiates through it without a second graph.
        weight = weight - rate / len(rows) * rows.mT @ (torch.softmax(rows @ weight, dim=1) - wanted)
    return F.cross_entropy(rows @ weight, targets)


# How far below zero harmful images shall enter, in units of what benign ones enter with: for images not trained on.
MARGIN = 0.5
# Keeps the logarithm finite where all are off.
_FLOOR = 1e-12
# From this mean square on, in units of u², the term counts as nearly done, and weighs less the smaller it is.
_NEARLY_DONE = 1e-4


def rectifier_activity(harmful: Tensor, benign: Tensor, margin: float = MARGIN) -> InnerTerm:
    """How far harmful images are from switching all rectifiers of a layer off.

    ``log mean relu(a/u + margin)²`` over what enters them, a, of harmful images; u is the root mean square of what
    enters of benign ones, which is taken as it is. Where a rectifier is off, its output is zero exactly and no
    gradient passes back; where all of a layer are off that no shortcut bypasses, every image has the same features,
    and no probe of a later layer reads anything.

    Args:
        harmful: What enters, of this process's harmful images, ``(N_H, ...)``, in the autograd graph.
        benign: The same of its benign images, ``(N_P, ...)``.
        margin: How far below zero all shall be, in units of u.

    Returns:
        The term, of the images of all processes, with the norm of its gradient on what enters, the unit in which
        this is weighed (one over the size of what enters of benign images), and how much is left to do.

    Example:
        >>> term = rectifier_activity(torch.tensor([[-2.0, 0.5]], requires_grad=True), torch.tensor([[1.0, -1.0]]))
        >>> round(term.value.exp().item(), 3), round(term.scale.item(), 3)
        (0.5, 0.707)
    """
    dtype = torch.promote_types(harmful.dtype, torch.float32)
    entries = benign[0].numel() * len(benign) * world_size()
    unit = process_mean(benign.detach().to(dtype).square().mean()).clamp_min(torch.finfo(dtype).tiny).sqrt()
    count = harmful[0].numel() * len(harmful) * world_size()
    squares = sum_over_processes(torch.relu(harmful.to(dtype) / unit + margin).square().sum())
    mean = squares / count + _FLOOR
    norm = 2 * squares.detach().sqrt() / (unit * count * mean.detach())
    left = (squares.detach() / count / _NEARLY_DONE).clamp(max=1)
    return InnerTerm(torch.log(mean), norm, 1 / (unit * entries**0.5), left)


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
    `hf_immunize.training.choice`).

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
