"""How long a linear probe takes: what gradient descent has fitted after some steps, and the steps to a share of it.

κ bounds the slowest direction of the features; a task is learned when the directions that hold it are. A probe with an
intercept sees ``Z_c = Z − mean``. With λ_i the eigenvalues of ``Z_cᵀZ_c`` and p_i the share of the centred targets'
energy in direction i, t steps of size η from zero have fitted ``F_t = Σ p_i (1 − (1 − ηλ_i)^{2t})`` of that energy.
Everything here is computed from (λ, p), at a cost of the rank a step, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_immunize.errors import ArgumentError, RankError
from hf_immunize.linear.inputs import as_data, as_targets, dtype_of_origin, keep_above_noise
from hf_immunize.linear.optimum import null_basis
from hf_immunize.linear.probe import line_search_factors
from hf_immunize.spectra.checks import (
    as_matrix,
    as_values,
    binary_scale,
    check_count,
    check_number,
    check_result,
    decomposing,
)
from hf_immunize.spectra.hessian_functions import without_autocast
from hf_immunize.spectra.streaming import FeatureFactor


MAX_STEPS = 100_000
# The share of what least squares fits at which evaluations count a task as probed: of networks measured, a probe then
# has about 80 % of its final accuracy above chance; the last tenths depend on directions that hold little else.
PROBED = 0.8
# Leading components that stand for the classes of images without labels, at most.
COMPONENTS = 10
# After which a probe counts as not done: a tenth of a second.
_BUDGET = 10_000
_TINY = 1e-12


@dataclass(frozen=True)
class ProbingTime:
    """Steps that a linear probe with an intercept takes.

    Attributes:
        method: "line_search", "fixed_step" or "conjugate_gradient".
        steps: Share of `attainable` to the first step that has fitted it; ``inf`` where the budget ends before.
        attainable: The fitted share that `steps` refers to, of the centred targets' energy.
        max_steps: The budget.
        curve: ``(T,)`` float64, the fitted share after steps 1 to T, where the largest share is reached or the
            budget ends.

    Example:
        >>> probing_time(torch.diag(torch.tensor([3.0, 1.0, 0.0])), torch.tensor([0, 1, 2])).steps
        {0.5: 1, 0.9: 3, 0.99: 6}
    """

    method: str
    steps: dict[float, float]
    attainable: float
    max_steps: int
    curve: Tensor = field(repr=False, compare=False)


def probing_time(
    Z: Any,
    Y: Any,
    *,
    method: str = "line_search",
    fractions: Sequence[float] = (0.5, 0.9, 0.99),
    attainable: float | None = None,
    max_steps: int = MAX_STEPS,
    produced_dtype: torch.dtype | None = None,
) -> ProbingTime:
    """Steps of a first-order method until it has fitted shares of what least squares attains.

    The squared loss ``½‖Z_c W − Y_c‖²`` from ``W = 0``, features and targets centred, which is a probe with an
    intercept. Several target columns are one problem with one step size.

    Args:
        Z: Features, ``(N, D)``.
        Y: Class numbers ``(N,)``, or targets ``(N, C)`` of any numbers.
        method: "line_search" (gradient descent with the step that lowers the loss most), "fixed_step" (gradient
            descent with the step 1/λ_1) or "conjugate_gradient".
        fractions: Shares of `attainable`, above 0 and at most 1.
        attainable: The fitted share that the fractions refer to; by default what least squares attains on these
            features. To compare features with others, give what it attains on those: collapsed features reach 90 %
            of the little they hold in one step.
        max_steps: Steps after which a share counts as not reached.
        produced_dtype: The dtype the features were computed in, where it is not the one they carry.

    Returns:
        `ProbingTime`.

    Raises:
        ShapeError, NonFiniteError: The matrices do not fit or are not finite.
        RankError: All targets are the same, so that there is nothing to learn.
        ArgumentError: An unknown method, a fraction or a number of steps out of range.

    Example:
        >>> Z = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
        >>> probing_time(Z, torch.tensor([0, 1, 2]), fractions=(0.9,)).steps
        {0.9: 3}
    """
    if method not in _METHODS:
        raise ArgumentError(f"Expected method= out of {', '.join(_METHODS)}, found {method!r}.")
    if not isinstance(fractions, list | tuple) or not fractions:
        raise ArgumentError(f"Expected fractions= as some numbers, found {fractions!r}.")
    wanted = [check_number(fraction, "fractions=", _TINY, 1) for fraction in fractions]
    if attainable is not None:
        check_number(attainable, "attainable=", _TINY, 1)
    check_count(max_steps, "max_steps=")
    return time_of_spectrum(*target_spectrum(Z, Y, produced_dtype), method, wanted, attainable, max_steps)


def time_of_spectrum(
    values: Tensor,
    shares: Tensor,
    method: str = "line_search",
    fractions: Sequence[float] = (PROBED,),
    attainable: float | None = None,
    max_steps: int = MAX_STEPS,
) -> ProbingTime:
    """`probing_time` of what `target_spectrum` or `streamed_spectrum` gives."""
    most = float(shares.sum()) if attainable is None else float(attainable)
    goal = max(fractions) * most
    curve = []
    for fitted in _METHODS[method](values.numpy(), shares.numpy()):
        curve.append(fitted)
        if fitted >= goal * (1 - 1e-12) or len(curve) == max_steps:
            break
    found = np.array(curve)
    steps: dict[float, float] = {}
    for fraction in fractions:
        reached = found >= fraction * most * (1 - 1e-12) if most > 0 else np.zeros(1, dtype=bool)
        steps[fraction] = int(reached.argmax()) + 1 if reached.any() else math.inf
    return ProbingTime(method, steps, most, max_steps, torch.from_numpy(found))


class ProbingSteps(NamedTuple):
    """Steps of a probe with an intercept to the same fitted share, by gradient descent with exact line search.

    The share is `PROBED` of what least squares fits on the starting features, or what is fitted there in `max_steps`.
    Conjugate gradient, which takes the fewest steps that any such method can, is what immunization does not stop.
    """

    before: int
    after: int | None  # None where it is not reached in `max_steps`
    max_steps: int
    targets: str  # "classes", or "components": the leading ones of the starting features, where no image has a class
    conjugate_before: int  # by conjugate gradient
    conjugate_after: int | None


class StartTimes(NamedTuple):
    """What a probe took before immunization, and the fitted share that it takes it to."""

    steps: int
    goal: float
    conjugate: int


def start_times(start: tuple[Tensor, Tensor]) -> StartTimes | None:
    """How long a probe took, from `target_spectrum`; None where there was nothing to learn."""
    if not len(start[1]):
        return None
    found = time_of_spectrum(*start, max_steps=_BUDGET)
    goal = min(PROBED * found.attainable, float(found.curve[-1]))
    conjugate = _steps_to(goal, start, "conjugate_gradient")
    return StartTimes(int(min(found.steps[PROBED], _BUDGET)), goal, conjugate or _BUDGET)


def steps_after(times: StartTimes, now: tuple[Tensor, Tensor], targets: str = "classes") -> ProbingSteps:
    """How long a probe takes to the same share, from `target_spectrum` of the same targets."""
    after, conjugate = (_steps_to(times.goal, now, method) for method in ("line_search", "conjugate_gradient"))
    return ProbingSteps(times.steps, after, _BUDGET, targets, times.conjugate, conjugate)


def _steps_to(goal: float, spectrum: tuple[Tensor, Tensor], method: str) -> int | None:
    """Steps to a fitted share; None where it is not reached."""
    if float(spectrum[1].sum()) < goal * (1 - 1e-9):
        return None  # no number of steps would do
    taken = time_of_spectrum(*spectrum, method, (1.0,), goal, _BUDGET).steps[1.0]
    return int(taken) if math.isfinite(taken) else None


def probing_metrics(times: Mapping[str, Any]) -> dict[str, float]:
    """Steps now as metrics, of "benign" and "harmful" `ProbingSteps` or their record; and how their quotient grew."""
    metrics: dict[str, float] = {}
    for side, steps in times.items():
        if steps is None:
            continue
        metrics[f"{side}_probing_of_components"] = float(steps.targets == "components")
        methods = {"probing": steps.after, "conjugate_gradient": steps.conjugate_after}
        for method, taken in methods.items() if steps.conjugate_before else [("probing", steps.after)]:
            metrics[f"{side}_{method}_steps"] = float(taken or steps.max_steps)
            metrics[f"{side}_{method}_is_lower_bound"] = float(taken is None)
    b, h = times.get("benign"), times.get("harmful")
    if b is not None and h is not None:
        grown = (h.after or h.max_steps) / h.before
        metrics["probing_time_ratio"] = grown / ((b.after or b.max_steps) / b.before)
        metrics["probing_time_ratio_is_lower_bound"] = float(h.after is None)
        metrics["probing_time_ratio_is_upper_bound"] = float(b.after is None)
    return metrics


def target_spectrum(Z: Any, Y: Any, produced_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues of ``Z_cᵀZ_c``, descending, up to a factor, and the share of the targets' energy in each direction.

    Both of shape ``(r,)``, r the rank; the shares sum to what least squares attains.
    """
    matrix = as_data(Z)
    targets = centred_targets(Y, len(matrix)).to(matrix.device)
    try:
        U, s, _, _, _ = _centred_svd(matrix, dtype_of_origin(Z, produced_dtype))
    except RankError:  # equal features hold nothing
        return targets.new_zeros(0).cpu(), targets.new_zeros(0).cpu()
    energy = (U.mT @ targets).square().sum(dim=1) / targets.square().sum()
    return s.square().cpu(), energy.cpu()


