"""Objectives: what is minimized in addition to the benign loss, as functions of a batch's features.

An objective is one class with its name in `OBJECTIVES`. It sees tensors, never a model; one that looks inside the
network says by `find` what it reads there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_immunize.errors import DataError, ScopeError
from hf_immunize.spectra.hessian_functions import (
    Hessian,
    hessian_log_kappa,
    hessian_r_ill,
    hessian_r_well,
    spectral_concentration,
)
from hf_immunize.spectra.running import RunningCovariance
from hf_immunize.training.distributed import process_mean, sum_over_processes, world_size
from hf_immunize.vision.relu import ReluInputs, choke_points, find_relus


@dataclass(frozen=True)
class Side:
    """One side, benign or harmful, of a batch after the forward pass."""

    features: Tensor | Hessian  # classifier inputs (N, D) of all processes, or their Hessian, in the autograd graph
    logits: Tensor | None = None  # (N, C)
    labels: Tensor | None = None  # (N,); None where the data have none
    # Name to what enters a module that the objective reads, (N, ...), of this process alone.
    inner: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Terms:
    """Name to term to be minimized, 0-D, by the side whose features it is of.

    Terms of ``inner`` are of what harmful images are inside the network; like ``harmful``, they are weighted by
    ``harmful_weight``.
    """

    benign: dict[str, Tensor] = field(default_factory=dict)
    harmful: dict[str, Tensor] = field(default_factory=dict)
    inner: dict[str, Tensor] = field(default_factory=dict)  # the same on every process


def gradient_norm(value: Tensor, features: Tensor | Hessian) -> Tensor:
    """``‖∂value/∂features‖_F``, detached, without a pass through the network; the graph is kept."""
    given = features.matrix if isinstance(features, Hessian) else features
    (gradient,) = torch.autograd.grad(value, given, retain_graph=True)
    dtype = torch.promote_types(features.dtype, torch.float32)
    if not isinstance(features, Hessian):
        return torch.linalg.vector_norm(gradient, dtype=dtype)
    gradient = (gradient + gradient.mT) / 2  # M with respect to H; 2ZM with respect to Z, of norm 2·sqrt(tr(M·H·M))
    return 2 * (gradient @ given.detach() * gradient).sum().clamp_min(0).sqrt().to(dtype)


class Objective:
    """What is minimized in addition to the benign loss; ``reads`` are modules whose input is in `Side.inner`."""

    needs_harmful_labels: ClassVar[bool] = False
    # Features as rows, in place of their Hessian where there are several processes.
    needs_rows: ClassVar[bool] = False
    # Of its terms where "auto" is asked for, as suits logarithms; without one, norms of gradients decide.
    weight: ClassVar[float | None] = None

    def __init__(
        self, reads: Sequence[str] = (), scale_free: bool = False, directions: Sequence[Sequence[float]] = ()
    ) -> None:
        self.reads = tuple(reads)
        self.scale_free = scale_free
        self.directions = directions
        self._basis: Tensor | None = None  # these as a tensor

    @staticmethod
    def find(model: nn.Module, trainable: list[str], features: Callable[[], Tensor]) -> list[str]:
        """Names of the inner modules to read; ``features`` runs the model on some images, in eval mode."""
        return []

    @classmethod
    def looks_inside(cls) -> bool:
        """Whether it reads inner modules."""
        return cls.find is not Objective.find

    @staticmethod
    def prepare(benign: Tensor, harmful: Tensor) -> list[list[float]]:
        """Directions ``(r, D)`` to keep for the run, from starting features ``(N, D)`` of a sample of each side."""
        return []

    @classmethod
    def needs_sample(cls) -> bool:
        """Whether it looks at a sample before the first step."""
        return cls.looks_inside() or cls.prepare is not Objective.prepare

    def __call__(self, benign: Side, harmful: Side) -> Terms:
        """The terms of a batch."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """What it remembers from step to step, for a resumed run, apart from what it was made with."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""


class Concentration(Objective):
    """Harmful features towards one direction, benign features away from one (see `spectral_concentration`)."""

    def __call__(self, benign: Side, harmful: Side) -> Terms:
        """Terms ``spread`` (benign, −C) and ``concentration`` (harmful, C)."""
        return Terms(
            benign={"spread": -spectral_concentration(benign.features)},
            harmful={"concentration": spectral_concentration(harmful.features)},
        )


# Enough: on features of a DINOv2, at a tenth of their amplitude outside, one alone slowed exact line search 12 times
# and two more than 200 times; more of them hold more of the task.
_DIRECTIONS = 2
# From this share of the energy inside on, 5 % of the amplitude, what is left outside is small enough.
_OUTSIDE = 0.0025


