"""An attacker who has the public weights that immunization started from restores them, wholly or in part."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from hf_immunize.attacks.attacker import Attacker, Found, ProbeBudget
from hf_immunize.attacks.direct import ridge
from hf_immunize.attacks.probe_data import ProbeData
from hf_immunize.errors import DataError


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def changed_parameters(model: PreTrainedModel, reference: PreTrainedModel) -> list[str]:
    """Names of the parameters and buffers in which two checkpoints of one architecture differ."""
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
    """A copy of the model whose weights are mixed with a share of the reference's: 0 none, 1 all."""
    restored = copy.deepcopy(model)
    state, theirs = restored.state_dict(), reference.state_dict()
    for name in changed_parameters(model, reference):
        ours = state[name]
        if ours.is_floating_point():
            mixed = (1 - share) * ours.double() + share * theirs[name].to(ours.device).double()
            state[name] = mixed.to(ours.dtype)
        elif share == 1:
            state[name] = theirs[name]
    restored.load_state_dict(state)
    return restored


def best_share(candidates: dict[float, ProbeData], budget: ProbeBudget, seed: int) -> Found:
    """The ridge probe on the mixture of weights that validation prefers."""
    if not candidates:
        return Found(None, status="diverged", note="every mixture of the weights gave features that are not finite")
    found = {share: ridge(data, budget, seed) for share, data in candidates.items()}
    best = max(found, key=lambda share: found[share].validation or 0.0)
    return Found(
        found[best].accuracy,
        settings={"share_of_public_weights": best, **found[best].settings},
        trials=sum(one.trials for one in found.values()),
    )


ATTACKERS = (
    Attacker("restore_swap", "restoring the public weights", "fine_tuning", True, best_share, "quick", shares=(1.0,)),
    Attacker(
        "restore_interpolation",
        "mixing the public weights back in",
        "fine_tuning",
        True,
        best_share,
        "quick",
        shares=(0.5, 0.8),
    ),
)
