"""κ of a long feature stream by the QR factor, against one accumulation of ZᵀZ: time, memory, accuracy."""

import subprocess
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import format_seconds, interleaved_medians
from hf_immunize.spectra.streaming import FeatureFactor


ROWS, DIM, BATCH = 100_000, 512, 256
BLOCKS = (256, 1024, 2048, 4096, 8192)
CURVE_ROWS = 24_576  # three of the largest blocks: enough for the curve, and soon done
MEMORY_ROWS = (20_000, 200_000)
WANTED_RATIO, WANTED_ERROR, KAPPA_Z = 4.0, 1e-6, 1e7
# A process of its own for each length: the peak of resident memory never falls within one. VmHWM (Linux), since
# ru_maxrss survives exec and would show the parent's peak.
MEMORY_SCRIPT = """
import sys, torch
from pathlib import Path
from hf_immunize.spectra.streaming import FeatureFactor
rows, dim, batch = map(int, sys.argv[1:])
generator = torch.Generator().manual_seed(0)
factor, made = FeatureFactor(), torch.empty(batch, dim, dtype=torch.float64)
for start in range(0, rows, batch):
    factor.update(made.normal_(generator=generator)[: min(batch, rows - start)])
factor.conditioning()
buffer = factor._buffer
peak = next(l for l in Path('/proc/self/status').read_text(encoding='utf-8').splitlines() if l.startswith('VmHWM'))
print(buffer.numel() * buffer.element_size(), int(peak.split()[1]) * 1024)
"""


def ill_conditioned(rows: int, dim: int, kappa: float) -> Tensor:
    """Float64 features with this κ(Z), singular values evenly spaced in logarithm."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, dim, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator)).Q
    sigma = torch.logspace(0, -torch.log10(torch.tensor(kappa)).item(), dim, dtype=torch.float64)
    return (left * sigma) @ right.mT


def streamed(features: Tensor, block_rows: int | None = None) -> float:
    factor = FeatureFactor(block_rows)
    for batch in features.split(BATCH):
        factor.update(batch)
    return factor.conditioning().kappa


def accumulated(features: Tensor) -> float:
    gram = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for batch in features.split(BATCH):
        gram.addmm_(batch.mT, batch)
    eigenvalues = torch.linalg.eigvalsh(gram)
    return float(eigenvalues[-1] / eigenvalues[0])


def time_routes(features: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each route, and κ(H) by both."""
    long = {"accumulated": partial(accumulated, features), "default": partial(streamed, features)}
    part = features[:CURVE_ROWS]
    short = {f"block {block}": partial(streamed, part, block) for block in BLOCKS}
    short["curve"] = partial(accumulated, part)
    kappas = {"accumulated": accumulated(features), "streamed": streamed(features)}
    return interleaved_medians(long, repeats=3) | interleaved_medians(short, repeats=3), kappas


def memory(rows: int) -> dict[str, int]:
    """Bytes of the factor's buffer and the peak of resident memory while rows are streamed that no one keeps."""
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(rows), str(DIM), str(BATCH)]
    buffer, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return {"rows": rows, "buffer_bytes": int(buffer), "peak_resident_bytes": int(peak)}


def run() -> dict[str, Any]:
    """Medians and ratios over block sizes, memory over lengths, κ by both routes."""
    medians, kappas = time_routes(ill_conditioned(ROWS, DIM, KAPPA_Z))
    ratios = {
        name: seconds / medians["curve" if name.startswith("block") else "accumulated"]
        for name, seconds in medians.items()
    }
    true = KAPPA_Z**2
    errors = {name: abs(kappa / true - 1) for name, kappa in kappas.items()}
    memories = [memory(rows) for rows in MEMORY_ROWS]
    growth = memories[1]["peak_resident_bytes"] - memories[0]["peak_resident_bytes"]
    verdicts = [
        f"time {ratios['default']:.2f}× (wanted ≤ {WANTED_RATIO:.0f}×)",
        f"κ(H) wrong by {errors['streamed']:.0e} (wanted ≤ {WANTED_ERROR:.0e}), accumulated "
        f"by {errors['accumulated']:.0e}",
        f"peak memory {growth / 2**20:+.1f} MiB for ten times the rows",
    ]
    tables = [
        {
            "title": f"κ of {ROWS:,} × {DIM} float64 features in batches of {BATCH}:",
            "columns": ["route", "time", "against accumulation"],
            "rows": [
                ["ZᵀZ accumulated, eigvalsh", format_seconds(medians["accumulated"]), "1.00×"],
                [
                    f"factor, default ({8 * DIM} rows a block)",
                    format_seconds(medians["default"]),
                    f"{ratios['default']:.2f}×",
                ],
                *[
                    [
                        f"factor, block_rows={block}, first {CURVE_ROWS:,} rows",
                        format_seconds(medians[f"block {block}"]),
                        f"{ratios[f'block {block}']:.2f}×",
                    ]
                    for block in BLOCKS
                ],
            ],
        },
        {
            "title": f"κ(H) where κ(Z) = {KAPPA_Z:.0e}, so that κ(H) = {true:.0e}:",
            "columns": ["route", "κ(H)", "relative error"],
            "rows": [[name, f"{kappas[name]:.9e}", f"{errors[name]:.1e}"] for name in kappas],
        },
        {
            "title": "Memory while rows are streamed that no one keeps, each length in a process of its own:",
            "columns": ["rows", "factor's buffer", "peak resident"],
            "rows": [
                [
                    f"{m['rows']:,}",
                    f"{m['buffer_bytes'] / 2**20:.1f} MiB",
                    f"{m['peak_resident_bytes'] / 2**20:.1f} MiB",
                ]
                for m in memories
            ],
        },
    ]
    return {
        "summary": "Medians of interleaved runs on a machine that does other work too: " + "; ".join(verdicts) + ".",
        "tables": tables,
        "seconds": medians,
        "ratios": ratios,
        "kappa": kappas,
        "relative_error": errors,
        "memory": memories,
    }
