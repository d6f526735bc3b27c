"""One step of Algorithm 1 against the same step written down straightforwardly.

Straightforward: the D×D Gram matrix of the features in float64, `eigvalsh` with autograd through it, and a solve with
`K` for the preconditioner, for both tasks. Ours: `hf_immunize.linear.steps`, which needs no inverse and decomposes the
smaller Gram matrix. Both compute the preconditioned directions of R_well and R_ill; the task loss is the same for both
and left out.
"""

import statistics
import time

import torch

from hf_immunize.linear.steps import direction, feature_spectrum, ill_weights, subtract, well_weights


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
    for X, well in ((benign, True), (harmful, False)):
        Z = X @ theta
        spectrum = feature_spectrum(Z)
        weights = well_weights(spectrum.values, theta.shape[0]) if well else ill_weights(spectrum.values)
        parts.append((1e-9, direction(theta, Z, spectrum.left, weights)))
    return subtract(theta, parts)


def median_ms(step, *arguments, repeats):
    step(*arguments)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step(*arguments)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def run() -> dict[str, float]:
    """Median milliseconds of both steps, mini-batch and full batch, in one process."""
    dim, generator = 784, torch.Generator().manual_seed(0)
    theta = torch.eye(dim, dtype=torch.float64)
    result: dict[str, float] = {"threads": torch.get_num_threads()}
    for name, rows, repeats in (("mini-batch of 64", 64, 7), ("full batch of 500", 500, 3)):
        benign, harmful = (torch.randn(rows, dim, dtype=torch.float64, generator=generator) for _ in range(2))
        slow = median_ms(straightforward, theta, benign, harmful, repeats=max(3, repeats // 2))
        fast = median_ms(ours, theta, benign, harmful, repeats=repeats * 3)
        result |= {f"{name}: straightforward, ms": slow, f"{name}: ours, ms": fast, f"{name}: ratio": slow / fast}
    return result


if __name__ == "__main__":
    for key, value in run().items():
        print(f"{key:42s} {value:10.2f}")
