"""How the regularizers' time grows with the samples and the dimension, and from which size an iteration pays."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import format_seconds, gaussian_features, network_like_features
from benchmarks.regularizers import gradients, ours, straightforward
from hf_immunize.spectra.extremes import BOTTOM_DENSE_LIMIT, TOP_DENSE_LIMIT
from hf_immunize.spectra.krylov import largest_pair, smallest_pair
from hf_immunize.spectra.small_side import small_side


ROWS = (64, 256, 1024, 4096)
DIMS = (256, 512, 1024, 2048, 4096)
LONGEST = 20.0  # seconds that one call of the straightforward route may take
CROSSOVER = (64, 128, 192, 256, 320, 384, 512, 768)
KINDS = {"network-like": network_like_features, "iid Gaussian": gaussian_features}


def median_seconds(run: Callable[[], Any], budget: float = 1.0, most: int = 9) -> float:
    """Median of as many runs as the budget of seconds holds, one at least; the first of several warms up."""
    seconds: list[float] = []
    while len(seconds) < 1 or (sum(seconds) < budget and len(seconds) < most):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:] or seconds)


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of the logarithm of time over that of size, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(second) for second in seconds]
    return statistics.linear_regression(x, y).slope


def measure_growth() -> list[dict[str, Any]]:
    """Seconds of every route for every N and D."""
    measurements: list[dict[str, Any]] = []
    expected: dict[int, float] = {}  # of the straightforward route, by N, for the next D
    for dim in DIMS:
        features = {kind: [build(ROWS[-1], dim, seed) for seed in (0, 1)] for kind, build in KINDS.items()}
        for rows in ROWS:
            seconds: dict[str, float] = {}
            for kind, both in features.items():
                benign, harmful = (z[:rows].clone().requires_grad_() for z in both)
                seconds[kind] = median_seconds(lambda b=benign, h=harmful: gradients(ours, b, h))
            if expected.get(rows, 0.0) < LONGEST:
                naive = median_seconds(lambda b=benign, h=harmful: gradients(straightforward, b, h), most=5)
                seconds["straightforward"] = naive
                expected[rows] = 8 * naive  # twice the dimension, to the third power
            else:
                expected[rows] *= 8
            measurements.append({"N": rows, "D": dim, "seconds": seconds})
    return measurements


def measure_crossover() -> list[dict[str, Any]]:
    """Seconds of the full decomposition and of one extreme pair, by the size of the matrix."""
    measurements = []
    for size in CROSSOVER:
        seconds: dict[str, float] = {}
        for kind, build in KINDS.items():
            side = small_side(build(size, 1024, 0))
            squares = float(torch.linalg.vector_norm(side.gram)) ** 2
            slack = squares / float(side.gram.diagonal().sum()) / size  # as in R_ill
            if "full" not in seconds:
                seconds["full"] = median_seconds(lambda g=side.gram: torch.linalg.eigh(g), most=25)
            seconds[f"largest, {kind}"] = median_seconds(lambda g=side.gram: largest_pair(g, 1e-8), most=25)
            seconds[f"smallest, {kind}"] = median_seconds(
                lambda g=side.gram, s=slack: smallest_pair(g, 1e-8, s), most=25
            )
        measurements.append({"n": size, "seconds": seconds})
    return measurements


def growth_rows(measurements: list[dict[str, Any]]) -> list[list[Any]]:
    rows = []
    for m in measurements:
        s = m["seconds"]
        naive = s.get("straightforward")
        ratios = [f"{naive / s[kind]:.1f}×" if naive else "–" for kind in KINDS]
        rows.append(
            [
                f"{m['N']:,}",
                f"{m['D']:,}",
                *[format_seconds(s[kind]) for kind in KINDS],
                format_seconds(naive) if naive else f"over {LONGEST:.0f} s, not run",
                *ratios,
            ]
        )
    return rows


def exponent_rows(measurements: list[dict[str, Any]]) -> tuple[list[list[Any]], list[dict[str, Any]]]:
    """Fitted exponents, as rows of a table and as numbers."""
    rows, fits = [], []
    for name, other, values in (("D", "N", ROWS), ("N", "D", DIMS)):
        for fixed in values:
            fit: dict[str, Any] = {"in": name, "at": f"{other} = {fixed:,}"}
            for route in (*KINDS, "straightforward"):
                known = [m for m in measurements if m[other] == fixed and route in m["seconds"]]
                if len(known) > 2:
                    fit[route] = exponent([m[name] for m in known], [m["seconds"][route] for m in known])
            fits.append(fit)
            cells = [f"{fit[route]:.1f}" if route in fit else "–" for route in (*KINDS, "straightforward")]
            rows.append([f"time ∝ {name}^x", fit["at"], *cells])
    return rows, fits


def run() -> dict[str, Any]:
    """The tables of growth, of its exponents and of the crossover."""
    growth, crossover = measure_growth(), measure_crossover()
    fitted, fits = exponent_rows(growth)
    kinds = list(KINDS)
    columns = [f"largest, {kind}" for kind in kinds] + [f"smallest, {kind}" for kind in kinds]
    tables = [
        {
            "title": "R_well on benign and R_ill on harmful float32 features, forward and backward:",
            "columns": ["N", "D", *kinds, "D×D eigvalsh", *[f"ratio, {kind}" for kind in kinds]],
            "rows": growth_rows(growth),
        },
        {
            "title": "The exponent x that fits the times above best:",
            "columns": ["", "at", *kinds, "D×D eigvalsh"],
            "rows": fitted,
        },
        {
            "title": "One extreme pair of an n×n Gram matrix against its full decomposition:",
            "columns": ["n", "full", *columns],
            "rows": [
                [m["n"], format_seconds(m["seconds"]["full"]), *[format_seconds(m["seconds"][c]) for c in columns]]
                for m in crossover
            ],
        },
    ]
    summary = (
        "Everything is computed on the smaller of ZᵀZ and ZZᵀ, and of its spectrum the extreme pair alone: the "
        f"largest by an iteration beyond n = {TOP_DENSE_LIMIT}, the smallest beyond n = {BOTTOM_DENSE_LIMIT}. The "
        "straightforward route forms ZᵀZ in float64 and lets autograd run through `torch.linalg.eigvalsh`; where a "
        f"call would take more than {LONGEST:.0f} s, by the cube of the dimension, it was not run. An exponent needs "
        "three times at least. Medians of runs that do not take turns: a ratio here is rougher than in `regularizers`."
    )
    return {"summary": summary, "tables": tables, "growth": growth, "exponents": fits, "crossover": crossover}
