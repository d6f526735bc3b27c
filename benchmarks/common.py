"""Timing and a description of the machine."""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def interleaved_medians(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each run. The runs take turns, so that what else the machine does burdens all alike."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gc.disable()
    try:
        for _ in range(repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in seconds.items()}


def describe_machine() -> str:
    """Processor, cores, threads and versions, in one line."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return (
        f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def network_like_features(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Float32 features such as a network's penultimate layer gives: around a mean, spectrum falling as a power law.

    The centred part has singular values ∝ i^(−0.7) in random directions; the mean is as large as its norm a sample.
    Rectified by nothing: entries keep their sign, which leaves the gap at the top to the mean alone.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    scales = torch.arange(1, columns + 1, dtype=torch.float32) ** -0.7
    centred = (torch.randn(rows, columns, generator=generator) * scales) @ directions.mT
    mean = torch.randn(columns, generator=generator)
    return centred + mean * (scales.norm() / mean.norm())


def gaussian_features(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Independent standard normal float32 features: no mean, no gap at the top, the worst case of an iteration."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def format_seconds(seconds: float) -> str:
    """Milliseconds below a second."""
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
