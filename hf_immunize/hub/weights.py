"""Which files are weights, and whether they are the ones a record speaks of."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from hf_immunize.errors import WeightsError
from hf_immunize.files import file_sha256
from hf_immunize.vision.bare import HEAD_FILE


# What transformers writes: one file, or shards with an index; and an adapter's.
WEIGHT_PATTERNS = ("model.safetensors", "model-*-of-*.safetensors", "adapter_model.safetensors")
INDEX = "model.safetensors.index.json"
# Formats that run code on loading.
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
# Written by the Trainer beside the weights; not weights.
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt")


def weight_files(folder: str | os.PathLike[str]) -> list[str]:
    """The weight files of a checkpoint."""
    root = Path(folder)
    single = (root / WEIGHT_PATTERNS[0]).is_file()
    if (root / INDEX).is_file() and not single:
        names = sorted(set(_shards(root / INDEX)))
    else:
        names = sorted(p.name for pattern in (WEIGHT_PATTERNS[0], WEIGHT_PATTERNS[2]) for p in root.glob(pattern))
    if names and (root / HEAD_FILE).is_file():
        names.append(HEAD_FILE)
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise WeightsError(f"Expected the weights {missing[0]} that {INDEX} names, found none. Fetch them again.")
    if not names:
        pickled = pickled_weights(sorted(path.name for path in root.iterdir() if path.is_file()))
        found = f"only pickled ones ({pickled[0]}), which can run any code when loaded" if pickled else "none"
        raise WeightsError(
            f"Expected weights in safetensors, found {found}. Save the model with save_pretrained, which writes "
            "safetensors."
        )
    return names


def pickled_weights(names: list[str]) -> list[str]:
    """Those of some files that hold pickled weights.

    >>> pickled_weights(["model.safetensors", "pytorch_model.bin", "training_args.bin"])
    ['pytorch_model.bin']
    """
    return [name for name in names if name.endswith(_PICKLED) and Path(name).name not in _NO_WEIGHTS]


def hash_weights(folder: str | os.PathLike[str]) -> dict[str, str]:
    """SHA-256 of every weight file of a checkpoint."""
    return {name: file_sha256(Path(folder) / name) for name in weight_files(folder)}


def changed_weights(folder: str | os.PathLike[str], recorded: Mapping[str, str]) -> list[str]:
    """What differs between a checkpoint's weights and those a record was made for."""
    found = hash_weights(folder)
    phrases = [f"{name} has changed" for name in found if name in recorded and found[name] != recorded[name]]
    phrases += [f"{name} is not in the record" for name in found if name not in recorded]
    return phrases + [f"{name} is missing" for name in recorded if name not in found]


def _shards(index: Path) -> list[str]:
    try:
        names = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"Expected {INDEX} to name the weight files, found: {error!r}. Fetch it again.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise WeightsError(f"Expected safetensors beside {INDEX}, found {name!r} in it. The index is damaged.")
    return names
