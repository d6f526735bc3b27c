"""Attacks by steps on features: the ones that ill-conditioning slows, and an MLP head."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, hardshrink

from hf_immunize.attacks.attacker import Attacker, Found, ProbeBudget
from hf_immunize.attacks.probe_data import Part, ProbeData, accuracy, best_index, log_steps
from hf_immunize.linear.probe import descent_residuals


class Clock:
    """How much of its steps or of its time an attack has used, whichever is further."""

    # Rates follow `progress`, so an attack that runs out of time is a complete attack of fewer steps.

    def __init__(self, steps: int, seconds: float | None = None) -> None:
        self.steps, self.seconds = steps, seconds
        self._begin = time.perf_counter()

    def progress(self, done: int) -> float:
        """Part of the budget that is used, between 0 and 1."""
        used = done / self.steps
        if self.seconds is not None:
            spent = time.perf_counter() - self._begin
            used = max(used, spent / self.seconds if self.seconds > 0 else 1.0)
        return min(1.0, used)

    def over(self, done: int) -> bool:
        """Whether no step is left; the first step is always taken."""
        return done >= 1 and self.progress(done) >= 1.0


def half_cosine(progress: float) -> float:
    """The cosine schedule: 1 at the start, 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def minibatches(count: int, batch_size: int, steps: int, seed: int) -> list[Tensor]:
    """Rows of each step: passes over the data, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, count)
    passes = -(-steps * size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    return list(order[: steps * size].split(size))


# ---- full-batch solvers of least squares, in the eigenbasis of ZᵀZ: 100,000 steps cost as much as one on the features


def descent_weights(part: Part, steps: list[int]) -> list[Tensor]:
    """Weights ``(r, C)`` in the eigenbasis after steps of gradient descent with exact line search, as in the paper."""
    optimum = part.spectrum.U.mT @ part.targets / part.spectrum.s[:, None]
    residuals = descent_residuals(part.spectrum.s, optimum.square().sum(dim=1), steps)
    return [(1 - left)[:, None] * optimum for left in residuals]


def conjugate_weights(part: Part, steps: list[int]) -> list[Tensor]:
    """Weights ``(r, C)`` after steps of conjugate gradient for ``diag(s²) W = diag(s) UᵀY``, class by class."""
    s, coefficients = part.spectrum.s, part.spectrum.U.mT @ part.targets
    top = s.max() if len(s) else torch.ones(())
    tiny = torch.finfo(s.dtype).tiny
    q = (s / top).square()[:, None]
    residual = (s / top)[:, None] * coefficients
    weight, direction = torch.zeros_like(residual), residual.clone()
    size = residual.square().sum(dim=0)
    path, wanted = [], set(steps)
    for step in range(1, (steps[-1] if steps else 0) + 1):
        image = q * direction
        curvature = (direction * image).sum(dim=0)
        # Columns that are solved no longer change.
        alpha = torch.where(curvature > 0, size / curvature.clamp_min(tiny), 0.0)
        weight = weight + alpha * direction
        residual = residual - alpha * image
        new = residual.square().sum(dim=0)
        beta = torch.where(size > 0, new / size.clamp_min(tiny), 0.0)
        direction, size = residual + beta * direction, new
        if step in wanted:
            path.append(weight / top)
    return path


def _solve(
    weights: Callable[[Part, list[int]], list[Tensor]], last: str, data: ProbeData, budget: ProbeBudget, seed: int
) -> Found:
    """Run a solver, stopped where validation says; the curve is that of all training rows, whatever the seed."""
    steps = log_steps(max(getattr(budget, last), 2))

    def curve_of(part: Part) -> list[float]:
        projected = part.Z_test @ part.spectrum.V
        return [accuracy(projected @ weight, part.y_test) for weight in weights(part, steps)]

    tried = curve_of(data.tuning(seed, budget.validation_fraction))
    curve = data.keep(None, (weights, budget, data.dtype), lambda: curve_of(data.whole()))
    stop = best_index(tried)
    return Found(curve[stop], steps, curve, {"stop": steps[stop]})


# ---- softmax regression on mini-batches

Update = Callable[[Tensor, Tensor, dict[str, Tensor], int, Tensor], Tensor]


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
        gradient = hardshrink(gradient, 1e3 * torch.finfo(weight.dtype).tiny ** 0.5)
        state["m"].lerp_(gradient, 0.1)
        state["v"].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        # No floor but the smallest number: a floor of 1e-8 would stop Adam on features of tiny scale, to which it is
        # otherwise blind.
        root = (state["v"] / (1 - 0.999**step)).sqrt_().clamp_(min=torch.finfo(weight.dtype).tiny ** 0.5)
        stepped = weight - (rates / (1 - 0.9**step)) * state["m"] / root
        return stepped - rates * decay * weight if decay else stepped

    return update


def _descent_rate(part: Part) -> float:
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
    return part.num_classes / value


def _minibatch_attack(
    update: Update,
    natural_rate: Callable[[Part], float],
    prepare: Callable[[Part], Part],
    data: ProbeData,
    budget: ProbeBudget,
    seed: int,
) -> Found:
    # Of the time, where it is limited, the search takes one half and the attack the other.
    seconds = None if budget.seconds is None else budget.seconds / 2

    def tune() -> tuple[list[float], list[list[float]], list[int], list[float], float, float]:
        # In float32, whatever the attack's precision: a rate is no matter of digits, and this is most of the cost.
        part = prepare(data.at(torch.float32).tuning(seed, budget.validation_fraction))
        rates = [natural_rate(part) * multiple for multiple in budget.rates]
        blind = float(part.y_test.bincount().max() / len(part.y_test))
        clock = Clock(max(1, budget.steps // 2), seconds)
        tried, steps, losses = _descend(part, rates, budget, seed, update, clock)
        return rates, tried, steps, losses, blind, math.sqrt(blind * (1 - blind) / len(part.y_test))

    rates, tried, trial_steps, losses, blind, spread = data.keep(seed, (update, prepare), tune)
    untrained = math.log(data.num_classes)
    best = _best_rate(tried, losses, untrained, spread)
    clock = Clock(budget.steps, seconds)
    (curve,), steps, (loss,) = _descend(prepare(data.whole()), rates[best : best + 1], budget, seed, update, clock)
    stop = _same_part_of_the_way(tried[best], trial_steps, steps)
    form = "standardized" if prepare is Part.standardized else "scaled"
    settings = {"learning_rate": rates[best], "stop": steps[stop], "features": form}
    # Where even the best rate ends well above an untrained probe's loss and beats no blind guess, nothing was learned.
    worst = max(loss, losses[best], key=lambda value: value if math.isfinite(value) else math.inf)
    if not math.isfinite(worst) or (worst > 1.1 * untrained and max(tried[best]) <= blind + 3 * spread):
        note = f"the training loss ended at {worst:.3g}, above that of an untrained probe"
        return Found(None, settings=settings, trials=len(rates), status="diverged", note=note)
    return Found(curve[stop], steps, curve, settings, trials=len(rates))


def _best_rate(tried: list[list[float]], losses: list[float], untrained: float, spread: float) -> int:
    """The best rate by validation; one whose loss blew up only where it is clearly better than the sound ones."""
    tops = [max(curve) for curve in tried]
    sound = [index for index, loss in enumerate(losses) if loss <= untrained]  # NaN is not sound
    if sound and max(tops[index] for index in sound) >= max(tops) - spread:
        return sound[best_index([tops[index] for index in sound])]
    return best_index(tops)


def _same_part_of_the_way(tried: list[float], trial_steps: list[int], steps: list[int]) -> int:
    """Index of the step that is as far as the best of the trial, which was shorter."""
    part_way = trial_steps[best_index(tried)] / trial_steps[-1]
    return min(range(len(steps)), key=lambda index: abs(steps[index] - part_way * steps[-1]))


def _descend(
    part: Part, rates: list[float], budget: ProbeBudget, seed: int, update: Update, clock: Clock
) -> tuple[list[list[float]], list[int], list[float]]:
    """Accuracy along the way, after which steps, and the last batches' loss, for all rates at once (one product)."""
    count, classes, targets = len(rates), part.num_classes, part.targets
    n, d = part.Z.shape
    weight, bias = part.Z.new_zeros(d, classes * count), part.Z.new_zeros(1, classes * count)
    states: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    wide = torch.tensor(rates, dtype=part.Z.dtype).repeat_interleave(classes)
    curves: list[list[float]] = [[] for _ in range(count)]
    steps: list[int] = []
    wanted = set(log_steps(clock.steps))
    # Products of numbers below this are subnormal, many times slower to compute with, and change nothing.
    smallest = 1e3 * torch.finfo(part.Z.dtype).tiny ** 0.5
    recent: deque[Tensor] = deque(maxlen=10)
    for step, rows in enumerate(minibatches(n, budget.batch_size, clock.steps, seed), start=1):
        Z = part.Z[rows]
        logits = (Z @ weight + bias).view(len(rows), count, classes)
        if clock.seconds is not None or step > clock.steps - 10:
            recent.append(-(logits.log_softmax(dim=2) * targets[rows][:, None]).sum(dim=2).mean(dim=0))
        residual = ((logits.softmax(dim=2) - targets[rows][:, None]) / len(rows)).reshape(len(rows), -1)
        residual = hardshrink(residual, smallest)
        now = wide * (1 - clock.progress(step - 1))
        weight = update(weight, Z.mT @ residual, states[0], step, now)
        bias = update(bias, residual.sum(dim=0, keepdim=True), states[1], step, now)
        ended = clock.over(step)
        if step in wanted or ended:
            steps.append(step)
            scores = (part.Z_test @ weight + bias).view(-1, count, classes)
            for index in range(count):
                curves[index].append(accuracy(scores[:, index], part.y_test))
        if ended:
            break
    return curves, steps, torch.stack(list(recent)).mean(dim=0).tolist()


