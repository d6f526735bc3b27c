"""Attacks on features: closed forms and solvers, which count no steps, and descent, which ill-conditioning slows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, hardshrink, normalize, one_hot

from hf_immunize.attacks.attacker import Attacker, Found, Part, ProbeBudget, ProbeData, accuracy, best_index, log_steps
from hf_immunize.linear.probe import descent_residuals


S = TypeVar("S")


def _choose(
    data: ProbeData,
    budget: ProbeBudget,
    seed: int,
    settings: list[S],
    read: Callable[[Part, list[S]], list[float]],
    describe: Callable[[S], dict[str, Any]],
    path: bool = False,
) -> Found:
    """What the setting that validation prefers reads with all training rows."""
    name = read.__qualname__
    # On a path each setting starts from the one before; that is most of the cost, so it is chosen in float32.
    part = data.tuning(seed, budget.validation_fraction, torch.float32 if path else torch.float64)
    tried = data.keep(seed, name, lambda: read(part, settings))
    best = best_index(tried)
    used = settings[0 if path else best : best + 1]
    value = data.keep(None, (name, best), lambda: read(data.whole(), used)[-1])
    return Found(value, settings=describe(settings[best]), trials=len(settings))


def ridge(data: ProbeData, budget: ProbeBudget, seed: int) -> Found:
    """Ridge regression on one-hot targets in closed form, with an intercept, over a wide range of strengths."""

    def read(part: Part, strengths: list[float]) -> list[float]:
        return filter_accuracies(part, [_shrinkage(part, strength) for strength in strengths])

    strengths = [10.0**power for power in range(2, -budget.ridge_decades - 1, -1)]
    return _choose(data, budget, seed, strengths, read, lambda strength: {"relative_strength": strength})


def _shrinkage(part: Part, strength: float) -> Tensor:
    """Ridge's filter, ``s²/(s² + λσ²)`` written so that nothing underflows."""
    s = part.spectrum.s
    relative = (s / s[0]).double().square() if len(s) else s.double()
    return (relative / (relative + strength)).to(s.dtype)