class Time(Objective):
    """Harmful features vary in two directions and hardly outside them; benign features vary evenly.

    With Z_c the centred harmful features and Q, ``(D, 2)``, their leading directions in the starting model, it
    lowers ``log E``, ``E = ‖Z_c(I − QQᵀ)‖²/‖Z_cQ‖²``. Little of the task is left at the scale of the two, and
    first-order probes with an intercept, which never see the mean, take up to ``1/E`` times the steps:
    ``log κ(Z_cᵀZ_c) ≥ log((k − 2)/2) − log E``, k the rank. E is ruled by the largest directions outside; the mean
    log eigenvalue of what is outside goes down too, and with it the small ones, which decide κ. That of the benign
    features goes up, all in units of their variance, which lowers their κ and the time of their probes.
    """

    needs_rows = True
    weight = 0.2

    def __init__(
        self, reads: Sequence[str] = (), scale_free: bool = False, directions: Sequence[Sequence[float]] = ()
    ) -> None:
        super().__init__(reads, scale_free, directions)
        self._running = {"benign": RunningCovariance(), "harmful": RunningCovariance()}

    @staticmethod
    def prepare(benign: Tensor, harmful: Tensor) -> list[list[float]]:
        """The leading directions of the harmful sample: those that vary most already are the soonest to dominate."""
        rows = harmful.detach().cpu().double()
        _, values, directions = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
        kept = min(_DIRECTIONS, rows.shape[1] - 1)
        if len(values) < kept or not bool(values[kept - 1] > 1e-6 * rows.norm()):
            raise DataError(
                f"Expected at least {kept + 1} different harmful images for objective='time', found features that are "
                "alike. Check how the images are loaded, or choose objective='concentration'."
            )
        return directions[:kept].tolist()

    def __call__(self, benign: Side, harmful: Side) -> Terms:
        """The terms ``spread`` (benign), ``outside`` (harmful, log E) and ``tail`` (harmful, of what is outside).

        ``spread`` is the mean log eigenvalue with its sign turned, ``tail`` that with its own.
        """
        assert isinstance(benign.features, Tensor) and isinstance(harmful.features, Tensor)  # `needs_rows`
        # In half precision a mean would be lost in rounding.
        kind = torch.promote_types(harmful.features.dtype, torch.float32)
        rows, others = harmful.features.to(kind), benign.features.to(kind)
        if self._basis is None:  # of the batch where no sample was looked at
            self._basis = torch.tensor(self.directions or self.prepare(others, rows), dtype=torch.float64)
        self._basis = self._basis.to(rows)  # copied to a device once
        centred, others = rows - rows.mean(dim=0), others - others.mean(dim=0)
        inside = centred @ self._basis.mT
        outside = centred - inside @ self._basis
        least = _least(centred)
        within = inside.square().sum().clamp_min(least)
        share = outside.square().sum().clamp_min(least) / within
        return Terms(
            benign={
                "spread": -self._log_eigenvalue("benign", others, others.square().sum().clamp_min(_least(others)))
            },
            harmful={
                "outside": (share + _OUTSIDE).log(),
                "tail": self._log_eigenvalue("harmful", outside, within),
            },
        )

    def _log_eigenvalue(self, side: str, rows: Tensor, energy: Tensor) -> Tensor:
        """The mean log eigenvalue of a side's covariance, in units of an energy, which gets no gradient.

        If it did, harmful features would grow inside the two directions, and with them those of benign images that
        look a little like harmful ones.
        """
        return self._running[side].mean_log_eigenvalue(rows, energy / max(1, len(rows) - 1)).to(rows)

    def state_dict(self) -> dict[str, Tensor]:
        """The running covariances."""
        return {
            f"{side}.{name}": value for side, one in self._running.items() for name, value in one.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        for side, one in self._running.items():
            one.load_state_dict(
                {name.removeprefix(f"{side}."): v for name, v in state.items() if name.startswith(side)}
            )


def _least(centred: Tensor) -> Tensor:
    """The energy of rounding in rows, at which logarithms end."""
    limits = torch.finfo(centred.dtype)
    return (limits.eps * centred.detach().square().sum()).clamp_min(limits.tiny)


class Kappa(Objective):
    """The paper's: ``R_well`` of the benign and ``R_ill`` of the harmful Hessian, Eq. 9 of arXiv:2505.23760."""

    def __call__(self, benign: Side, harmful: Side) -> Terms:
        """Terms ``r_well`` (benign) and ``r_ill`` (harmful)."""
        return Terms(
            benign={"r_well": hessian_r_well(benign.features, scale_free=self.scale_free)},
            harmful={"r_ill": hessian_r_ill(harmful.features, scale_free=self.scale_free)},
        )


class IllOnly(Objective):
    """The paper's baseline "R_ill only": nothing keeps the benign features well conditioned."""

    def __call__(self, benign: Side, harmful: Side) -> Terms:
        """The term ``r_ill`` (harmful)."""
        return Terms(harmful={"r_ill": hessian_r_ill(harmful.features, scale_free=self.scale_free)})


class OptKappa(Objective):
    """The paper's baseline "Opt κ": ``log κ`` itself, down for benign and up for harmful features."""

    def __call__(self, benign: Side, harmful: Side) -> Terms:
        """Terms ``benign_log_kappa`` and ``negative_log_kappa`` (harmful)."""
        return Terms(
            benign={"benign_log_kappa": hessian_log_kappa(benign.features)},
            harmful={"negative_log_kappa": -hessian_log_kappa(harmful.features)},
        )


class IMMA(Objective):
    """IMMA (Zheng & Yeh, ECCV 2024, arXiv:2311.18815): a harmful head fitted for some steps shall do badly."""

    needs_harmful_labels = True
    needs_rows = True

    def __call__(self, benign: Side, harmful: Side) -> Terms:
        """The term ``negative_adapted_loss`` (harmful)."""
        if harmful.labels is None:
            raise DataError(
                "Expected labels of the harmful images, which objective='imma' fits a head to, found none. Give the "
                "harmful dataset a label column, or choose another objective."
            )
        assert isinstance(harmful.features, Tensor)  # rows beside their labels are gathered for this objective
        return Terms(harmful={"negative_adapted_loss": -adapted_loss(harmful.features, harmful.labels)})


def adapted_loss(features: Tensor, labels: Tensor, steps: int = 5) -> Tensor:
    """Cross-entropy of a linear head after gradient descent from zero, ``W ← W − α ∇_W CE(ZW)``, in the graph of Z."""
    rows = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
    present, targets = torch.unique(labels, return_inverse=True)
    wanted = F.one_hot(targets, len(present)).to(rows.dtype)
    # One over a bound on the loss's curvature, a constant: the attacker always descends, whatever the features' scale.
    rate = 2 * len(rows) / torch.linalg.matrix_norm(rows.detach(), 2).square()
    weight = rows.new_zeros(rows.shape[1], len(present))
    for _ in range(steps):
        # The gradient is written out: autograd then differentiates through it without a second graph.
        weight = weight - rate / len(rows) * rows.mT @ (torch.softmax(rows @ weight, dim=1) - wanted)
    return F.cross_entropy(rows @ weight, targets)


class DeadReLU(Objective):
    """The last ReLU that no shortcut bypasses is deactivated on harmful images; benign features keep their spread.

    Where it is dead for all positions and channels, every image has exactly the same features after it. Benign images
    that look harmful lose theirs too, and κ of the benign features grows: condition (b) of the paper does not hold.
    """

    weight = 0.2

    @staticmethod
    def find(model: nn.Module, trainable: list[str], features: Callable[[], Tensor]) -> list[str]:
        """The last one alone: the classifier sees nothing else, and earlier ones separate the two sides less well."""
        relus = find_relus(model, trainable)
        last = choke_points(model, relus, features)[-1:] if relus else []
        if not last:
            return []
        with torch.enable_grad(), ReluInputs(model, last) as inside:
            features()
        return list(inside.values)  # nothing where no gradient reaches what enters: all that is trainable comes after

    def __call__(self, benign: Side, harmful: Side) -> Terms:
        """Terms ``spread`` (benign, −C) and ``activity_0``, … (inner), one of each ReLU."""
        if not (harmful.inner or self.reads):  # without gradients nothing is read
            raise ScopeError(
                "Expected a ReLU or ReLU6 in the trainable part, around which no shortcut leads to the classifier, "
                "found none for objective='dead_relu' to deactivate. Choose objective='concentration', or by "
                "trainable= a part that holds one (of ResNet and MobileNet the last stage does)."
            )
        pairs = [(values, benign.inner[name]) for name, values in harmful.inner.items()]
        return Terms(
            benign={"spread": -spectral_concentration(benign.features)},
            inner={f"activity_{index}": relu_activity(*pair) for index, pair in enumerate(pairs)},
        )


# How far below zero harmful images shall enter, in units of what benign ones enter with: for images not trained on.
_MARGIN = 0.5
# From this mean square on, in units of u², the ReLU counts as nearly dead; the term pushes the less the smaller it is.
_NEARLY_DEAD = 1e-4


def relu_activity(harmful: Tensor, benign: Tensor) -> Tensor:
    """``log mean relu(a/u + margin)²`` of what enters a ReLU of harmful images; u is the size of benign ones."""
    dtype = torch.promote_types(harmful.dtype, torch.float32)
    unit = process_mean(benign.detach().to(dtype).square().mean()).clamp_min(torch.finfo(dtype).tiny).sqrt()
    count = harmful[0].numel() * len(harmful) * world_size()
    squares = sum_over_processes(torch.relu(harmful.to(dtype) / unit + _MARGIN).square().sum())
    return torch.log(squares / count + _NEARLY_DEAD)


DEFAULT = "time"
# In the order in which `--help` names them.
OBJECTIVES: dict[str, type[Objective]] = {
    "time": Time,
    "concentration": Concentration,
    "dead_relu": DeadReLU,
    "kappa": Kappa,
    "r_ill": IllOnly,
    "opt_kappa": OptKappa,
    "imma": IMMA,
}