def streamed_spectrum(factor: FeatureFactor, class_sums: Tensor) -> tuple[Tensor, Tensor]:
    """`target_spectrum` of features that passed in batches, from their QR factor and ``(C, 1 + D)`` sums by class.

    The first column counts the rows of each class, the others sum their features; both are all that ``Z_cᵀY_c`` needs.
    """
    counts, sums = class_sums[:, :1].double().cpu(), class_sums[:, 1:].double().cpu()
    energy = float(counts.sum() - counts.square().sum() / counts.sum())
    return _spectrum_of(factor, sums - counts * (sums.sum(dim=0) / counts.sum()), energy)


def component_spectra(
    start: FeatureFactor, start_rows: Tensor, now: FeatureFactor, rows: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`target_spectrum` of features then and now, where no classes are known: the targets are the leading components.

    Those of the centred starting features, `COMPONENTS` of them or as many as there are, each of the same energy, as
    classes of one size have. Rows are of the same images in the same order; the factors are of these rows.
    """
    s, V = start.directions()
    count = min(COMPONENTS, len(s))
    shares, cross = torch.zeros_like(s), s.new_zeros(count, rows.shape[1])
    shares[:count] = 1 / max(count, 1)
    start_mean, mean = (of.mean(dim=0, dtype=torch.float64) for of in (start_rows, rows))
    for then, here in zip(start_rows.split(4096), rows.split(4096), strict=True):
        targets = (then.double() - start_mean) @ V[:, :count] / s[:count]
        cross += targets.mT @ (here.double() - mean)
    return (s.square(), shares), _spectrum_of(now, cross, float(count))


def _spectrum_of(factor: FeatureFactor, cross: Tensor, energy: float) -> tuple[Tensor, Tensor]:
    """From the factor of Z, ``Y_cᵀZ`` and the energy of the centred targets."""
    s, V = factor.directions()
    if energy <= 0 or not len(s):
        return s.new_zeros(0), s.new_zeros(0)
    return s.square(), (cross @ V / s).square().sum(dim=0) / energy


def centred_targets(Y: Any, rows: int) -> Tensor:
    """Targets without their mean, ``(N, C)`` float64, up to a factor; class numbers become one column a class."""
    given = as_values(Y, "Y").detach()
    if given.ndim == 1 and not given.is_floating_point() and not given.is_complex() and len(given):
        _, codes = given.unique(return_inverse=True)
        given = torch.nn.functional.one_hot(codes).to(torch.float64)
    targets = as_targets(given, rows, "Y")
    targets = targets / binary_scale(targets)
    centred = targets - targets.mean(dim=0)
    if float(centred.norm()) <= 1e-12 * float(targets.norm()):
        raise RankError("Expected at least two different targets, found all the same. There is nothing to learn.")
    return centred


def time_map(
    X_benign: Any,
    y_benign: Any,
    *,
    delta: float | None = None,
    shrinkage: float = 0.0,
    keep: int | None = None,
) -> Tensor:
    """A linear map after which a benign probe takes a few steps, and a probe of what the labels do not need many.

    In the metric of the benign data, the directions that the benign labels need stay at 1 and all others are shrunk:
    ``θ = K^{-1/2} (P + δ(I − P))``, K the Gram matrix of the centred benign features and P the projector on the
    column space of the ridge-shrunk cross-covariance with the labels, after whitening. θ is invertible, so that no
    attainable loss changes, and ``κ(θᵀKθ) = δ⁻²`` exactly where ``shrinkage`` is 0 and something is left to shrink:
    the benign condition number is not above the one before where ``δ ≥ κ(K)^{-1/2}``, the default. No harmful data
    are used: every other task of the same features is slowed as well. Not so a task of data distributed as the benign
    ones, for conjugate gradient and exact line search: to those the map leaves two eigenvalues, a matter of two steps,
    or of few. This map is this library's, not the paper's.

    Args:
        X_benign: ``(N, D)``.
        y_benign: Class numbers ``(N,)`` or targets ``(N, C)``.
        delta: δ, above 0 and at most 1.
        shrinkage: What the whitening adds to the eigenvalues of K, as a share of their mean: with few samples,
            whitening makes much of directions that hold little but noise.
        keep: At most so many directions, those that hold most of the labels; by default all, at most C − 1.

    Returns:
        θ, ``(D, D)`` float64: immunized features are ``X @ θ``.

    Raises:
        ShapeError, NonFiniteError, RankError: The data do not fit, are not finite, or there is nothing to learn.
        ArgumentError: An option out of range.

    Example:
        >>> X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        >>> Z = X.double() @ time_map(X, (X[:, 0] > 0).long(), delta=0.1)
        >>> round(float(torch.linalg.cond(Z - Z.mean(0))) ** 2, 6)  # κ of the centred problem
        100.0
    """
    matrix = as_data(X_benign, "X_benign")
    targets = centred_targets(y_benign, len(matrix)).to(matrix.device)
    U, s, V, null, unit = _centred_svd(matrix, dtype_of_origin(X_benign))
    if delta is None:
        delta = float(s[-1] / s[0])
    if not check_number(delta, "delta", 0, 1) > 0:
        raise ArgumentError("Expected delta= above 0, found 0: the map would not be invertible.")
    check_number(shrinkage, "shrinkage=", 0)
    strength = _ridge_strength(U, s, targets)
    labels = (s.square() / (s.square() + strength))[:, None] * (U.mT @ targets)
    Q, energy, _ = torch.linalg.svd(labels, full_matrices=False)
    kept = energy > energy[0] * 1e-6
    if keep is not None:
        kept[check_count(keep, "keep=") :] = False
    Q = Q[:, kept]
    scale = (s.square() + shrinkage * s.square().sum() / matrix.shape[1]).rsqrt()
    inner = delta * torch.eye(len(s), dtype=s.dtype, device=s.device) + (1 - delta) * (Q @ Q.mT)
    # What benign data never show is no larger than the least of what they do.
    theta = (V * scale) @ inner @ V.mT + delta * float(scale.min()) * (null @ null.mT)
    return check_result(theta / unit, "the map")


def _centred_svd(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """U, s, V of ``Z_c`` over a scale, above the rounding of the uncentred features; V's complement; the scale."""
    scale = binary_scale(matrix)
    matrix = matrix / scale
    with decomposing("features"):
        U, s, Vh = torch.linalg.svd(matrix - matrix.mean(dim=0), full_matrices=False)
        whole = torch.linalg.matrix_norm(matrix, 2).reshape(1)
    keep = keep_above_noise(scale * torch.cat([whole, s]), matrix.shape, dtype)[1:]
    if not keep.any():
        raise RankError("Expected at least two different samples, found all the same. Check how they were loaded.")
    V = Vh[keep].mT
    return U[:, keep], s[keep], V, null_basis(V), scale


def _ridge_strength(U: Tensor, s: Tensor, targets: Tensor) -> float:
    """The penalty with the least leave-one-out error, in closed form from the hat matrix, over nine decades."""
    inside = U.mT @ targets
    best, chosen = math.inf, float(s[0]) ** 2
    for decade in range(10):
        strength = float(s[0]) ** 2 * 10.0**-decade
        weights = s.square() / (s.square() + strength)
        leverage = (U.square() @ weights + 1 / len(U)).clamp(max=1 - 1e-9)
        error = float((((targets - U @ (weights[:, None] * inside)) / (1 - leverage)[:, None]).square()).sum())
        if error < best:
            best, chosen = error, strength
    return chosen


def fitted_fraction(Z: Tensor, Y: Any, steps: int) -> Tensor:
    """What gradient descent on a probe with an intercept has fitted after some steps, differentiable in the features.

    ``F_T = tr(Y_cᵀ(I − (I − ηG)^{2T})Y_c)/tr(Y_cᵀY_c)``, ``G = Z_cZ_cᵀ``, ``η = 1/λ_1``. Lowering it on harmful
    features slows their probe, raising it on benign ones speeds theirs. T = 1 is kernel alignment.

    Args:
        Z: Features, ``(N, D)``, any real floating-point dtype; computed in float64, on the smaller side.
        Y: Class numbers ``(N,)`` or targets ``(N, C)``; they take no gradient.
        steps: T, at least 1.

    Returns:
        0-D tensor in [0, 1], in the dtype of the features, float32 at least.

    Raises:
        ShapeError, NonFiniteError: The matrices do not fit or are not finite.
        RankError: All features or all targets are the same.
        ArgumentError: ``steps`` below 1.

    Example:
        >>> Z = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
        >>> [round(fitted_fraction(Z, torch.tensor([0, 1, 2]), T).item(), 4) for T in (1, 4, 64)]
        [0.5754, 0.7401, 1.0]
    """
    check_count(steps, "steps=")
    Z = as_matrix(Z, "Z")
    rows, columns = as_data(Z, "Z").shape
    targets = centred_targets(Y, rows).to(Z.device)
    with without_autocast(Z.device):
        wide = Z.to(torch.float64) / binary_scale(Z)
        centred = wide - wide.mean(dim=0)
        gram = centred @ centred.mT if rows <= columns else centred.mT @ centred
        top = torch.linalg.eigvalsh(gram)[-1]
        if not bool(top > 0):
            raise RankError("Expected features that differ, found all the same. Check that the network is not dead.")
        left = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) - gram / top
        # ηG Σ_j (I − ηG)^j over j < 2T loses no digit where little is fitted, as I − (I − ηG)^{2T} would.
        powers = _power_sum(left, 2 * steps)
        inside = targets if rows <= columns else centred.mT @ targets
        outside = gram @ targets if rows <= columns else inside
        fraction = (outside * (powers @ inside)).sum() / (top * targets.square().sum())
    return fraction.clamp(0.0, 1.0).to(torch.promote_types(Z.dtype, torch.float32))


