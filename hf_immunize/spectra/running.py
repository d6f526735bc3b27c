"""The mean logarithm of a covariance's eigenvalues, of the latest rows: one batch has too few to show them all.

For ``S`` of ``D`` dimensions it is ``log det(S)/D``, which moves with every direction, however small its variance:
halving that of the smallest counts as much as halving that of the largest.
"""

from __future__ import annotations

import torch
from torch import Tensor


# In units of the scale: directions of less variance are rounding, and nothing is gained by moving them.
FLOOR = 1e-9


class RunningCovariance:
    """Exponentially weighted covariance of rows, which forgets all but about the last ``D`` of them.

    Older rows come from older weights: of more of them, what is lowered is hardly what is there now.

    Example:
        >>> rows = torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> rows = (rows - rows.mean(dim=0)).requires_grad_()
        >>> found = RunningCovariance().mean_log_eigenvalue(rows, torch.tensor(1.0))
        >>> wanted = torch.linalg.eigvalsh(rows.mT @ rows / 63).log().mean()
        >>> torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    """

    def __init__(self) -> None:
        self._matrix: Tensor | None = None  # (D, D) float64
        self._known = 0.0  # the share of the weights that rows have, as long as there are few

    def mean_log_eigenvalue(self, rows: Tensor, scale: Tensor) -> Tensor:
        """Take the rows in; ``log det(S/scale + FLOOR·I)/D``, whose gradient is that of an S moving as these rows do.

        Args:
            rows: ``(N, D)``, centred; on several processes, all of theirs.
            scale: 0-D, positive, the unit of variances; no gradient passes to it.

        Returns:
            0-D, float64, in the autograd graph of ``rows``; NaN where these are not finite.
        """
        kind = "cpu" if rows.device.type == "mps" else rows.device
        rows, scale = rows.to(kind, torch.float64), scale.detach().to(kind, torch.float64)
        count, dim = rows.shape
        held = rows.detach()
        freedom = max(1, count - 1)
        new = min(1.0, count / dim)
        if self._matrix is None:
            self._matrix = held.new_zeros(dim, dim)
        self._matrix = torch.addmm(self._matrix.to(held), held.mT, held, beta=1 - new, alpha=new / freedom)
        self._known = new + (1 - new) * self._known
        found = self._matrix / self._known
        # At least what rounding leaves of rows that varied far more than these: below it there is no factor.
        floor = torch.maximum(FLOOR * scale, 4 * torch.finfo(found.dtype).eps * found.trace())
        found.diagonal().add_(floor)
        # Without a look at its success, for which a GPU would have to be waited for.
        root = torch.linalg.cholesky_ex(found).L
        value = 2 * root.diagonal().log().mean() - scale.log()
        pull = torch.linalg.solve_triangular(root, rows.mT, upper=False).square().sum() / (freedom * dim)
        return value + pull - pull.detach()

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on exactly."""
        if self._matrix is None:
            return {}
        return {"matrix": self._matrix, "known": torch.tensor(self._known, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        self._matrix, self._known = (state["matrix"], float(state["known"])) if state else (None, 0.0)