# ---- an MLP head

_HIDDEN = 128


def mlp(data: ProbeData, budget: ProbeBudget, seed: int) -> Found:
    """A network with one hidden layer of 128 ReLU on standardized features, AdamW, cosine schedule."""
    rates = (1e-3, 5e-3)
    seconds = None if budget.seconds is None else budget.seconds / 2

    def clock(among: int) -> Clock:
        return Clock(budget.steps, None if seconds is None else seconds / among)

    def tune() -> list[tuple[list[float], list[int]]]:
        part = data.at(torch.float32).tuning(seed, budget.validation_fraction).standardized()
        return [_train_mlp(part, rate, clock(len(rates)), budget.batch_size, seed) for rate in rates]

    tried = data.keep(seed, "mlp", tune)
    best = best_index([max(curve) for curve, _ in tried])
    curve, steps = _train_mlp(data.whole().standardized(), rates[best], clock(1), budget.batch_size, seed)
    stop = _same_part_of_the_way(*tried[best], steps)
    settings = {"learning_rate": rates[best], "hidden": _HIDDEN, "stop": steps[stop]}
    return Found(curve[stop], steps, curve, settings, trials=len(rates))


def _train_mlp(part: Part, rate: float, clock: Clock, batch_size: int, seed: int) -> tuple[list[float], list[int]]:
    """Accuracy along the way, and after which steps."""
    generator = torch.Generator().manual_seed(seed)
    d, dtype, classes = part.Z.shape[1], part.Z.dtype, part.num_classes
    # Drawn in float64, so that the same seed means the same start in any precision.
    shapes = ((d, _HIDDEN, math.sqrt(2 / d)), (_HIDDEN, classes, math.sqrt(1 / _HIDDEN)))
    drawn = [torch.randn(a, b, generator=generator, dtype=torch.float64) * scale for a, b, scale in shapes]
    W1, W2 = (weight.to(dtype).requires_grad_() for weight in drawn)
    b1, b2 = (part.Z.new_zeros(size, requires_grad=True) for size in (_HIDDEN, classes))
    optimizer = torch.optim.AdamW([W1, b1, W2, b2], lr=rate, weight_decay=0.01)
    curve, steps, wanted = [], [], set(log_steps(clock.steps))
    for step, rows in enumerate(minibatches(len(part.Z), batch_size, clock.steps, seed), start=1):
        optimizer.param_groups[0]["lr"] = rate * half_cosine(clock.progress(step - 1))
        optimizer.zero_grad()
        cross_entropy((part.Z[rows] @ W1 + b1).relu() @ W2 + b2, part.y[rows]).backward()
        optimizer.step()
        ended = clock.over(step)
        if step in wanted or ended:
            steps.append(step)
            with torch.no_grad():
                curve.append(accuracy((part.Z_test @ W1 + b1).relu() @ W2 + b2, part.y_test))
        if ended:
            break
    return curve, steps


