"""Whether features tell harmful from benign images: weights can treat images differently only where they do."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_immunize.training.distributed import gather_features, process_mean


# Fewer images of a side than this tell too little.
LEAST_IMAGES = 32
# A half is chance. Between the pairs of tasks that were tried; docs/results/networks.md has their shares.
OFTEN = 0.9
# Relative to the mean square of a row.
_RIDGE = 1e-2


def told_apart(benign: Tensor, harmful: Tensor) -> Tensor:
    """Which images a ridge classifier puts on their own side that was fitted to all others.

    Kernel ridge regression on ±1, of as many rows of each side, centred and scaled by all of them, each row's
    prediction in closed form as if it had been left out of the fit: with ``G = (K + λI)⁻¹`` it is
    ``y_i − (Gy)_i/G_ii`` (Cook & Weisberg 1982, "Residuals and Influence in Regression").

    Args:
        benign: Features, shape ``(N_P, D)``.
        harmful: Shape ``(N_H, D)``.

    Returns:
        Booleans, shape ``(2·min(N_P, N_H),)``; False where features are not finite.

    Example:
        >>> told_apart(torch.eye(4) + torch.tensor([5.0, 0, 0, 0]), torch.eye(4)).tolist()
        [True, True, True, True, True, True, True, True]
    """
    count = min(len(benign), len(harmful))
    rows = torch.cat([benign[:count], harmful[:count]]).detach().double().cpu()
    if not rows.isfinite().all():
        return torch.zeros(len(rows), dtype=torch.bool)
    rows = rows - rows.mean(0)
    sides = torch.cat([rows.new_ones(count), -rows.new_ones(count)])
    kernel = rows @ rows.mT
    size = kernel.diagonal().mean()
    if not size > 0:
        return torch.zeros(len(rows), dtype=torch.bool)
    # A constant is one more feature, of the size of all others.
    inverse = torch.linalg.inv(kernel / size + 1 + _RIDGE * torch.eye(len(rows), dtype=rows.dtype))
    predicted = sides - (inverse @ sides) / inverse.diagonal()
    return predicted * sides > 0


def share_told_apart(benign: Tensor, harmful: Tensor) -> float | None:
    """The share of all processes' images that are told apart.

    Args:
        benign: Features of this process's benign images, ``(N_P, D)``, as many on every process.
        harmful: Of its harmful ones, ``(N_H, D)``, likewise.

    Returns:
        Between 0 and 1, the same on every process; None of fewer than `LEAST_IMAGES` of a side in all.
    """
    benign, harmful = gather_features(benign.detach()), gather_features(harmful.detach())
    if min(len(benign), len(harmful)) < LEAST_IMAGES:
        return None
    share = told_apart(benign, harmful).float().mean().to(benign.device)
    # All fit the same rows, but may round differently.
    return round(float(process_mean(share)), 6)
