"""Linear probes by gradient descent: the attackers that ill-conditioning slows.

Gradient descent with exact line search on the squared loss is the attacker of the paper (Zheng et al., ICML 2025); the
others minimize the cross-entropy on mini-batches, with rates that fall to zero linearly, as people do.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hf_immunize.attacks.presets import ProbeBudget
from hf_immunize.attacks.probe_data import (
    Finding,
    Part,
    ProbeData,
    Spectrum,
    accuracy,
    best_index,
    log_steps,
    one_hot,
)


class Clock:
    """How much of its budget a training has used: of its steps or of its time, whichever is further.

    A schedule that follows `progress` reaches its end under either limit, so that an attack that runs out of time is
    a whole attack of fewer steps and not the beginning of a longer one.

    Args:
        steps: Steps at most.
        seconds: Wall-clock time at most, measuring accuracy included; None: only the steps count, and results do not
            depend on the machine.

    Example:
        >>> clock = Clock(10)
        >>> clock.progress(5), clock.over(9), clock.over(10)
        (0.5, False, True)
        >>> Clock(10, seconds=0.0).over(1)
        True
    """

    def __init__(self, steps: int, seconds: float | None = None) -> None:
        self.steps, self.seconds = steps, seconds
        self._begin = time.perf_counter()

    @property
    def timed(self) -> bool:
        """Whether time may end it before its last step."""
        return self.seconds is not None

    def progress(self, done: int) -> float:
        """Part of the budget that is used, between 0 and 1.

        Args:
            done: Steps taken.

        Returns:
            The larger of the parts of steps and of time.
        """
        used = done / self.steps
        if self.seconds is not None:
            spent = time.perf_counter() - self._begin
            used = max(used, spent / self.seconds if self.seconds > 0 else 1.0)
        return min(1.0, used)

    def over(self, done: int) -> bool:
        """Whether no step is left after these; the first step is always taken."""
        return done >= 1 and self.progress(done) >= 1.0


def half_cosine(progress: float) -> float:
    """The cosine schedule: 1 at the start, 0 at the end.

    Example:
        >>> half_cosine(0.0), round(half_cosine(0.5), 3), half_cosine(1.0)
        (1.0, 0.5, 0.0)
    """
    return 0.5 * (1 + math.cos(math.pi * progress))


def gd_line_search(data: ProbeData, seed: int, dtype: torch.dtype, budget: ProbeBudget) -> Finding:
    """Gradient descent with exact line search on ``½‖ZW − Y‖²`` from ``W = 0``, stopped where validation says.

    Args:
        data: Features and labels.
        seed: Draws the rows that the stop is chosen on.
        dtype: Precision of all arithmetic.
        budget: `ProbeBudget.descent_steps`.

    Returns:
        The finding; the curve is that of all training rows and does not depend on the seed.
    """
    steps = log_steps(budget.descent_steps)
    tuning = data.tuning(seed, budget.validation_fraction, dtype)
    tried = descent_curve(tuning, data.spectrum(tuning, seed, dtype), steps, data.num_classes)
    whole = data.whole(dtype)
    curve = data.keep(
        None,
        ("gd_line_search", dtype, budget.descent_steps),
        lambda: descent_curve(whole, data.spectrum(whole, None, dtype), steps, data.num_classes),
    )
    stop = best_index(tried)
    return Finding(curve[stop], steps, curve, {"stop": steps[stop]}, trials=1)


def descent_factors(s: Tensor, weights: Tensor, steps: list[int]) -> list[Tensor]:
    r"""The filter that gradient descent with exact line search has become after given steps.

    In the eigenbasis of ``ZᵀZ`` one step multiplies the error of direction i by ``1 − α_t s_i²``, with
    ``α_t = Σ s_i⁴ p_i² w_i / Σ s_i⁶ p_i² w_i``, ``p`` the product so far and ``w_i`` the squared norm of the optimum's
    row i. So 100,000 steps cost as much as one on the features.

    Args:
        s: Singular values, ``(r,)``.
        weights: ``w``, ``(r,)``.
        steps: After which steps, ascending.

    Returns:
        ``1 − p`` for each, ``(r,)``: what part of the least-squares solution is there.

    Example:
        >>> descent_factors(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), [1])
        [tensor([0.1123, 1.0110])]
    """
    kind = s.numpy().dtype
    # Scaled so that the sixth power of the largest is 1.
    q = (s / s.max()).square().numpy() if len(s) else s.numpy()
    scale = weights / weights.max() if len(s) and float(weights.max()) > 0 else weights
    w = scale.to(s.dtype).numpy() * q * q
    p = np.ones_like(q)
    filters, wanted = [], set(steps)
    for step in range(1, (steps[-1] if steps else 0) + 1):
        gradient = w * p * p
        curvature = float(gradient @ q)
        if curvature > 0:
            p = p * (1 - kind.type(float(gradient.sum()) / curvature) * q)
        if step in wanted:
            filters.append(torch.from_numpy(1 - p))
    return filters


def descent_curve(part: Part, spectrum: Spectrum, steps: list[int], num_classes: int) -> list[float]:
    """Accuracy on the part's test rows after each of the steps of gradient descent with exact line search.

    Args:
        part: Rows to fit and to measure.
        spectrum: Decomposition of the rows to fit.
        steps: Ascending.
        num_classes: Number of classes.

    Returns:
        One accuracy a step.
    """
    optimum = spectrum.U.mT @ one_hot(part.y, num_classes, part.Z.dtype) / spectrum.s[:, None]
    projected = part.Z_test @ spectrum.V
    filters = descent_factors(spectrum.s, optimum.square().sum(dim=1), steps)
    return [accuracy(projected @ (factor[:, None] * optimum), part.y_test) for factor in filters]


def sgd(data: ProbeData, seed: int, dtype: torch.dtype, budget: ProbeBudget) -> Finding:
    """Stochastic gradient descent on the cross-entropy."""
    return _minibatch_attack(data, seed, dtype, budget, "sgd", _momentum_update(0.0), _descent_rate)


def momentum(data: ProbeData, seed: int, dtype: torch.dtype, budget: ProbeBudget) -> Finding:
    """Stochastic gradient descent with momentum 0.9."""
    return _minibatch_attack(data, seed, dtype, budget, "momentum", _momentum_update(0.9), _descent_rate)


def adam(data: ProbeData, seed: int, dtype: torch.dtype, budget: ProbeBudget) -> Finding:
    """Adam (Kingma and Ba 2015)."""
    return _minibatch_attack(data, seed, dtype, budget, "adam", _adam_update(0.0), _adam_rate)


def adamw(data: ProbeData, seed: int, dtype: torch.dtype, budget: ProbeBudget) -> Finding:
    """AdamW (Loshchilov and Hutter 2019), weight decay 0.01."""
    return _minibatch_attack(data, seed, dtype, budget, "adamw", _adam_update(0.01), _adam_rate)


def batchnorm_adamw(data: ProbeData, seed: int, dtype: torch.dtype, budget: ProbeBudget) -> Finding:
    """AdamW behind a BatchNorm without parameters, in eval mode: each feature centred and scaled to variance 1."""
    return _minibatch_attack(
        data, seed, dtype, budget, "batchnorm_adamw", _adam_update(0.01), _adam_rate, standardized=True
    )


Update = Callable[[Tensor, Tensor, dict[str, Tensor], int, Tensor], Tensor]


def standardize_part(part: Part) -> Part:
    """Both sides of a part centred and scaled by the rows to fit; constant features become 0.

    Args:
        part: Rows to fit and to measure.

    Returns:
        The part with every feature of mean 0 and variance 1 over the rows to fit.
    """
    mean, std = part.Z.mean(dim=0), part.Z.std(dim=0, unbiased=False)
    # Below this a feature is its own rounding.
    std = torch.where(std > 4 * torch.finfo(part.Z.dtype).eps * mean.abs(), std, torch.inf)
    return Part((part.Z - mean) / std, part.y, (part.Z_test - mean) / std, part.y_test)


def minibatches(count: int, batch_size: int, steps: int, seed: int) -> list[Tensor]:
    """Rows of each step: passes over the data, each in an order of its own.

    Args:
        count: Rows there are.
        batch_size: Rows a step.
        steps: Steps.
        seed: Seed of the orders.

    Returns:
        One index tensor a step.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, count)
    passes = -(-steps * size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    return list(order[: steps * size].split(size))


def _minibatch_attack(
    data: ProbeData,
    seed: int,
    dtype: torch.dtype,
    budget: ProbeBudget,
    name: str,
    update: Update,
    natural_rate: Callable[[Part, int], float],
    standardized: bool = False,
) -> Finding:
    # Of the time, where it is limited, the search takes one half and the attack the other.
    seconds = None if budget.seconds is None else budget.seconds / 2

    def tune() -> tuple[list[float], list[list[float]], list[int], list[float], float, float]:
        # In float32, whatever the attack's precision: a rate is no matter of digits, and this is most of the cost.
        part = prepare(data.tuning(seed, budget.validation_fraction, torch.float32))
        natural = natural_rate(part, data.num_classes)
        rates = [natural * multiple for multiple in budget.rates]
        blind = float(part.y_test.bincount().max() / len(part.y_test))
        clock = Clock(max(1, budget.steps // 2), seconds)
        tried, taken, losses = _descend(part, rates, data.num_classes, budget, seed, update, clock)
        return rates, tried, taken, losses, blind, math.sqrt(blind * (1 - blind) / len(part.y_test))

    prepare = standardize_part if standardized else _scale_part
    rates, tried, trial_steps, losses, blind, spread = data.keep(seed, name, tune)
    best = _best_rate(tried, losses, math.log(data.num_classes), spread)
    whole, clock = prepare(data.whole(dtype)), Clock(budget.steps, seconds)
    (curve,), steps, (loss,) = _descend(whole, rates[best : best + 1], data.num_classes, budget, seed, update, clock)
    # The same part of the way as in the trial, which was half as long.
    part_way = trial_steps[best_index(tried[best])] / trial_steps[-1]
    stop = min(range(len(steps)), key=lambda index: abs(steps[index] - part_way * steps[-1]))
    form = "standardized" if standardized else "scaled"
    settings = {"learning_rate": rates[best], "stop": steps[stop], "features": form}
    # Where even the best rate ends well above an untrained probe's loss and beats no blind guess, nothing was learned.
    worst = max(loss, losses[best], key=lambda value: value if math.isfinite(value) else math.inf)
    if not math.isfinite(worst) or (
        worst > 1.1 * math.log(data.num_classes) and max(tried[best]) <= blind + 3 * spread
    ):
        note = f"the training loss ended at {worst:.3g}, above that of an untrained probe"
        return Finding(None, settings=settings, trials=len(rates), status="diverged", note=note)
    return Finding(curve[stop], steps, curve, settings, trials=len(rates))


def _best_rate(tried: list[list[float]], losses: list[float], untrained: float, spread: float) -> int:
    """The best rate by validation; one whose loss blew up only where it is clearly better than the sound ones."""
    tops = [max(curve) for curve in tried]
    sound = [index for index, loss in enumerate(losses) if loss <= untrained]  # not a number is not sound
    if sound and max(tops[index] for index in sound) >= max(tops) - spread:
        return sound[best_index([tops[index] for index in sound])]
    return best_index(tops)


def _scale_part(part: Part) -> Part:
    """Features by one factor for all, such that their mean square is 1: the rate of the bias then fits the others."""
    size = float(part.Z.square().mean().sqrt())
    return part if size == 0 else Part(part.Z / size, part.y, part.Z_test / size, part.y_test)


def _descend(
    part: Part, rates: list[float], num_classes: int, budget: ProbeBudget, seed: int, update: Update, clock: Clock
) -> tuple[list[list[float]], list[int], list[float]]:
    """Accuracy along the way, after which steps, and the last batches' loss, for all rates at once (one product)."""
    count, width = len(rates), num_classes * len(rates)
    n, d = part.Z.shape
    weight, bias = part.Z.new_zeros(d, width), part.Z.new_zeros(1, width)
    states: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    wide = torch.tensor(rates, dtype=part.Z.dtype).repeat_interleave(num_classes)
    targets = one_hot(part.y, num_classes, part.Z.dtype)
    curves: list[list[float]] = [[] for _ in range(count)]
    steps: list[int] = []
    wanted = set(log_steps(clock.steps))
    # Products of numbers below this are subnormal, many times slower to compute with, and say nothing.
    smallest = 1e3 * torch.finfo(part.Z.dtype).tiny ** 0.5
    recent: deque[Tensor] = deque(maxlen=10)
    for step, rows in enumerate(minibatches(n, budget.batch_size, clock.steps, seed), start=1):
        Z = part.Z[rows]
        logits = (Z @ weight + bias).view(len(rows), count, num_classes)
        if clock.timed or step > clock.steps - 10:
            logs = logits.log_softmax(dim=2)
            recent.append(-(logs * targets[rows][:, None]).sum(dim=2).mean(dim=0))
        residual = ((logits.softmax(dim=2) - targets[rows][:, None]) / len(rows)).reshape(len(rows), width)
        residual = torch.nn.functional.hardshrink(residual, smallest)
        now = wide * (1 - clock.progress(step - 1))
        weight = update(weight, Z.mT @ residual, states[0], step, now)
        bias = update(bias, residual.sum(dim=0, keepdim=True), states[1], step, now)
        ended = clock.over(step)
        if step in wanted or ended:
            steps.append(step)
            scores = (part.Z_test @ weight + bias).view(-1, count, num_classes)
            for index in range(count):
                curves[index].append(accuracy(scores[:, index], part.y_test))
        if ended:
            break
    return curves, steps, torch.stack(list(recent)).mean(dim=0).tolist()


def _momentum_update(beta: float) -> Update:
    def update(weight: Tensor, gradient: Tensor, state: dict[str, Tensor], step: int, rates: Tensor) -> Tensor:
        if beta:
            state["v"] = gradient = gradient.add_(state["v"], alpha=beta) if "v" in state else gradient
        return weight - rates * gradient

    return update


def _adam_update(decay: float) -> Update:
    def update(weight: Tensor, gradient: Tensor, state: dict[str, Tensor], step: int, rates: Tensor) -> Tensor:
        if not state:
            state["m"], state["v"] = torch.zeros_like(weight), torch.zeros_like(weight)
        gradient = torch.nn.functional.hardshrink(gradient, 1e3 * torch.finfo(weight.dtype).tiny ** 0.5)
        state["m"].lerp_(gradient, 0.1)
        state["v"].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        # No floor but the smallest number: a floor of 1e-8 would stop Adam on features of tiny scale, to which it is
        # otherwise blind.
        root = (state["v"] / (1 - 0.999**step)).sqrt_().clamp_(min=torch.finfo(weight.dtype).tiny ** 0.5)
        moved = weight - (rates / (1 - 0.9**step)) * state["m"] / root
        return moved - rates * decay * weight if decay else moved

    return update


def _descent_rate(part: Part, num_classes: int) -> float:
    """``C/λ_max(ZᵀZ/N)``, by twenty steps of the power method: untrained, softmax has a curvature of about 1/C."""
    Z = part.Z
    vector = torch.ones(Z.shape[1], dtype=Z.dtype) / Z.shape[1] ** 0.5
    value = 0.0
    for _ in range(20):
        image = Z.mT @ (Z @ vector) / len(Z)
        value = float(image.norm())
        if value == 0:
            return 1.0
        vector = image / value
    return num_classes / value


def _adam_rate(part: Part, num_classes: int) -> float:
    """A step of Adam changes each weight by the rate: on features of mean square 1, logits by about as much."""
    return 1e-2
