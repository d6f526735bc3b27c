"""One step of Algorithm 1 against the same step written down straightforwardly.

Straightforward: the D×D Gram matrix of the features in float64, `eigvalsh` with autograd through it, and a solve with
`K` for the preconditioner, for both tasks. Ours: `hf_immunize.linear.algorithm`, which needs no inverse and decomposes
the smaller Gram matrix. Both compute the preconditioned directions of R_well and R_ill; the task loss is the same for
both and left out.
"""

from functools import partial

import torch

from benchmarks.common import interleaved_medians
from hf_immunize.linear.algorithm import feature_spectrum, ill_weights, subtract, well_weights


def straightforward(theta, benign, harmful):
    theta = theta.clone().requires_grad_(True)
    dim, moved = theta.shape[0], theta.detach().clone()
    for X, well in ((benign, True), (harmful, False)):
        Z = X @ theta
        H = Z.T @ Z
        values = torch.linalg.eigvalsh(H)
        if well:
            value = values[-1].square() / 2 - H.square().sum() / (2 * dim)
        else:
            rank = min(Z.shape)
            value = 1 / (H.square().sum() / (2 * rank) - values[dim - rank].square() / 2)
        gradient = torch.autograd.grad(value, theta)[0]
        # K is singular for fewer rows than columns; the identity makes the solve possible.
        K = X.T @ X + torch.eye(dim, dtype=X.dtype)
        moved -= 1e-9 * torch.linalg.solve(K, gradient)
    return moved


def ours(theta, benign, harmful):
    parts = []
    for Z, well in zip((torch.cat([benign, harmful]) @ theta).split(len(benign)), (True, False), strict=True):
        spectrum = feature_spectrum(Z)
        weights = well_weights(spectrum.values, theta.shape[0]) if well else ill_weights(spectrum.values)
        parts.append((Z, spectrum.left, 1e-9 * weights))
    return subtract(theta, *parts)


def run() -> dict:
    """Medians of both steps, mini-batch and full batch, taking turns in one process."""
    dim, generator = 784, torch.Generator().manual_seed(0)
    theta = torch.eye(dim, dtype=torch.float64)
    rows, ratios = [], []
    for name, samples, repeats, wanted in (("mini-batch", 64, 11, "≥ 20×"), ("full batch", 500, 3, "–")):
        tasks = [torch.randn(samples, dim, dtype=torch.float64, generator=generator) for _ in range(2)]
        times = interleaved_medians(
            {"straightforward": partial(straightforward, theta, *tasks), "ours": partial(ours, theta, *tasks)}, repeats
        )
        ratios.append(times["straightforward"] / times["ours"])
        milliseconds = [f"{1000 * times[key]:.1f} ms" for key in ("ours", "straightforward")]
        rows.append([name, f"{samples} + {samples}", *milliseconds, f"{ratios[-1]:.1f}×", wanted])
    return {
        "summary": (
            f"One step of Algorithm 1 on {dim} inputs, float64: {ratios[0]:.1f} times faster than the straightforward "
            f"step on a mini-batch, {ratios[1]:.1f} times on a full batch."
        ),
        "tables": [
            {
                "title": "The regularizers' preconditioned directions for both tasks, and the update of θ:",
                "columns": ["rows in a step", "benign + harmful", "ours", "straightforward", "ratio", "wanted"],
                "rows": rows,
            }
        ],
        "ratio_mini_batch": ratios[0],
        "ratio_full_batch": ratios[1],
    }


if __name__ == "__main__":
    result = run()
    print(result["summary"])
    for row in result["tables"][0]["rows"]:
        print("  ".join(f"{cell:>14s}" for cell in row))
