"""The files of a checkpoint: which may be published, which are weights, and whether a record is of those."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_immunize.errors import ArgumentError, WeightsError
from hf_immunize.files import file_sha256
from hf_immunize.hub.record import RECORD_NAME
from hf_immunize.text import printable
from hf_immunize.vision.bare import HEAD_CONFIG_FILE, HEAD_FILE
from hf_immunize.vision.loading import ADAPTER_CONFIG_FILE


INDEX = SAFE_WEIGHTS_INDEX_NAME
CARD_NAME = "README.md"
# All that leaves the machine, in addition to the weights and the figures that the record names. The Trainer's
# training_args.bin is not among them: it is a pickle with local paths and the token in it.
_CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json", ADAPTER_CONFIG_FILE, HEAD_CONFIG_FILE)
ALLOWED = (CARD_NAME, RECORD_NAME, *_CONFIGS, INDEX, "LICENSE", "LICENSE.txt", "LICENSE.md")
# Formats that run code on loading, and what the Trainer writes in them that is no model.
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt")


def weight_files(folder: str | os.PathLike[str]) -> list[str]:
    """The weight files of a checkpoint."""
    root = Path(folder)
    if (root / INDEX).is_file() and not (root / SAFE_WEIGHTS_NAME).is_file():
        names = _shards(root / INDEX)
    else:
        names = [name for name in (ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME) if (root / name).is_file()]
    if names and (root / HEAD_FILE).is_file():
        names.append(HEAD_FILE)
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise WeightsError(f"Expected the weights {missing[0]} that {INDEX} names, found none. Fetch them again.")
    if not names:
        names = sorted(path.name for path in root.iterdir() if path.is_file())
        pickled = [name for name in names if name.endswith(_PICKLED) and name not in _NO_WEIGHTS]
        found = f"only pickled ones ({pickled[0]}), which can run any code when loaded" if pickled else "none"
        raise WeightsError(f"Expected weights in safetensors, found {found}. Save the model with save_pretrained.")
    return names


def hash_weights(folder: str | os.PathLike[str]) -> dict[str, str]:
    """SHA-256 of every weight file of a checkpoint."""
    return {name: file_sha256(Path(folder) / name) for name in weight_files(folder)}


def changed_weights(folder: str | os.PathLike[str], recorded: Mapping[str, str]) -> list[str]:
    """What differs between a checkpoint's weights and those a record was made for."""
    found = hash_weights(folder)
    phrases = [f"{name} has changed" for name in found if name in recorded and found[name] != recorded[name]]
    phrases += [f"{name} is not in the record" for name in found if name not in recorded]
    return phrases + [f"{name} is missing" for name in recorded if name not in found]


def refuse_links(folder: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Refuse symbolic links, save for those of the Hub's own cache: what they lead to is no part of the folder."""
    root = Path(folder)
    here = root.resolve()
    blobs = here.parent.parent / "blobs" if here.parent.name == "snapshots" else None
    for name in names:
        path = root / name
        if path.is_symlink() and (blobs is None or path.resolve().parent != blobs):
            raise ArgumentError(
                f"Expected files of the folder itself, found that {printable(name)} is a symbolic link to "
                f"{printable(os.readlink(path))}. Put a copy of that file in its place if it may be published."
            )


def _shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"Expected {INDEX} to name the weight files, found: {error!r}. Fetch it again.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise WeightsError(f"Expected safetensors beside {INDEX}, found {name!r} in it. The index is damaged.")
    return sorted(names)
