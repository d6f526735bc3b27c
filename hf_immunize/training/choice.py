"""What an objective looks for before the first step, once, on a sample that does not depend on the batch size.

The main process looks; what it found is kept in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_immunize.data.pairs import PairedDataset, check_one_shape
from hf_immunize.data.sources import choose
from hf_immunize.errors import DataError
from hf_immunize.training.arguments import Method
from hf_immunize.training.distributed import broadcast_from_main, is_main
from hf_immunize.training.objectives import OBJECTIVES
from hf_immunize.vision.head import HeadInput, in_eval_mode


logger = logging.get_logger(__name__)

# Images of each side that are looked at, and how many pass the model at a time.
SAMPLE, _AT_ONCE = 64, 32
# Fewer images of a side than this say too little.
LEAST_IMAGES = 32
# A half is chance. Classes of one domain lie below it, far tasks above.
MIN_SEPARABILITY = 0.9
# Relative to the mean square of a row.
_RIDGE = 1e-2


@dataclass(frozen=True)
class Choice:
    """What an objective found in a sample: inner modules to read, directions, and how separable the two sides are."""

    reads: tuple[str, ...] = ()
    directions: tuple[tuple[float, ...], ...] = ()
    separability: float | None = None

    @property
    def warning(self) -> str:
        """Why little may be reached; empty where nothing was found that says so."""
        if self.separability is None or self.separability >= MIN_SEPARABILITY:
            return ""
        return (
            "The starting model hardly separates harmful from benign images: a ridge classifier at the classifier's "
            f"input puts {100 * self.separability:.0f}% of a sample on their own side (50% is chance, "
            f"{MIN_SEPARABILITY:.0%} is enough). What is done to one side is done to the other, which limits "
            "immunization or costs benign accuracy: if either suffers, choose harmful images further from benign ones."
        )


def prepare_objective(
    method: Method,
    model: nn.Module,
    head: nn.Module,
    trainable: list[str],
    sample: Callable[[], tuple[Tensor, Tensor]],
) -> Choice:
    """What a method's objective looks for, the same on all processes; ``sample`` gives benign and harmful images."""
    if not OBJECTIVES[method.objective].needs_sample():
        return Choice()
    found: Choice | DataError | None = None
    if is_main():  # each process has images of its own in a loop of one's own
        try:
            found = _look(method, model, head, trainable, *sample())
        except DataError as error:
            found = error
    found = broadcast_from_main(found)
    if isinstance(found, DataError):
        raise found
    assert found is not None
    return found


def draw_sample(
    pairs: PairedDataset, seed: int, device: torch.device, *collate: Callable[[list[Any]], dict[str, Any]]
) -> tuple[Tensor, Tensor]:
    """Up to `SAMPLE` benign and harmful images, a function of data and seed alone; ``collate`` of each side."""
    sides = []
    for rows, gather in zip((pairs.benign, pairs.harmful), collate, strict=True):
        numbers = choose(len(rows), SAMPLE, seed) if hasattr(rows, "__len__") else range(SAMPLE)
        sides.append(gather([rows[number] for number in numbers])["pixel_values"].to(device))
    check_one_shape(
        {name: {"pixel_values": images} for name, images in zip(("benign", "harmful"), sides, strict=True)}
    )
    return sides[0], sides[1]


def _look(
    method: Method, model: nn.Module, head: nn.Module, trainable: list[str], benign: Tensor, harmful: Tensor
) -> Choice:
    def features(images: Tensor) -> Tensor:
        with in_eval_mode(model), HeadInput(head) as captured:
            model(pixel_values=images)
        return captured.features

    objective = OBJECTIVES[method.objective]
    few = torch.cat([benign[:2], harmful[:2]])
    reads = tuple(objective.find(model, trainable, lambda: features(few)))
    with torch.no_grad():
        sides = [torch.cat([features(part) for part in side.split(_AT_ONCE)]) for side in (benign, harmful)]
    found = Choice(reads, tuple(map(tuple, objective.prepare(*sides))), separability(*sides))
    if found.warning:
        logger.warning_once(found.warning)
    return found


def separable(benign: Tensor, harmful: Tensor) -> Tensor:
    """Which images a ridge classifier puts on their own side that was fitted to all others; all False if not finite.

    With ``G = (K + λI)⁻¹`` a row's prediction without it in the fit is ``y_i − (Gy)_i/G_ii`` (Cook & Weisberg 1982).
    """
    count = min(len(benign), len(harmful))
    rows = torch.cat([benign[:count], harmful[:count]]).detach().double().cpu()
    rows = rows - rows.mean(0)
    sides = torch.cat([rows.new_ones(count), -rows.new_ones(count)])
    kernel = rows @ rows.mT
    size = kernel.diagonal().mean()
    if not 0 < size < torch.inf:
        return torch.zeros(len(rows), dtype=torch.bool)
    # A constant is one more feature, of the size of all others.
    inverse = torch.linalg.inv(kernel / size + 1 + _RIDGE * torch.eye(len(rows), dtype=rows.dtype))
    return (sides - (inverse @ sides) / inverse.diagonal()) * sides > 0


def separability(benign: Tensor, harmful: Tensor) -> float | None:
    """The share of images that are `separable`; None of fewer than `LEAST_IMAGES` of a side."""
    if min(len(benign), len(harmful)) < LEAST_IMAGES:
        return None
    return round(float(separable(benign, harmful).double().mean()), 6)
