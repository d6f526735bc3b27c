"""The QR factor of a whole data set, folded in batch by batch.

``R ← qr([R; Z_batch]).R`` keeps ``RᵀR = ZᵀZ`` with ``R`` of at most ``D`` rows: the singular values of ``R`` are those
of all rows seen so far, at full accuracy (the squared matrix ``ZᵀZ`` would lose those below ``sqrt(eps)·σ_max``), in
memory that does not grow with the number of rows. Factors of several processes merge the same way.

A column of ones goes first: below its row stands the factor of ``Z − mean``, that of a probe with an intercept.
"""

from typing import Any

import torch
from torch import Tensor

from hf_immunize.errors import ArgumentError, RankError, ShapeError
from hf_immunize.spectra.checks import FLOATS, as_matrix, check_count, check_dtype, decomposing
from hf_immunize.spectra.conditioning import Conditioning, singular_values, summarize_spectrum


# Rows gathered before a fold, in multiples of D. A QR costs 2(D + B)D² for B new rows: small blocks pay for the old
# factor again and again, large ones only cost memory (`make bench PARTS=streaming` shows the curve).
_BLOCK_PER_DIM = 8
_BUFFER_ENTRIES = 2**25  # 256 MiB of float64, beyond which the block shrinks, to no less than two times D


