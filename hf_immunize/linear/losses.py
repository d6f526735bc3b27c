"""The benign task's loss and its slope with respect to the scores."""

from dataclasses import dataclass
from typing import Any

import torch

from hf_immunize.linear.checks import as_targets
from hf_immunize.spectra.checks import as_labels, as_values


@dataclass(frozen=True)
class Task:
    """Benign data with targets, for squared error or cross-entropy.

    Attributes:
        X: ``(N, D)``.
        targets: ``(N, C)`` real targets, or one-hot rows.
        classify: Softmax cross-entropy, otherwise mean squared error (summed over the C targets).
    """

    X: torch.Tensor
    targets: torch.Tensor
    classify: bool

    @property
    def width(self) -> int:
        """C."""
        return self.targets.shape[1]

    @property
    def curvature(self) -> float:
        """Largest second derivative of :meth:`loss` along one score, times what features contribute."""
        return (0.5 if self.classify else 2.0) / len(self.X)

    def rows(self, index: torch.Tensor) -> "Task":
        """The same task on some rows."""
        index = index.to(self.X.device)
        return Task(self.X[index], self.targets[index], self.classify)

    def loss(self, scores: torch.Tensor) -> torch.Tensor:
        """Mean loss of scores ``(N, C)``."""
        if self.classify:
            return -(self.targets * scores.log_softmax(1)).sum(1).mean()
        return (scores - self.targets).square().sum(1).mean()

    def slope(self, scores: torch.Tensor) -> torch.Tensor:
        """Gradient of :meth:`loss` with respect to the scores, ``(N, C)``."""
        if self.classify:
            return (scores.softmax(1) - self.targets) / len(scores)
        return 2 * (scores - self.targets) / len(scores)


def benign_task(X: torch.Tensor, y: Any) -> Task:
    """Read targets: whole numbers in one dimension are classes, everything else is regression.

    A single class is allowed (one digit's images, say) and gets a second output, so that cross-entropy is defined.

    Args:
        X: ``(N, D)`` float64.
        y: ``(N,)`` class numbers from 0 or real targets, or ``(N, C)`` real targets.

    Raises:
        ShapeError: Another number of targets than rows, or negative class numbers.

    Example:
        >>> benign_task(torch.ones(2, 1).double(), torch.tensor([0, 0])).targets
        tensor([[1., 0.],
                [1., 0.]], dtype=torch.float64)
    """
    values = as_values(y, "y_benign").detach().to(X.device)
    targets = as_targets(values, len(X), "y_benign").to(X.device)
    if values.ndim == 2 or values.is_floating_point():
        return Task(X, targets, classify=False)
    classes = as_labels(values, len(X), "y_benign")
    onehot = torch.nn.functional.one_hot(classes, max(int(classes.max()) + 1, 2))
    return Task(X, onehot.to(torch.float64), classify=True)