def _power_sum(matrix: Tensor, count: int) -> Tensor:
    """``I + A + … + A^{count−1}``, in twice as many products as `count` has binary digits, or three times."""
    total, power = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device), matrix
    for digit in bin(count)[3:]:
        total, power = total + power @ total, power @ power
        if digit == "1":
            total, power = total + power, power @ matrix
    return total


def _fixed_step(values: np.ndarray, shares: np.ndarray) -> Iterator[float]:
    contraction = (1 - values / values[0]) ** 2 if len(values) else values
    left = shares
    while True:
        left = left * contraction
        yield float((shares - left).sum())


def _line_search(values: np.ndarray, shares: np.ndarray) -> Iterator[float]:
    q = values / values[0] if len(values) else values
    for left in line_search_factors(q, q * shares):
        yield float((shares - shares * left * left).sum())


def _conjugate_gradient(values: np.ndarray, shares: np.ndarray) -> Iterator[float]:
    q = values / values[0] if len(values) else values
    root = np.sqrt(q)
    residual = root * np.sqrt(shares)
    direction, norm = residual.copy(), float(residual @ residual)
    smallest, earlier = norm * 1e-30, np.empty((len(q), 0))
    while True:
        image = q * direction
        curvature = float(direction @ image)
        # Once nothing is left but rounding, the quotient of two roundings would be a step of any size.
        if curvature > 0 and norm > smallest and earlier.shape[1] < len(q):
            # As in exact arithmetic: rounding would have it search directions twice, later on other machines.
            earlier = np.column_stack([earlier, residual / math.sqrt(norm)])
            residual = residual - norm / curvature * image
            for _ in range(2):
                residual = residual - earlier @ (residual @ earlier)
            before, norm = norm, float(residual @ residual)
            direction = residual + norm / before * direction
        left = (residual / np.where(root > 0, root, 1.0)) ** 2
        yield float((shares - left).sum())


_METHODS: dict[str, Callable[[np.ndarray, np.ndarray], Iterator[float]]] = {
    "line_search": _line_search,
    "fixed_step": _fixed_step,
    "conjugate_gradient": _conjugate_gradient,
}