class FeatureFactor:
    """Streaming QR factor of features ``Z`` of shape ``(N, D)``, in float64.

    Args:
        block_rows: Rows to gather before folding them in. Defaults to eight times the feature dimension.

    Attributes:
        num_samples: N, the rows folded in so far.
        dim: D, or None before the first batch.
        produced_dtype: The coarsest dtype that a batch came in (or was declared to come in); decides the rank rule.

    Example:
        >>> import torch
        >>> Z = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
        >>> factor = FeatureFactor()
        >>> for batch in Z.split(32):
        ...     _ = factor.update(batch)
        >>> factor.num_samples, factor.conditioning().rank
        (100, 5)
    """

    def __init__(self, block_rows: int | None = None) -> None:
        if block_rows is not None:
            check_count(block_rows, "block_rows")
        self.num_samples = 0
        self.dim: int | None = None
        self.produced_dtype: torch.dtype | None = None
        self._block_rows = block_rows
        # Column-major, as LAPACK wants it: the factor's rows first, then those waiting to be folded in.
        self._buffer: Tensor | None = None
        self._filled = 0
        self._folded = True
        self._folds = 0
        # Of the rows seen so far, once asked for: references are asked at every evaluation.
        self._sigma: dict[bool, Tensor] = {}
        self._directions: tuple[Tensor, Tensor] | None = None

    def update(self, features: Any, produced_dtype: torch.dtype | None = None) -> "FeatureFactor":
        """Fold in a batch.

        Args:
            features: Shape ``(n, D)``, any real floating-point dtype, on any device; detached.
            produced_dtype: The dtype in which they were computed, where they have been cast since.

        Returns:
            The factor itself.

        Raises:
            ShapeError, NonFiniteError: If they are not ``(n, D)`` as earlier batches, or hold NaN or infinity.
        """
        features = as_matrix(features, f"features (batch after {self.num_samples} rows)")
        self._append(features, features.new_ones(len(features)), check_dtype(produced_dtype) or features.dtype)
        self.num_samples += features.shape[0]
        return self

    def merge(self, other: "FeatureFactor") -> "FeatureFactor":
        """Fold in the factor of other rows of the same dimension, as of another process; returns the factor itself."""
        if not isinstance(other, FeatureFactor):
            raise ArgumentError(
                f"Expected a FeatureFactor to merge, found {type(other).__name__}. Use update(features)."
            )
        if other.produced_dtype is None:
            return self
        whole = other._whole()
        self._append(whole[:, 1:], whole[:, 0], other.produced_dtype)
        self._folds += other._folds
        self.num_samples += other.num_samples
        return self

    def singular_values(self, *, intercept: bool = False) -> Tensor:
        """Singular values of all rows seen so far, descending, float64, shape ``(min(N, D),)``.

        With ``intercept``, of ``Z − mean``, shape ``(min(N − 1, D),)``.
        """
        if intercept not in self._sigma:
            whole = self._whole()
            part = whole[1:, 1:] if intercept else whole[:, 1:]
            # One more row than columns, whose singular value is zero, is the ones'.
            self._sigma[intercept] = singular_values(part) if len(part) else part.new_zeros(0)
        return self._sigma[intercept].clone()

    def directions(self) -> tuple[Tensor, Tensor]:
        """Singular values ``(r,)`` and right singular vectors ``(D, r)`` of ``Z − mean`` that the rank rule keeps."""
        if self._directions is not None:
            return self._directions
        part = self._whole()[1:, 1:].cpu()
        with decomposing("a factor"):
            _, s, Vh = torch.linalg.svd(part, full_matrices=False)
        self._sigma.setdefault(True, s)
        try:
            kept = s > self.conditioning(intercept=True).cutoff
        except RankError:  # all rows are the same
            kept = torch.zeros_like(s, dtype=torch.bool)
        self._directions = s[kept], Vh[kept].mT
        return self._directions

    def conditioning(
        self, reference: "Conditioning | FeatureFactor | None" = None, *, intercept: bool = False
    ) -> Conditioning:
        """Conditioning of ``ZᵀZ`` over all rows seen so far (see `feature_conditioning`).

        Args:
            reference: The same data through the reference weights, as a factor or its conditioning.
            intercept: Of ``Z_cᵀZ_c`` instead: of a probe with an intercept.

        Returns:
            `Conditioning`; a bound where the rank is below the reference's.

        Raises:
            RankError, ShapeError: If all features are zero, without a reference, or it is of another shape.
        """
        if isinstance(reference, FeatureFactor):
            reference = reference.conditioning(intercept=intercept)
        sigma = self.singular_values()
        centred = self.singular_values(intercept=True)
        assert self.dim is not None and self.produced_dtype is not None  # singular_values() raised otherwise
        described = self.num_samples, self.dim, self.produced_dtype, reference
        return summarize_spectrum(sigma, *described, folds=self._folds, centred=centred, intercept=intercept)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that `from_state_dict` restores, ready for safetensors."""
        return {
            "factor_with_ones": self._whole().contiguous(),
            "num_samples": torch.tensor(self.num_samples),
            "folds": torch.tensor(self._folds),
            "produced_eps": torch.tensor(torch.finfo(self.produced_dtype or torch.float64).eps, dtype=torch.float64),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> "FeatureFactor":
        """Restore a factor from the tensors of `state_dict`; ArgumentError where they are not such."""
        try:
            rows = as_matrix(state["factor_with_ones"], "a stored factor")
            samples, folds, eps = (float(state[name]) for name in ("num_samples", "folds", "produced_eps"))
        except (TypeError, LookupError, ValueError, RuntimeError) as error:
            raise ArgumentError(
                f"Expected what FeatureFactor.state_dict gives, found {type(state).__name__} ({error!r:.100})."
            ) from error
        if not (samples >= 1 and folds >= 0 and eps > 0):
            raise ArgumentError(f"Expected a factor of at least one row, found {samples:g} rows, {folds:g} folds.")
        factor = cls()
        dtype = min(FLOATS, key=lambda dtype: abs(torch.finfo(dtype).eps / eps - 1.0))
        factor._append(rows[:, 1:], rows[:, 0], dtype)
        factor.num_samples, factor._folds = int(samples), int(folds)
        return factor

    def _whole(self) -> Tensor:
        """The factor of ones and features, ``(min(N, D + 1), D + 1)``."""
        if self._buffer is None:
            raise RankError("Expected at least one batch of features, found none. Call update(features) first.")
        if not self._folded:
            self._fold()
        return self._buffer[:, : self._filled].mT.clone()

    def _append(self, rows: Tensor, ones: Tensor, dtype: torch.dtype) -> None:
        dim = rows.shape[1]
        if self.dim not in (None, dim):
            raise ShapeError(
                f"Expected features of dimension {self.dim} as in earlier batches, found {dim}. "
                "Use one FeatureFactor for each layer and model."
            )
        if self.produced_dtype is None or torch.finfo(dtype).eps > torch.finfo(self.produced_dtype).eps:
            self.produced_dtype = dtype
        self.dim, self._sigma, self._directions = dim, {}, None
        if self._buffer is None:
            block = self._block_rows or max(2 * dim, min(_BLOCK_PER_DIM * dim, _BUFFER_ENTRIES // dim), 256)
            # Features from a device without float64 (MPS) are folded on the CPU.
            device = torch.device("cpu") if rows.device.type == "mps" else rows.device
            self._buffer = torch.empty(dim + 1, dim + 1 + block, dtype=torch.float64, device=device)
        room = self._buffer.shape[1] - dim - 1
        for part, one in zip(rows.detach().split(room), ones.detach().split(room), strict=True):
            if self._filled + len(part) > self._buffer.shape[1]:
                self._fold()
            new = slice(self._filled, self._filled + len(part))
            self._buffer[1:, new], self._buffer[0, new] = part.mT, one
            self._filled += len(part)
            self._folded = False

    def _fold(self) -> None:
        assert self._buffer is not None
        with torch.autocast(self._buffer.device.type, enabled=False):
            factor = torch.linalg.qr(self._buffer[:, : self._filled].mT, mode="r").R
        self._filled = factor.shape[0]
        self._buffer[:, : self._filled] = factor.mT
        self._folded = True
        self._folds += 1
