"""Which rectifier is switched off on harmful images: sought once, the same on all processes, kept in checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_immunize.errors import DataError
from hf_immunize.training.distributed import any_process, gather_features, process_mean
from hf_immunize.vision.relu import choke_points, find_relus


logger = logging.get_logger(__name__)


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


class RectifierChoice:
    """The last rectifier in the part that moves that no shortcut bypasses.

    The last alone: the classifier sees nothing else, and earlier ones tell harmful images less well from benign ones,
    so that switching them off costs the benign task more.

    Args:
        model: The model, without a wrapper of data parallelism.
        moving: Names of the parameters that move.

    Attributes:
        names: The rectifier's name, or none where there is no such rectifier; None before it was sought.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> choice = RectifierChoice(model, ["0.weight", "2.weight"])
        >>> choice.seek(lambda: model(torch.eye(2)), torch.device("cpu"))
        ['3']
    """

    def __init__(self, model: nn.Module, moving: list[str]) -> None:
        self.names: list[str] | None = None
        self._model = model
        self._candidates = find_relus(model, moving)

    def seek(
        self,
        features: Callable[[], Tensor],
        device: torch.device,
        sides: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ) -> list[str]:
        """Find it, on all processes at once, or tell what was found before.

        Args:
            features: Runs the model on a few images of both sides and gives the classifier's inputs, ``(N, D)``.
            device: Where processes exchange what they found.
            sides: Gives the classifier's inputs of benign and of harmful images, ``(N_P, D)`` and ``(N_H, D)``, where
                none shall be chosen if these are hardly told apart: it would be off on benign images too, or on none.

        Returns:
            One name, or none.

        Raises:
            DataError: If the images' features do not differ, here or on another process.
        """
        if self.names is None:
            found = self._sought(features, device) if self._candidates else []
            self.names = found if sides is None or not found or _are_told_apart(sides) else []
        return self.names

    def _sought(self, features: Callable[[], Tensor], device: torch.device) -> list[str]:
        found: list[str] = []
        problem = None
        try:
            found = choke_points(self._model, self._candidates, features)
        except DataError as error:
            problem = error
        # Each process tries its own images: one that stopped alone would leave the others waiting, and those
        # rectifiers count that are found by all.
        if any_process(problem is not None, device):
            raise problem or DataError("Another process found no rectifiers; its own message says why.")
        shares = process_mean(torch.tensor([float(name in found) for name in self._candidates], device=device))
        by_all = {name for name, share in zip(self._candidates, shares.tolist(), strict=True) if share == 1}
        return [name for name in found if name in by_all][-1:]

    def state_dict(self) -> dict[str, Tensor]:
        """For a resumed run: once harmful images are silenced, another search has less to tell them apart by."""
        if self.names is None:
            return {}
        return {"chosen": torch.tensor([name in self.names for name in self._candidates])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the choice of an earlier run of the same model and scope."""
        if "chosen" in state:
            chosen = state["chosen"].tolist()
            self.names = [name for name, is_chosen in zip(self._candidates, chosen, strict=True) if is_chosen]


def _are_told_apart(sides: Callable[[], tuple[Tensor, Tensor]]) -> bool:
    """Whether a rectifier could be off on harmful images alone; yes where there are too few images to tell."""
    share = share_told_apart(*sides())
    if share is None:
        logger.warning_once(
            f"objective='auto' takes 'silence' unchecked: from {LEAST_IMAGES} images a side in the first batch on "
            "(per_device_train_batch_size, harmful_batch_size) it would first see whether the model tells harmful "
            "from benign ones."
        )
        return True
    if share >= OFTEN:
        return True
    logger.warning_once(
        f"The model hardly tells harmful from benign images: at the classifier's input a ridge classifier puts "
        f"{100 * share:.0f}% of the first batch on their own side (50% is chance). Its rectifiers cannot be switched "
        "off on harmful images alone, so objective='auto' takes 'concentration'. Expect linear probes to read nearly "
        "as much as before; objective='silence' tries nonetheless."
    )
    return False