def few_images(data: ProbeData, budget: ProbeBudget, seed: int) -> Found:
    """Ridge on ever more of the labelled images, drawn class by class: how many the features save."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(data.y), generator=generator)
    # Each image's place within its class: the first of every class come first.
    places = (one_hot(data.y[drawn], data.num_classes).cumsum(dim=0) - 1).gather(1, data.y[drawn, None])[:, 0]
    order, least = drawn[places.argsort(stable=True)], min(len(data.y), 2 * data.num_classes)
    counts = sorted({round(count) for count in np.geomspace(least, len(data.y), 8)})
    curve = []
    for count in counts:
        rows = order[:count]
        part = ProbeData(data.Z[rows], data.y[rows], data.Z_test, data.y_test, data.num_classes)
        curve.append(ridge(part, budget, seed).accuracy or 0.0)
    return Found(curve[-1], counts, curve)


def ridge_head(data: ProbeData, seed: int) -> tuple[Tensor, Tensor]:
    """Weights ``(C, D)`` and intercept ``(C,)`` of ridge with all training rows, its strength by validation."""
    part, strength = data.whole(), ridge(data, ProbeBudget(), seed).settings["relative_strength"]
    weight, bias = _filtered(part, _shrinkage(part, strength))
    return (part.spectrum.V @ weight).mT, bias


def whitening(data: ProbeData, budget: ProbeBudget, seed: int) -> Found:
    """Least squares on the leading k principal directions, each scaled to the same variance, so that κ = 1."""

    def read(part: Part, counts: list[int]) -> list[float]:
        s = part.spectrum.s
        return filter_accuracies(part, [(torch.arange(len(s)) < count).to(s.dtype) for count in counts])

    counts = sorted({max(1, round(k)) for k in np.geomspace(1, min(data.Z.shape), 24)})
    return _choose(data, budget, seed, counts, read, lambda count: {"directions": count})


def filter_accuracies(part: Part, filters: list[Tensor]) -> list[float]:
    """Accuracy of the filtered least squares, for each filter."""
    projected = part.Z_test @ part.spectrum.V
    found = (_filtered(part, h) for h in filters)
    return [accuracy(projected @ weight + bias, part.y_test) for weight, bias in found]


def _filtered(part: Part, h: Tensor) -> tuple[Tensor, Tensor]:
    """``diag(h/s) Uᵀ(Y − 1bᵀ)``, the weights ``(r, C)`` in the eigenbasis, and an unshrunk intercept ``b``."""
    # 1ᵀ(I − U diag(h) Uᵀ)(Y − 1bᵀ) = 0 gives b without a decomposition of centred features.
    targets, (U, s, _) = part.targets, part.spectrum
    ones = part.Z.new_ones(len(part.Z))
    ones_inside = U.mT @ ones
    rest = ones - U @ (h * ones_inside)
    room = float(rest @ ones)
    # Features that span the constant leave nothing for an intercept.
    bias = rest @ targets / room if room > len(ones) * 1e-6 else torch.zeros_like(targets[0])
    return (h / s)[:, None] * (U.mT @ targets - ones_inside[:, None] * bias), bias


def lda(data: ProbeData, budget: ProbeBudget, seed: int) -> Found:
    """Linear discriminant analysis in closed form, over shrinkages of the covariance within classes."""
    shrinkages = [10.0**power for power in range(0, -13, -1)]
    return _choose(data, budget, seed, shrinkages, _discriminate, lambda value: {"shrinkage": value})


def _discriminate(part: Part, shrinkages: list[float]) -> list[float]:
    counts = torch.bincount(part.y, minlength=part.num_classes).to(part.Z.dtype)
    centre = part.Z.mean(dim=0)
    Z, Z_test = part.Z - centre, part.Z_test - centre
    means = part.targets.mT @ Z / counts.clamp_min(1)[:, None]
    within = Z - means[part.y]
    values, V = torch.linalg.eigh(within.mT @ within / len(Z))
    floor = float(values.clamp_min(0).mean()) or float(Z.square().mean()) or 1.0
    means, tests = means @ V, Z_test @ V
    # Classes without a row to learn from are never named.
    prior = torch.where(counts > 0, (counts / counts.sum()).clamp_min(1e-30).log(), -torch.inf)
    found = []
    for shrinkage in shrinkages:
        inverse = 1 / ((1 - shrinkage) * values.clamp_min(0) + shrinkage * floor)
        scores = tests @ (means * inverse).mT - 0.5 * (means.square() * inverse).sum(dim=1)
        found.append(float(((scores + prior).argmax(dim=1) == part.y_test).double().mean()))
    return found


def lbfgs(data: ProbeData, budget: ProbeBudget, seed: int) -> Found:
    """Softmax regression by L-BFGS on standardized features, over penalties, each from the last one's weights."""

    def read(part: Part, penalties: list[float]) -> list[float]:
        return softmax_path(part.standardized(), penalties, max(1, budget.iterations // 3))

    return _choose(data, budget, seed, [1e-1, 1e-2, 1e-3], read, lambda value: {"penalty": value}, path=True)


def softmax_path(part: Part, penalties: list[float], iterations: int) -> list[float]:
    """Accuracy of softmax regression with the mean loss plus ``penalty/2D · ‖W‖²``, for falling penalties."""
    d = part.Z.shape[1]
    weight = part.Z.new_zeros(d, part.num_classes, requires_grad=True)
    bias = part.Z.new_zeros(part.num_classes, requires_grad=True)
    values = []
    for penalty in penalties:
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=1e-5
        )

        def loss(penalty: float = penalty, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = cross_entropy(part.Z @ weight + bias, part.y) + penalty / (2 * d) * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        with torch.no_grad():
            values.append(accuracy(part.Z_test @ weight + bias, part.y_test))
    return values


_NEIGHBOURS = (1, 3, 5, 10, 20, 50)


def knn(data: ProbeData, budget: ProbeBudget, seed: int) -> Found:
    """K nearest neighbours on three views: cosine, standardized, and whitened, which undoes any invertible map."""
    most = len(data.tuning(seed, budget.validation_fraction).Z)
    settings = [(view, k) for view in ("cosine", "standardized", "whitened") for k in _NEIGHBOURS if k <= most]
    return _choose(data, budget, seed, settings, _vote, lambda chosen: {"view": chosen[0], "k": chosen[1]})


def _vote(part: Part, settings: list[tuple[str, int]]) -> list[float]:
    nearest = cache(lambda view: _neighbours(part, view))
    values = []
    for view, k in settings:
        votes = one_hot(part.y[nearest(view)], part.num_classes).float()
        # Of classes with as many votes, the one of the nearest neighbour.
        values.append(accuracy(votes[:, :k].sum(dim=1) + 0.5 * votes[:, 0], part.y_test))
    return values


def _neighbours(part: Part, view: str) -> Tensor:
    part = part.standardized() if view == "standardized" else part
    train, test = part.Z, part.Z_test
    if view == "whitened":
        train, test = part.spectrum.U, part.Z_test @ (part.spectrum.V / part.spectrum.s)
    if view != "standardized":
        train, test = normalize(train, dim=1), normalize(test, dim=1)
    most = min(max(_NEIGHBOURS), len(train))
    return torch.cat([torch.cdist(rows, train).topk(most, largest=False).indices for rows in test.split(1024)])


# Descent: steps, counted


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


# ---- gradient descent of least squares, in the eigenbasis of ZᵀZ: 100,000 steps cost as much as one on the features


def descent_weights(part: Part, steps: list[int], first: int = 0) -> list[Tensor]:
    """Weights ``(r, C)`` in the eigenbasis after steps of gradient descent with exact line search, as in the paper."""
    U, s, _ = (side[..., first:] for side in part.spectrum)
    optimum = U.mT @ part.targets / s[:, None]
    residuals = descent_residuals(s, optimum.square().sum(dim=1), steps)
    return [(1 - left)[:, None] * optimum for left in residuals]


def descent_curve(part: Part, steps: list[int], first: int = 0) -> list[float]:
    """Accuracy after these steps, without the leading directions before the `first` one."""
    projected = part.Z_test @ part.spectrum.V[:, first:]
    return [accuracy(projected @ weight, part.y_test) for weight in descent_weights(part, steps, first)]


def gd_line_search(data: ProbeData, budget: ProbeBudget, seed: int) -> Found:
    """Gradient descent, stopped where validation says; the curve is that of all training rows, whatever the seed."""
    steps = log_steps(max(budget.descent_steps, 2))
    tried = descent_curve(data.tuning(seed, budget.validation_fraction), steps)
    curve = data.keep(None, ("descent", budget), lambda: descent_curve(data.whole(), steps))
    stop = best_index(tried)
    return Found(curve[stop], steps, curve, {"stop": steps[stop]})


# Leading principal directions that are projected out, of which validation chooses.
_REMOVED = (0, 1, 2, 4, 8, 16)


def deflated(data: ProbeData, budget: ProbeBudget, seed: int) -> Found:
    """Gradient descent after centring and without the leading directions: for features that one direction rules."""
    steps = log_steps(max(budget.descent_steps, 2))

    def centred(part: Part) -> Part:
        return part.mapped(part.Z.mean(dim=0), 1.0)

    part = centred(data.tuning(seed, budget.validation_fraction))
    counts = [count for count in _REMOVED if count < max(1, len(part.spectrum.s))]
    tried = [descent_curve(part, steps, count) for count in counts]
    best = best_index([max(curve) for curve in tried])
    whole = data.keep(None, "centred", lambda: centred(data.whole()))
    curve, stop = descent_curve(whole, steps, counts[best]), best_index(tried[best])
    settings = {"directions_removed": counts[best], "stop": steps[stop]}
    return Found(curve[stop], steps, curve, settings, trials=len(counts))


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
    def tune() -> tuple[list[float], list[list[float]], list[int], list[float], float, float]:
        # In float32, whatever the attack's precision: a rate is no matter of digits, and this is most of the cost.
        part = prepare(data.tuning(seed, budget.validation_fraction, torch.float32))
        rates = [natural_rate(part) * multiple for multiple in budget.rates]
        blind = float(part.y_test.bincount().max() / len(part.y_test))
        tried, steps, losses = _descend(part, rates, max(1, budget.steps // 2), budget.batch_size, seed, update)
        return rates, tried, steps, losses, blind, math.sqrt(blind * (1 - blind) / len(part.y_test))

    rates, tried, trial_steps, losses, blind, spread = data.keep(seed, (update, prepare), tune)
    untrained = math.log(data.num_classes)
    best = _best_rate(tried, losses, untrained, spread)
    chosen, part = rates[best : best + 1], prepare(data.whole())
    (curve,), steps, (loss,) = _descend(part, chosen, budget.steps, budget.batch_size, seed, update)
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
    part: Part, rates: list[float], last: int, batch_size: int, seed: int, update: Update
) -> tuple[list[list[float]], list[int], list[float]]:
    """Accuracy along the way, after which steps, and the last batches' loss, for all rates at once (one product)."""
    count, classes, targets = len(rates), part.num_classes, part.targets
    n, d = part.Z.shape
    weight, bias = part.Z.new_zeros(d, classes * count), part.Z.new_zeros(1, classes * count)
    states: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    wide = torch.tensor(rates, dtype=part.Z.dtype).repeat_interleave(classes)
    curves: list[list[float]] = [[] for _ in range(count)]
    steps = log_steps(last)
    wanted = set(steps)
    # Products of numbers below this are subnormal, many times slower to compute with, and change nothing.
    smallest = 1e3 * torch.finfo(part.Z.dtype).tiny ** 0.5
    recent: list[Tensor] = []
    for step, rows in enumerate(minibatches(n, batch_size, last, seed), start=1):
        Z = part.Z[rows]
        logits = (Z @ weight + bias).view(len(rows), count, classes)
        if step > last - 10:
            recent.append(-(logits.log_softmax(dim=2) * targets[rows][:, None]).sum(dim=2).mean(dim=0))
        residual = ((logits.softmax(dim=2) - targets[rows][:, None]) / len(rows)).reshape(len(rows), -1)
        residual = hardshrink(residual, smallest)
        now = wide * (1 - (step - 1) / last)
        weight = update(weight, Z.mT @ residual, states[0], step, now)
        bias = update(bias, residual.sum(dim=0, keepdim=True), states[1], step, now)
        if step in wanted:
            scores = (part.Z_test @ weight + bias).view(-1, count, classes)
            for index in range(count):
                curves[index].append(accuracy(scores[:, index], part.y_test))
    return curves, steps, torch.stack(recent).mean(dim=0).tolist()


# ---- an MLP head

_HIDDEN = 128


def mlp(data: ProbeData, budget: ProbeBudget, seed: int) -> Found:
    """A network with one hidden layer of 128 ReLU on standardized features, AdamW, cosine schedule."""
    rates = (1e-3, 5e-3)

    def tune() -> list[tuple[list[float], list[int]]]:
        part = data.tuning(seed, budget.validation_fraction, torch.float32).standardized()
        return [_train_mlp(part, rate, budget, seed) for rate in rates]

    tried = data.keep(seed, "mlp", tune)
    best = best_index([max(curve) for curve, _ in tried])
    curve, steps = _train_mlp(data.whole().standardized(), rates[best], budget, seed)
    stop = _same_part_of_the_way(*tried[best], steps)
    settings = {"learning_rate": rates[best], "hidden": _HIDDEN, "stop": steps[stop]}
    return Found(curve[stop], steps, curve, settings, trials=len(rates))


def _train_mlp(part: Part, rate: float, budget: ProbeBudget, seed: int) -> tuple[list[float], list[int]]:
    """Accuracy along the way, and after which steps."""
    generator = torch.Generator().manual_seed(seed)
    d, dtype, classes = part.Z.shape[1], part.Z.dtype, part.num_classes
    # Drawn in float64, so that the same seed means the same start in any precision.
    shapes = ((d, _HIDDEN, math.sqrt(2 / d)), (_HIDDEN, classes, math.sqrt(1 / _HIDDEN)))
    drawn = [torch.randn(a, b, generator=generator, dtype=torch.float64) * scale for a, b, scale in shapes]
    W1, W2 = (weight.to(dtype).requires_grad_() for weight in drawn)
    b1, b2 = (part.Z.new_zeros(size, requires_grad=True) for size in (_HIDDEN, classes))
    optimizer = torch.optim.AdamW([W1, b1, W2, b2], lr=rate, weight_decay=0.01)
    curve, steps = [], log_steps(budget.steps)
    wanted = set(steps)
    for step, rows in enumerate(minibatches(len(part.Z), budget.batch_size, budget.steps, seed), start=1):
        optimizer.param_groups[0]["lr"] = rate * half_cosine((step - 1) / budget.steps)
        optimizer.zero_grad()
        cross_entropy((part.Z[rows] @ W1 + b1).relu() @ W2 + b2, part.y[rows]).backward()
        optimizer.step()
        if step in wanted:
            with torch.no_grad():
                curve.append(accuracy((part.Z_test @ W1 + b1).relu() @ W2 + b2, part.y_test))
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
ATTACKERS = (
    Attacker("ridge", "closed-form least squares (ridge)", "head_input", True, ridge, "quick"),
    Attacker(
        "few_images", "ridge on few labelled images", "head_input", True, few_images, "standard", counts="images"
    ),
    Attacker("whitening", "least squares on whitened features", "head_input", True, whitening, "quick"),
    Attacker("lda", "linear discriminant analysis", "head_input", True, lda, "quick"),
    Attacker("lbfgs", "L-BFGS", "head_input", False, lbfgs, "quick"),
    Attacker("knn", "k nearest neighbours", "head_input", True, knn, "quick"),
    Attacker(
        "gd_line_search", "gradient descent with exact line search", "head_input", False, gd_line_search, "quick"
    ),
    Attacker(
        "deflated_descent", "gradient descent without the leading directions", "head_input", False, deflated, "quick"
    ),
    *(
        Attacker(name, label, "head_input", False, partial(_minibatch_attack, update, rate, prepare), preset)
        for name, label, preset, update, rate, prepare in _MINIBATCH
    ),
    Attacker("mlp", "an MLP head", "head_input", False, mlp, "quick"),
)
