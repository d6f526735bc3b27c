"""What the starting models' features say of what can be reached, from the files that the rows share."""

import math
import statistics
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from examples.networks.rows import Group
from hf_immunize import rir_ceiling
from hf_immunize.audit.names import percent
from hf_immunize.training.choice import separable


# Images a side, as in the batches of the experiments, and how often they are drawn.
BATCH, DRAWS = 64, 40


def starting_features(groups: list[Group], folder: Path) -> list[str]:
    """The ceiling of a linear map, and how well benign and harmful images are told apart.

    Args:
        groups: Of one experiment.
        folder: Of all runs.

    Returns:
        Lines; none where the features are no longer there.
    """
    names = dict.fromkeys(row["shared"]["name"] for group in groups for row in group.rows)
    files = [
        path for name in names if (path := folder / "shared" / "before" / name / "features.safetensors").is_file()
    ]
    if not files:
        return []
    features = [load_file(path) for path in files]
    return [f"{_ceiling(features)} {_told_apart(features)}".rstrip(), ""]


def _ceiling(features: list[dict[str, Tensor]]) -> str:
    """What RIR a linear map behind them could reach."""
    values = [rir_ceiling(one["benign"], one["harmful"]).value for one in features]
    several = f" on the images of {len(features)} seeds" if len(features) > 1 else ""
    could = "A linear map behind the starting model's features could reach"
    if all(map(math.isinf, values)):
        return f"{could} any RIR{several}: some harmful directions are in no benign feature."
    shown = " / ".join("any" if math.isinf(value) else f"{value:,.0f}" for value in values)
    return f"{could} an RIR of at most {shown}{several}."


def _told_apart(features: list[dict[str, Tensor]]) -> str:
    """How many images a ridge classifier tells apart, as the default looks at it, over draws of a batch's size."""
    if any(min(len(one[side]) for side in ("benign", "harmful")) < BATCH for one in features):
        return ""
    shares = []
    for seed, one in product(range(DRAWS), features):
        draw = torch.Generator().manual_seed(seed)
        sides = (one[side][torch.randperm(len(one[side]), generator=draw)[:BATCH]] for side in ("benign", "harmful"))
        shares.append(separable(*sides).double().mean().item())
    return (
        f"A ridge classifier on these features puts {percent(statistics.fmean(shares))} of harmful and benign images "
        f"on their own side ({percent(min(shares))} to {percent(max(shares))} in {DRAWS} draws of {BATCH} test images "
        "a side, each image left out once); a half is chance."
    )
