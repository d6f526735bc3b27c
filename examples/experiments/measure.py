"""What is measured of a model on held-out images: features, RIR by each protocol, benign accuracy paired by image."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from examples.experiments.tasks import Data
from hf_immunize.audit.statistics import paired_utility
from hf_immunize.errors import ArgumentError, DataError, ProtocolError, RankError
from hf_immunize.features.extract import extract
from hf_immunize.hub.verify import image_rows
from hf_immunize.spectra.ratio import ImmunizationRatio, relative_immunization_ratio


FEATURES = "features.safetensors"
# As in the paper's network tables.
GROUPS = {"num_groups": 20, "group_size": 100}
# A benign image counts as lost where it keeps no more than this of what the median one keeps of its features' length.
LOST = 0.1


def store_features(model: str, data: Data, path: Path) -> None:
    """Store the features of all held-out images, and which benign ones the model names rightly, unless they are there.

    Args:
        model: Folder or Hub id.
        data: The images.
        path: File of side to features ``(N, D)``, and "benign hits" ``(N,)``.
    """
    if path.is_file():
        return
    try:
        classifier = AutoModelForImageClassification.from_pretrained(model)
        processor = AutoImageProcessor.from_pretrained(model)
    except OSError as error:
        raise ArgumentError(
            f"Expected an image classifier with its processor at {model}, found: {str(error).splitlines()[0]} Check "
            "the connection and your rights, or give a folder as --model."
        ) from error
    classifier.to("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Tensor] = {}
    for side in ("benign", "harmful", "unseen"):
        if side not in data.paths:
            continue
        rows = image_rows(data.load(side, "test"), side, classifier)
        features, hits = [], []
        for batch in extract(classifier, rows, processor, description=f"{side} features"):
            features.append(batch.features.cpu())
            if batch.labels is not None:
                hits.append((batch.logits.argmax(-1) == batch.labels).cpu())
        found[side] = torch.cat(features)
        if side == "benign" and not hits:
            raise DataError(
                f"Expected benign classes among those of {Path(model).name}, found none of them. Give a model that "
                "has learned the benign task."
            )
        if side == "benign":
            found["benign hits"] = torch.cat(hits)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"_unfinished-{path.name}")
    save_file(found, unfinished)
    unfinished.replace(path)


def compare(before: Path, after: Path) -> dict[str, Any]:
    """All ratios and the benign accuracy of two files of features."""
    sides = load_file(before), load_file(after)
    return {"ratios": ratios(*sides), "utility": _utility(*sides)}


def ratios(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Any]:
    """RIR of features as `store_features` has them: exact, by the paper's code's protocol, exact over unseen classes.

    None where there are fewer images than a group needs, or only zeros in one.
    """
    sides = {
        side: {
            "harmful": after[side],
            "harmful_reference": before[side],
            "benign": after["benign"],
            "benign_reference": before["benign"],
        }
        for side in ("harmful", "unseen")
        if side in after
    }
    found: dict[str, Any] = {"exact": _plain(relative_immunization_ratio(**sides["harmful"]))}
    if "unseen" in sides:
        found["exact_unseen"] = _plain(relative_immunization_ratio(**sides["unseen"]))
    found["without_lost"] = _without_lost(sides["harmful"])
    # Too few images for a group, or a group of which all features are zero: by the paper's protocol there is no RIR.
    try:
        paper = relative_immunization_ratio(**sides["harmful"], protocol="reference", seed=0, **GROUPS)
        found["reference"] = _plain(paper) | GROUPS
    except (ProtocolError, RankError):
        found["reference"] = None
    return found


def _without_lost(sides: dict[str, Tensor]) -> dict[str, Any]:
    """How many benign images lose their features, as if they were harmful, and the exact RIR of the others.

    κ is ruled by the worst direction: a single such image decides (ii).
    """
    lengths = [sides[name].double().norm(dim=1) for name in ("benign", "benign_reference")]
    kept = lengths[0] / lengths[1].clamp_min(torch.finfo(torch.float64).tiny)
    lost = kept <= LOST * kept.median()
    if not lost.any() or lost.all():
        return {"lost": int(lost.sum())}
    others = {name: features[~lost] if name.startswith("benign") else features for name, features in sides.items()}
    return {"lost": int(lost.sum()), **_plain(relative_immunization_ratio(**others))}


def _plain(ratio: ImmunizationRatio) -> dict[str, Any]:
    names = ("rir", "log10_rir", "harmful_ratio", "benign_ratio", "std", "bound")
    found: dict[str, Any] = {name: _finite(getattr(ratio, name)) for name in names}
    for name in ("harmful", "harmful_reference", "benign", "benign_reference"):
        one = getattr(ratio, name)
        if one is not None:
            found[name] = {
                "rank": one.rank,
                "images": one.num_samples,
                "dim": one.dim,
                "log10_kappa": _finite(one.log10_kappa),
                "is_bound": one.is_bound,
            }
    return found


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value


def _utility(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Any]:
    """Benign accuracy before and after, the interval of the difference paired by image, and the hits."""
    hits = [one["benign hits"] for one in (before, after)]
    text = {name: "".join(map(str, one.int().tolist())) for name, one in zip(("before", "after"), hits, strict=True)}
    return {**asdict(paired_utility(hits[1], hits[0])), "hits": text}
