"""Choices that a run makes for its user: each once, before the first step, with the reason.

They are made by the main process on a sample that does not depend on the batch size, and are kept in checkpoints.
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
from hf_immunize.training.objectives import AUTO, AUTO_FEATURES, AUTO_INSIDE, OBJECTIVES
from hf_immunize.vision.head import HeadInput, in_eval_mode


logger = logging.get_logger(__name__)

# Images of each side that choices are made on, and how many pass the model at a time.
SAMPLE, _AT_ONCE = 64, 32
# Fewer images of a side than this say too little.
LEAST_IMAGES = 32
# A half is chance. Between the pairs of tasks that were tried; docs/results/networks.md has their shares.
MIN_SEPARABILITY = 0.9
# Relative to the mean square of a row.
_RIDGE = 1e-2


@dataclass(frozen=True)
class Choice:
    """The objective of a run by name, the inner modules that it reads, and why it was chosen."""

    objective: str
    reads: tuple[str, ...] = ()
    reason: str = "by name"
    directions: tuple[tuple[float, ...], ...] = ()  # that it has found in a sample


def choose_objective(
    method: Method,
    model: nn.Module,
    head: nn.Module,
    trainable: list[str],
    sample: Callable[[], tuple[Tensor, Tensor]],
) -> Choice:
    """The objective for a method, the same on all processes; ``sample`` gives benign and harmful images.

    "auto" is `DeadReLU` where the trainable part has a ReLU that no shortcut bypasses and the features separate the
    two sides, so that it can be dead on one of them alone; else `Concentration`.
    """
    if method.objective == AUTO and method.benign_loss == "task" and method.harmful_weight == "auto":
        return Choice(AUTO_FEATURES, reason="beside the task's loss alone nothing weighs terms inside the network")
    if method.objective != AUTO and not OBJECTIVES[method.objective].needs_sample():
        return Choice(method.objective)
    found: Choice | DataError | None = None
    if is_main():  # each process has images of its own in a loop of one's own
        try:
            found = _seek(method, model, head, trainable, *sample())
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


def _seek(
    method: Method, model: nn.Module, head: nn.Module, trainable: list[str], benign: Tensor, harmful: Tensor
) -> Choice:
    def features(images: Tensor) -> Tensor:
        with in_eval_mode(model), HeadInput(head) as captured:
            model(pixel_values=images)
        return captured.features

    @torch.no_grad()
    def features_of(side: Tensor) -> Tensor:
        return torch.cat([features(part) for part in side.split(_AT_ONCE)])

    if method.objective == "subspace":
        directions = OBJECTIVES["subspace"].prepare(features_of(benign), features_of(harmful))
        return Choice("subspace", directions=tuple(map(tuple, directions)))
    name = AUTO_INSIDE if method.objective == AUTO else method.objective
    few = torch.cat([benign[:2], harmful[:2]])
    reads = tuple(OBJECTIVES[name].find(model, trainable, lambda: features(few)))
    if method.objective != AUTO:
        return Choice(name, reads)
    if not reads:
        return Choice(AUTO_FEATURES, reason="the trainable part has no ReLU that no shortcut bypasses")
    with torch.no_grad():
        sides = [features_of(side) for side in (benign, harmful)]
    share = separability(*sides)
    if share is None:
        count = min(map(len, sides))
        logger.warning_once(
            f"objective='auto' is 'dead_relu', unchecked: whether the model separates harmful from benign images is "
            f"measured from {LEAST_IMAGES} images of each side on, and there are {count}. Give more images."
        )
        return Choice(name, reads, f"no shortcut bypasses {reads[0]}; {count} images are too few for the separability")
    found = f"{100 * share:.0f}% of a sample are separable at the classifier's input"
    if share >= MIN_SEPARABILITY:
        return Choice(name, reads, f"no shortcut bypasses {reads[0]}, and {found}")
    logger.warning_once(
        f"The model hardly separates harmful from benign images: a ridge classifier at the classifier's input puts "
        f"{100 * share:.0f}% of a sample on their own side (50% is chance). objective='auto' is 'concentration'. "
        "Expect linear probes to read nearly as much as before; objective='dead_relu' tries nonetheless."
    )
    return Choice(AUTO_FEATURES, reason=f"only {found}")


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
