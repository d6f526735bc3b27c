"""An attacker who has the public weights that immunization started from puts them back, wholly or in part."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from hf_immunize.attacks.direct import ridge
from hf_immunize.attacks.presets import ProbeBudget
from hf_immunize.attacks.probe_data import Finding, ProbeData
from hf_immunize.errors import DataError


if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Shares of the public weights that the interpolating attacker tries.
SHARES = (0.5, 0.8)


def moved_parameters(model: PreTrainedModel, reference: PreTrainedModel) -> list[str]:
    """Names of the tensors in which two checkpoints of one architecture differ.

    Args:
        model: The immunized model.
        reference: The model before.

    Returns:
        Names, of parameters and buffers.

    Raises:
        DataError: If their tensors have other names or shapes.
    """
    ours, theirs = model.state_dict(), reference.state_dict()
    shared = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    odd = [name for name in {**ours, **theirs} if name not in set(shared)]
    # A new head is no other backbone.
    if len(shared) < len(ours) - 2:
        raise DataError(
            f"Expected a reference of the same architecture, found other names or shapes of {len(odd)} tensors, first "
            f"{odd[0]!r}. Give the weights that the immunization started from."
        )
    return [name for name in shared if not torch.equal(ours[name].cpu(), theirs[name].cpu().to(ours[name].dtype))]


def interpolate(model: PreTrainedModel, reference: PreTrainedModel, share: float) -> PreTrainedModel:
    """A copy of the immunized model whose moved tensors are brought back towards the public ones.

    Args:
        model: The immunized model.
        reference: The model before.
        share: Of the public weights, between 0 (none) and 1 (swapped).

    Returns:
        The copy.
    """
    restored = copy.deepcopy(model)
    state, theirs = restored.state_dict(), reference.state_dict()
    for name in moved_parameters(model, reference):
        ours = state[name]
        if ours.is_floating_point():
            mixed = (1 - share) * ours.double() + share * theirs[name].to(ours.device).double()
            state[name] = mixed.to(ours.dtype)
        elif share == 1:
            state[name] = theirs[name]
    restored.load_state_dict(state)
    return restored


def best_share(candidates: dict[float, ProbeData], seed: int, budget: ProbeBudget) -> Finding:
    """The ridge probe behind the mixture of weights that validation prefers.

    Args:
        candidates: Share of the public weights to the features of that mixture.
        seed: Draws the rows that share and strength are chosen on.
        budget: Of the probe.

    Returns:
        The finding; diverged where there is no candidate.
    """
    if not candidates:
        return Finding(None, status="diverged", note="every mixture of the weights gave features that are not finite")
    found = {share: ridge(data, seed, torch.float64, budget) for share, data in candidates.items()}
    best = max(found, key=lambda share: found[share].validation or 0.0)
    return Finding(
        found[best].accuracy,
        settings={"share_of_public_weights": best, **found[best].settings},
        trials=sum(finding.trials for finding in found.values()),
    )
