"""Algorithm 1 of the paper, its baselines and the closed-form optimum behind one call.

The paper preconditions the gradient of ``R(H)``, ``H = θᵀKθ``, with ``K⁻¹``. As ``∇_θ R = 2Kθ ∇_H R`` it cancels: an
update is ``θ ← θ − 2ηθ ∇_H R``, also where ``K`` is singular.

Both regularizers have a gradient that the eigenvectors of ``H = ZᵀZ`` diagonalize. With ``Z = U diag(√σ) Vᵀ`` an
update multiplies ``θv_i`` by ``1 − 2η b_i σ_i``, where only the weights ``b`` tell the regularizers apart:

    R_well: b_i = [i in top eigenspace]/m − 1/D         R_ill: b_i = ([i = k] − 1/k) / d²

(``m`` multiplicity of the largest eigenvalue, ``k`` the rank, ``d = ‖H‖_F²/2k − σ_k²/2``.) In features the whole
update is ``θ ← θ − 2η (θZᵀ) U diag(b) Uᵀ Z``: products with ``n`` rows, and one decomposition of the ``n × n`` Gram
matrix. Eigenvalues ``(k,)`` are falling throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_immunize.errors import ArgumentError, NonFiniteError, PerfectConditioningError, RankError
from hf_immunize.linear.inputs import as_data, as_targets
from hf_immunize.linear.optimum import Factor, factors, map_ratio, optimal_map
from hf_immunize.linear.time import time_map
from hf_immunize.spectra.checks import as_labels, as_values, check_count, check_number, check_result
from hf_immunize.spectra.hessian_functions import ill_denominator


# ---- one update ----

# Below this ratio the small eigenvalues of the Gram matrix carry too few digits.
_GRAM_IS_ENOUGH = 1e-10
# Eigenvalues this close (relative) to the largest are one eigenspace for R_well: otherwise a gap that closes
# geometrically keeps every step tiny. Once all of them are, the distance shrinks.
TIE = 0.3


class RowSpectrum(NamedTuple):
    """Non-zero eigenvalues of ``H = ZᵀZ`` and the left singular vectors of ``Z``."""

    values: Tensor  # (k,), falling
    left: Tensor  # (n, k)

    @property
    def kappa(self) -> float:
        """Of H."""
        return float(self.values[0] / self.values[-1])


def feature_spectrum(Z: Tensor) -> RowSpectrum:
    """Decompose features ``(n, D)`` in float64, at best with ``n ≤ D`` rows."""
    if Z.shape[0] <= Z.shape[1]:
        values, left = torch.linalg.eigh(Z @ Z.T)
        if values[0] > _GRAM_IS_ENOUGH * values[-1]:
            return RowSpectrum(values.flip(0), left.flip(1))
    left, sigma, _ = torch.linalg.svd(Z, full_matrices=False)
    # Ten units of rounding, as in the rank rule; features here are computed in the same float64.
    keep = sigma > 10 * torch.finfo(Z.dtype).eps * sigma[0]
    if not keep.any():
        raise RankError("Expected features with a spectrum, found all zero: θ has collapsed or the data are zero.")
    return RowSpectrum(sigma[keep].square(), left[:, keep])


def tied(values: Tensor) -> int:
    """How many of the eigenvalues count as the largest one: all within `TIE`, or a smaller distance."""
    top, tie = len(values), 10 * TIE
    while top == len(values) and tie > 1e-12:
        tie /= 10
        top = int((values >= (1 - tie) * values[0]).sum())
    return top


def well_weights(values: Tensor, dim: int) -> Tensor:
    """The weights ``b`` of ``R_well``, averaged over the top eigenspace where it is repeated; D is the p of Eq. 3."""
    top = tied(values)
    weights = values.new_full(values.shape, -1 / dim)
    weights[:top] += 1 / top
    return weights


def well_step(values: Tensor, dim: int) -> float:
    """The largest step of ``R_well`` for which κ(H_P) provably falls (or stays, at κ = 1, where it is 0).

    The top eigenspace of ``m`` values must not sink below the next eigenvalue, nor change order within itself:
    ``η ≤ (1 − r)/(2σ_m(1/m − 1/D) + 2rσ_{m+1}/D)``, ``r = √(σ_{m+1}/σ_m)``, and for m > 1 ``η ≤ 1/(6σ_1(1/m − 1/D))``.
    (The range of the paper's Theorem 4.3 lets the largest eigenvalue be annihilated, after which κ jumps up.)
    """
    top = tied(values)
    share = 1 / top - 1 / dim
    if share <= 0 or top == len(values):
        return 0.0
    last, after = float(values[top - 1]), float(values[top])
    r = (after / last) ** 0.5
    limit = (1 - r) / (2 * last * share + 2 * r * after / dim)
    return min(limit, 1 / (6 * float(values[0]) * share)) if top > 1 else limit


def _denominator(values: Tensor) -> float:
    d = float(ill_denominator(values, values[-1], len(values)))
    if d <= 1e-14 * float(values[0].square()):
        raise PerfectConditioningError(
            "Expected harmful features with κ > 1, found κ = 1, where R_ill is undefined. Use another method."
        )
    return d


def ill_weights(values: Tensor) -> Tensor:
    """The weights ``b`` of ``R_ill``."""
    weights = values.new_full(values.shape, -1 / len(values))
    weights[-1] += 1
    return weights / _denominator(values) ** 2


def ill_step_limit(values: Tensor) -> float:
    """``d²/(2(1 − 1/k)σ_k)``: below it the smallest eigenvalue shrinks, so κ(H_H) rises; at it, it is annihilated."""
    return _denominator(values) ** 2 / (2 * (1 - 1 / len(values)) * float(values[-1]))


def ill_step(values: Tensor, growth: float) -> float:
    """The step of ``R_ill`` after which κ(H_H) is ``growth`` > 1 times what it was, inside the provable range."""
    # At the fraction a of the limit the extremes are multiplied by (1 − a)² and (1 + aκ/(k−1))².
    limit, root = ill_step_limit(values), growth**0.5
    return (root - 1) / (float(values[0] / values[-1]) / (len(values) - 1) + root) * limit


def direction(theta: Tensor, Z: Tensor, left: Tensor, weights: Tensor) -> Tensor:
    """``2θ ∇_H R = 2(θZᵀ) U diag(b) Uᵀ Z``, ``(D, D)``, which the update subtracts."""
    inner = left.T @ Z
    return (2 * weights * (theta @ inner.T)) @ inner


def subtract(theta: Tensor, *parts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """θ without the `direction` of each Z, U and b, as one product that reads the large θ a single time."""
    inner = torch.cat([left.T @ Z for Z, left, _ in parts])
    weights = torch.cat([weights for _, _, weights in parts])
    return torch.addmm(theta, 2 * weights * (theta @ inner.T), inner, alpha=-1)


# ---- a whole run ----


# Under the step rules: the part of what R_well gained in log κ(H_P) that R_ill may spend, and the largest factor by
# which a step raises κ(H_H); every step of "r_ill" does.
SHARE, GROWTH = 0.6, 1.2


@dataclass(frozen=True)
class LinearSettings:
    """Constants of the iterative methods; the defaults are those of the paper's house-price experiment.

    Under ``step="fixed"`` a step is η times the weighted gradients, as in the paper. Under ``"rule"`` it is the
    largest step of R_well that provably lowers κ(H_P), then a step of R_ill that provably raises κ(H_H), both for the
    rows of the step; then θ is rescaled so that the benign features keep their size. A step of R_ill that raises
    κ(H_H) by a factor raises κ(H_P) by no more than it: as `SHARE` is below 1, κ(H_P) falls in every pair of steps.
    """

    epochs: int = 100
    lr: float = 0.005  # η of θ and ω; under "rule" of the task loss alone, and at most one over its curvature
    batch_size: int | None = None  # rows of each task in a step; None for all
    step: str = "fixed"
    benign_weight: float | str = "balanced"  # λ_P under "fixed"; "balanced": as long as the gradient of the task loss
    harmful_weight: float | str = "balanced"  # λ_H, likewise
    inner_steps: int = 5  # of the simulated attacker of "imma"
    record_every: int = 1  # epochs between records, of two decompositions each; 0 for the first and last alone
    seed: int = 0  # of ω and of the order of the batches

    def check(self, method: str) -> None:
        """Refuse impossible values."""
        for name, least in (("epochs", 1), ("inner_steps", 1), ("record_every", 0)):
            check_count(getattr(self, name), name, least)
        if self.batch_size is not None:
            check_count(self.batch_size, "batch_size", least=2)
        check_count(self.seed, "seed", least=-(2**63), most=2**63 - 1)
        if not check_number(self.lr, "lr", 0) > 0:
            raise ArgumentError("Expected lr above 0, found 0.")
        if self.step not in ("fixed", "rule"):
            raise ArgumentError(f"Expected step as 'fixed' or 'rule', found {self.step!r}.")
        if self.step == "rule" and method not in ("kappa", "r_ill"):
            raise ArgumentError(f"Expected step='rule' with 'kappa' or 'r_ill', where it is proved, found {method!r}.")
        for name in ("benign_weight", "harmful_weight"):
            weight = getattr(self, name)
            if not (isinstance(weight, str) and weight == "balanced"):
                check_number(weight, f"{name}, unless 'balanced',", 0)


@dataclass(frozen=True)
class Task:
    """Benign data ``(N, D)`` with targets: mean squared error, summed over the C targets, or softmax cross-entropy."""

    X: Tensor
    targets: Tensor  # (N, C), real or one-hot
    classify: bool

    @property
    def curvature(self) -> float:
        """Largest second derivative of the loss along one score, times what features contribute."""
        return (0.5 if self.classify else 2.0) / len(self.X)

    def rows(self, index: Tensor) -> Task:
        """The same task on some rows."""
        index = index.to(self.X.device)
        return Task(self.X[index], self.targets[index], self.classify)

    def loss(self, scores: Tensor) -> Tensor:
        """Mean loss of scores ``(N, C)``."""
        if self.classify:
            return -(self.targets * scores.log_softmax(1)).sum(1).mean()
        return (scores - self.targets).square().sum(1).mean()

    def slope(self, scores: Tensor) -> Tensor:
        """Gradient of the loss with respect to the scores, ``(N, C)``."""
        residual = scores.softmax(1) - self.targets if self.classify else 2 * (scores - self.targets)
        return residual / len(scores)


def benign_task(X: Tensor, y: Any) -> Task:
    """Read targets: whole numbers in one dimension are classes, everything else is regression."""
    values = as_values(y, "y_benign").detach().to(X.device)
    targets = as_targets(values, len(X), "y_benign").to(X.device)
    if values.ndim == 2 or values.is_floating_point():
        return Task(X, targets, classify=False)
    classes = as_labels(values, len(X), "y_benign")
    # A single class (one digit's images, say) gets a second output, so that cross-entropy is defined.
    onehot = torch.nn.functional.one_hot(classes, max(int(classes.max()) + 1, 2))
    return Task(X, onehot.to(torch.float64), classify=True)


def log_kappa_gradient(X: Tensor, Z: Tensor) -> Tensor:
    """``∇_θ log κ(θᵀXᵀXθ)``, the direction of the baseline "Opt κ": ``2Xᵀ(u_1u_1ᵀ/σ_1 − u_ku_kᵀ/σ_k)Z``."""
    values, left = feature_spectrum(Z)
    ends, weights = left[:, [0, -1]], torch.stack([1 / values[0], -1 / values[-1]])
    return (2 * weights * (X.T @ ends)) @ (ends.T @ Z)


def adapted_loss(theta: Tensor, X: Tensor, targets: Tensor, steps: int) -> Tensor:
    """The harmful squared loss that IMMA's attacker reaches in some steps of a head from zero, differentiable."""
    Z = X @ theta
    # One over the curvature, a constant for the outer gradient, so that the attacker always descends.
    rate = len(Z) / (2 * torch.linalg.matrix_norm(Z.detach(), 2).square())
    weight = Z.new_zeros(Z.shape[1], targets.shape[1])
    for _ in range(steps):
        # The gradient is written out: autograd then differentiates through it without a second graph.
        weight = weight - rate * 2 / len(Z) * (Z.T @ (Z @ weight - targets))
    return (Z @ weight - targets).square().sum() / len(Z)


# Under the step rules κ(H_H) stops here: where harmful directions of their own exist it would grow without end, until
# rounding takes the benign features with it.
_KAPPA_LIMIT = 1e14

METHODS = ("optimum", "time", "kappa", "r_ill", "imma", "opt_kappa")


@dataclass(frozen=True)
class LinearImmunization:
    """What `immunize_linear` found."""

    theta: Tensor  # (D, D) float64: immunized features are X @ theta
    omega: Tensor | None  # (D, C), the benign classifier trained with it; None for the optimum
    # One dict per record, the result's last: epoch, step, loss (benign, over all data), kappa_benign, kappa_harmful,
    # benign_ratio (ii), harmful_ratio (i), rir, bound.
    history: list[dict[str, Any]] = field(repr=False)
    method: str
    settings: dict[str, Any] = field(repr=False)

    @property
    def rir(self) -> float:
        """Exact RIR against the identity."""
        return float(self.history[-1]["rir"])


def immunize_linear(
    X_benign: Any,
    y_benign: Any,
    X_harmful: Any,
    method: str = "optimum",
    *,
    y_harmful: Any = None,
    t: float | None = None,
    delta: float | None = None,
    **options: Any,
) -> LinearImmunization:
    """Find a linear map ``θ`` after which probing is slow on the harmful task and no slower on the benign one.

    - ``optimum``: the closed form that attains the ceiling of RIR (`optimal_map`).
    - ``time``: the closed form that keeps what the benign labels need and shrinks all else (`time_map`).
    - ``kappa``: Algorithm 1 of Zheng et al. (ICML 2025): task loss, ``R_well(H_P)`` and ``R_ill(H_H)``.
    - ``r_ill``: task loss and ``R_ill(H_H)`` alone.
    - ``imma``: bi-level, after Zheng & Yeh (ECCV 2024): lower the benign loss, raise the harmful loss that an attacker
      reaches after ``inner_steps``; the inner loop is differentiated.
    - ``opt_kappa``: task loss and gradient descent on ``log κ(H_P) − log κ(H_H)`` itself.

    Args:
        X_benign: ``(N_P, D)``.
        y_benign: ``(N_P,)`` class numbers (whole-number dtype), or ``(N_P,)`` or ``(N_P, C)`` real targets; None for
            ``optimum``.
        X_harmful: ``(N_H, D)``, the same columns.
        method: One of the above.
        y_harmful: Targets of the harmful data, for ``imma`` alone.
        t: Of the optimum (`optimal_map`).
        delta: Of ``time``: what is shrunk is shrunk to this (`time_map`).
        **options: Constants of the iterative methods, the fields of `LinearSettings`.

    Returns:
        `LinearImmunization`: θ, ω, and the history of both condition numbers.

    Raises:
        ArgumentError: An unknown method or option, an impossible value, or ``imma`` without ``y_harmful``.
        ShapeError: Columns or targets do not fit.
        NonFiniteError: A cell of the data is not finite, or the iteration diverged.
        PerfectConditioningError: ``R_ill`` met harmful features with κ = 1.

    Example:
        >>> benign, harmful = torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([1.0, 3.0]))
        >>> round(immunize_linear(benign, None, harmful).rir, 6)  # the ceiling
        16.0
        >>> found = immunize_linear(benign, torch.tensor([1.0, 0.0]), harmful, "kappa", step="rule", epochs=30)
        >>> round(found.rir, 6)
        16.0
    """
    if method not in METHODS:
        raise ArgumentError(f"Expected method out of {', '.join(METHODS)}, found {method!r}.")
    known = LinearSettings.__dataclass_fields__
    if unknown := set(options).difference(known):
        raise ArgumentError(f"Expected options out of {', '.join(known)}, found {', '.join(unknown)}.")
    chosen = LinearSettings(**options)
    P, H = factors(X_benign, X_harmful)
    chosen.check(method)
    if y_benign is None and method != "optimum":
        raise ArgumentError(f"Expected y_benign for the classifier of {method!r}, found None. 'optimum' needs none.")
    if method in ("optimum", "time"):
        theta = optimal_map(P, H, t=t) if method == "optimum" else time_map(X_benign, y_benign, delta=delta)
        used = {"t": t} if method == "optimum" else {"delta": delta}
        return LinearImmunization(theta, None, [{"epoch": 0, "step": 0} | _measure(P, H, theta)], method, used)
    task = benign_task(as_data(X_benign, "X_benign"), y_benign)
    X_H = as_data(X_harmful, "X_harmful")
    y_H = None
    if method == "imma":
        if y_harmful is None:
            raise ArgumentError("Expected y_harmful, which the simulated attacker of 'imma' fits, found None.")
        y_H = as_targets(y_harmful, len(X_H), "y_harmful").to(X_H.device)
    return _descend(_Run(method, chosen, P, H, task, X_H, y_H))


def _measure(P: Factor, H: Factor, theta: Tensor) -> dict[str, Any]:
    ratio = map_ratio(P, H, theta)
    assert ratio.benign is not None and ratio.harmful is not None
    kappas = {"kappa_benign": ratio.benign.kappa, "kappa_harmful": ratio.harmful.kappa}
    return kappas | {name: getattr(ratio, name) for name in ("benign_ratio", "harmful_ratio", "rir", "bound")}


@dataclass
class _Run:
    """Everything a run of an iterative method reads; θ and ω are passed and returned."""

    method: str
    settings: LinearSettings
    P: Factor
    H: Factor
    task: Task
    X_H: Tensor
    y_H: Tensor | None

    def start(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """θ = I, and ω, before the first step."""
        dim, device = self.P.dim, self.X_H.device
        omega = torch.randn(dim, self.task.targets.shape[1], generator=generator, dtype=torch.float64) / dim**0.5
        return torch.eye(dim, dtype=torch.float64, device=device), omega.to(device)

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
        """Row numbers of both tasks, step by step, for one epoch; whole batches only, as long as the shorter lasts."""
        counts = len(self.task.X), len(self.X_H)
        if self.settings.batch_size is None:
            yield tuple(map(torch.arange, counts))
            return
        size = int(min(self.settings.batch_size, *counts))
        orders = [torch.randperm(count, generator=generator).split(size) for count in counts]
        yield from list(zip(*orders, strict=False))[: min(counts) // size]


def _descend(run: _Run) -> LinearImmunization:
    generator = torch.Generator().manual_seed(int(run.settings.seed))
    theta, omega = run.start(generator)
    every, epochs = run.settings.record_every, run.settings.epochs

    def record(epoch: int, step: int) -> dict[str, Any]:
        loss = float(run.task.loss(run.task.X @ theta @ omega))
        check_result(loss, f"the benign loss at step {step} of method {run.method!r}")
        return {"epoch": epoch, "step": step, "loss": loss} | _measure(run.P, run.H, theta)

    history, step = [record(0, 0)], 0
    for epoch in range(1, epochs + 1):
        for rows_p, rows_h in run.batches(generator):
            theta, omega = _update(run, theta, omega, rows_p, rows_h)
            step += 1
            # NaN fails the comparison too; beyond 1e100 the squares of the next step overflow.
            if not float(theta.abs().max()) < 1e100:
                raise NonFiniteError(
                    f"Expected a finite θ, found a descent of method {run.method!r} that diverges at step {step}. "
                    "Lower lr, or scale the data down."
                )
        if epoch == epochs or (every and epoch % every == 0):
            history.append(record(epoch, step))
    return LinearImmunization(theta, omega, history, run.method, asdict(run.settings))


def _update(run: _Run, theta: Tensor, omega: Tensor, rows_p: Tensor, rows_h: Tensor) -> tuple[Tensor, Tensor]:
    s, batch = run.settings, run.task.rows(rows_p)
    Z = batch.X @ theta
    slope = batch.slope(Z @ omega)
    # The task's gradient enters unpreconditioned, as in the paper.
    task = batch.X.T @ slope @ omega.T
    lr_omega = lr_theta = s.lr
    if s.step == "rule":
        # Raw columns and a θ that whitens them make the task's own curvature large: never beyond one over it.
        lr_omega = min(s.lr, 1 / max(batch.curvature * _top(Z), 1e-300))
        lr_theta = min(s.lr, 1 / max(batch.curvature * _top(batch.X) * float(omega.square().sum()), 1e-300))
    omega_next = omega - lr_omega * (Z.T @ slope)
    # All rows at once: the factor has the same Hessian and no more rows than columns.
    full = s.batch_size is None
    benign = run.P.rows if full else batch.X
    harmful = run.H.rows if full else run.X_H[rows_h]
    if s.step == "rule":
        moved = _ruled(run, theta - lr_theta * task, benign, harmful)
        # κ has no scale, but η has: the benign features keep their size, or the classifier's descent would diverge.
        return moved * (Z.norm() / (batch.X @ moved).norm()), omega_next
    moved, size = theta - s.lr * task, float(task.norm())
    for weight, part in _directions(run, theta, benign, harmful, rows_h):
        factor = weight if isinstance(weight, float | int) else size / max(float(part.norm()), 1e-300)
        moved -= s.lr * factor * part
    return moved, omega_next


def _top(A: Tensor) -> float:
    """``σ_1(A)²``, from the smaller Gram matrix."""
    gram = A @ A.T if A.shape[0] <= A.shape[1] else A.T @ A
    return float(torch.linalg.eigvalsh(gram)[-1])


def _directions(
    run: _Run, theta: Tensor, benign: Tensor, harmful: Tensor, rows_h: Tensor
) -> Iterator[tuple[float | str, Tensor]]:
    """What each method subtracts in addition to the task's gradient, with its weight."""
    s = run.settings
    if run.method == "imma":
        assert run.y_H is not None
        leaf = theta.clone().requires_grad_(True)
        (rise,) = torch.autograd.grad(adapted_loss(leaf, run.X_H[rows_h], run.y_H[rows_h], s.inner_steps), leaf)
        yield s.harmful_weight, -rise
    elif run.method == "opt_kappa":
        yield s.benign_weight, log_kappa_gradient(benign, benign @ theta)
        yield s.harmful_weight, -log_kappa_gradient(harmful, harmful @ theta)
    else:
        Z = harmful @ theta
        spectrum = feature_spectrum(Z)
        yield s.harmful_weight, direction(theta, Z, spectrum.left, ill_weights(spectrum.values))
        if run.method == "kappa":
            Z = benign @ theta
            spectrum = feature_spectrum(Z)
            weights = well_weights(spectrum.values, theta.shape[0])
            yield s.benign_weight, direction(theta, Z, spectrum.left, weights)


def _ruled(run: _Run, theta: Tensor, benign: Tensor, harmful: Tensor) -> Tensor:
    """Steps of R_well and R_ill by the rules."""
    growth, dim = GROWTH, theta.shape[0]

    if run.method == "kappa":
        Z = benign @ theta
        spectrum = feature_spectrum(Z)
        step, weights = well_step(spectrum.values, dim), well_weights(spectrum.values, dim)
        scale = (1 - 2 * step * weights * spectrum.values).square() * spectrum.values
        gain = spectrum.kappa / float(scale.max() / scale.min())
        theta = subtract(theta, (Z, spectrum.left, step * weights))
        growth = min(gain**SHARE, GROWTH)
    if growth <= 1 + 1e-9:
        return theta
    Z = harmful @ theta
    spectrum = feature_spectrum(Z)
    if spectrum.kappa > _KAPPA_LIMIT:
        return theta
    step, weights = ill_step(spectrum.values, growth), ill_weights(spectrum.values)
    return subtract(theta, (Z, spectrum.left, step * weights))