# A step of Adam changes each weight by the rate: on features of mean square 1, logits by about as much.
_MINIBATCH = [
    ("sgd", "SGD", "standard", _momentum_update(0.0), _descent_rate, Part.scaled),
    ("momentum", "SGD with momentum", "standard", _momentum_update(0.9), _descent_rate, Part.scaled),
    ("adam", "Adam", "standard", _adam_update(0.0), lambda part: 1e-2, Part.scaled),
    ("adamw", "AdamW", "quick", _adam_update(0.01), lambda part: 1e-2, Part.scaled),
    (
        "batchnorm_adamw",
        "AdamW after a BatchNorm",
        "standard",
        _adam_update(0.01),
        lambda part: 1e-2,
        Part.standardized,
    ),
]
_CG, _GD = partial(_solve, conjugate_weights, "iterations"), partial(_solve, descent_weights, "descent_steps")

ATTACKERS = (
    Attacker("conjugate_gradient", "conjugate gradient", "head_input", False, _CG, "quick"),
    Attacker("gd_line_search", "gradient descent with exact line search", "head_input", False, _GD, "quick"),
    *(
        Attacker(name, label, "head_input", False, partial(_minibatch_attack, update, rate, prepare), preset)
        for name, label, preset, update, rate, prepare in _MINIBATCH
    ),
    Attacker("mlp", "an MLP head", "head_input", False, mlp, "quick"),
)
