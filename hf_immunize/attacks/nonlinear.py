"""Attackers on fixed features that are no linear probe: nearest neighbours and a small network."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_immunize.attacks.clock import Clock, half_cosine
from hf_immunize.attacks.first_order import minibatches, standardize_part
from hf_immunize.attacks.presets import ProbeBudget
from hf_immunize.attacks.probe_data import Finding, Part, ProbeData, accuracy, best_index, log_steps, one_hot


_NEIGHBOURS = (1, 3, 5, 10, 20, 50)
_HIDDEN = 128


def knn(data: ProbeData, seed: int, dtype: torch.dtype, budget: ProbeBudget) -> Finding:
    """K nearest neighbours on three views of the features, k and the view chosen by validation.

    The views: as they are with cosine distance, standardized with Euclidean distance, and whitened (which undoes any
    invertible linear map) with cosine distance.

    Args:
        data: Features and labels.
        seed: Draws the rows that k and the view are chosen on.
        dtype: Precision of all arithmetic.
        budget: `ProbeBudget.validation_fraction`.

    Returns:
        The finding, without a curve.
    """
    tuning, whole = data.tuning(seed, budget.validation_fraction, dtype), data.whole(dtype)
    counts = [k for k in _NEIGHBOURS if k <= len(tuning.Z)]
    settings = [(view, k) for view in ("cosine", "standardized", "whitened") for k in counts]
    tried = [_vote(tuning, data, seed, view, k) for view, k in settings]
    best = best_index(tried)
    view, k = settings[best]
    value = data.keep(None, ("knn", dtype, view, k), lambda: _vote(whole, data, None, view, k))
    return Finding(value, settings={"view": view, "k": k}, trials=len(settings))


def mlp(data: ProbeData, seed: int, dtype: torch.dtype, budget: ProbeBudget) -> Finding:
    """A network with one hidden layer of 128 ReLU on standardized features, AdamW, cosine schedule.

    Args:
        data: Features and labels.
        seed: Draws weights, batches and the rows that rate and stop are chosen on.
        dtype: Precision of all arithmetic.
        budget: `ProbeBudget.steps`, `ProbeBudget.batch_size`.

    Returns:
        The finding with its curve.
    """
    rates = (1e-3, 5e-3)
    # Of the time, where it is limited, the search takes one half and the attack the other.
    seconds = None if budget.seconds is None else budget.seconds / 2

    def clock(among: int) -> Clock:
        return Clock(budget.steps, None if seconds is None else seconds / among)

    def tune() -> list[tuple[list[float], list[int]]]:
        part = standardize_part(data.tuning(seed, budget.validation_fraction, torch.float32))
        return [_train_mlp(part, data.num_classes, rate, clock(len(rates)), budget.batch_size, seed) for rate in rates]

    tried = data.keep(seed, "mlp", tune)
    best = best_index([max(curve) for curve, _ in tried])
    whole = standardize_part(data.whole(dtype))
    curve, steps = _train_mlp(whole, data.num_classes, rates[best], clock(1), budget.batch_size, seed)
    # The same part of the way as in the trial, which time may have ended earlier or later.
    values, taken = tried[best]
    part_way = taken[best_index(values)] / taken[-1]
    stop = min(range(len(steps)), key=lambda index: abs(steps[index] - part_way * steps[-1]))
    settings = {"learning_rate": rates[best], "hidden": _HIDDEN, "stop": steps[stop]}
    return Finding(curve[stop], steps, curve, settings, trials=len(rates))


def _vote(part: Part, data: ProbeData, seed: int | None, view: str, k: int) -> float:
    neighbours = data.keep(seed, ("neighbours", view, part.Z.dtype), lambda: _neighbours(part, data, seed, view))
    votes = one_hot(part.y[neighbours[:, :k]], data.num_classes, torch.float32).sum(dim=1)
    # Of classes with as many votes, the one of the nearest neighbour.
    nearest = one_hot(part.y[neighbours[:, 0]], data.num_classes, torch.float32)
    return accuracy(votes + 0.5 * nearest, part.y_test)


def _neighbours(part: Part, data: ProbeData, seed: int | None, view: str) -> Tensor:
    if view == "standardized":
        part = standardize_part(part)
    train, test = part.Z, part.Z_test
    if view == "whitened":
        spectrum = data.spectrum(part, seed, part.Z.dtype)
        train, test = spectrum.U, part.Z_test @ (spectrum.V / spectrum.s)
    if view != "standardized":
        train, test = (torch.nn.functional.normalize(rows, dim=1) for rows in (train, test))
    most = min(max(_NEIGHBOURS), len(train))
    found = [torch.cdist(rows, train).topk(most, largest=False).indices for rows in test.split(1024)]
    return torch.cat(found)


def _train_mlp(
    part: Part, num_classes: int, rate: float, clock: Clock, batch_size: int, seed: int
) -> tuple[list[float], list[int]]:
    """Accuracy along the way, and after which steps."""
    generator = torch.Generator().manual_seed(seed)
    d, dtype = part.Z.shape[1], part.Z.dtype
    # Drawn in float64, so that the same seed means the same start in any precision.
    shapes = ((d, _HIDDEN, math.sqrt(2 / d)), (_HIDDEN, num_classes, math.sqrt(1 / _HIDDEN)))
    drawn = [torch.randn(a, b, generator=generator, dtype=torch.float64) * scale for a, b, scale in shapes]
    W1, W2 = (weight.to(dtype).requires_grad_() for weight in drawn)
    b1, b2 = (part.Z.new_zeros(size, requires_grad=True) for size in (_HIDDEN, num_classes))
    optimizer = torch.optim.AdamW([W1, b1, W2, b2], lr=rate, weight_decay=0.01)
    curve, steps, wanted = [], [], set(log_steps(clock.steps))
    for step, rows in enumerate(minibatches(len(part.Z), batch_size, clock.steps, seed), start=1):
        optimizer.param_groups[0]["lr"] = rate * half_cosine(clock.progress(step - 1))
        scores = (part.Z[rows] @ W1 + b1).relu() @ W2 + b2
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(scores, part.y[rows]).backward()
        optimizer.step()
        ended = clock.over(step)
        if step in wanted or ended:
            steps.append(step)
            with torch.no_grad():
                curve.append(accuracy((part.Z_test @ W1 + b1).relu() @ W2 + b2, part.y_test))
        if ended:
            break
    return curve, steps
