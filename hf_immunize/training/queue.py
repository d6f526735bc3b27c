"""Recent features, for κ of the population where a batch holds fewer samples than the features have dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_immunize.errors import ShapeError


class FeatureQueue:
    """The last rows of features, without gradient.

    A regularizer of ``[Z_batch; queue]`` estimates that of the population, with its gradient through the batch alone.
    The rows come from slightly older weights: a queue of 2,048 rows at batches of 64 spans 32 steps.

    Args:
        size: Rows to keep.

    Example:
        >>> queue = FeatureQueue(3)
        >>> queue.push(torch.tensor([[1.0], [2.0]]))
        >>> queue.join(torch.tensor([[3.0]])).flatten().tolist()
        [3.0, 1.0, 2.0]
        >>> queue.push(torch.tensor([[3.0], [4.0]]))  # the oldest row makes room
        >>> queue.join(torch.tensor([[5.0]])).flatten().tolist()
        [5.0, 2.0, 3.0, 4.0]
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._rows: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self._rows is None else len(self._rows)

    def join(self, features: Tensor) -> Tensor:
        """The batch's features and the queue's below them.

        Args:
            features: Shape ``(N, D)``.

        Returns:
            Shape ``(N + len(queue), D)``; gradient flows to the batch's rows alone.

        Raises:
            ShapeError: If the queue holds features of another dimension.
        """
        if self._rows is None:
            return features
        if self._rows.shape[1] != features.shape[1]:
            raise ShapeError(
                f"Expected features of dimension {self._rows.shape[1]}, which the queue holds, found "
                f"{features.shape[1]}: the checkpoint is of another model. Resume with the model of the interrupted "
                "run, or start anew."
            )
        return torch.cat([features, self._rows.to(features.device, features.dtype)])

    def push(self, features: Tensor) -> None:
        """Take in the rows of a step; the oldest ones make room.

        Args:
            features: Shape ``(N, D)``.
        """
        rows = features.detach()
        if self._rows is not None:
            rows = torch.cat([self._rows.to(rows.device, rows.dtype), rows])
        self._rows = rows[-self.size :].clone()

    def state_dict(self) -> dict[str, Tensor]:
        """The rows; empty before the first step."""
        return {} if self._rows is None else {"rows": self._rows}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        rows = state.get("rows")
        self._rows = None if rows is None else rows[-self.size :]
