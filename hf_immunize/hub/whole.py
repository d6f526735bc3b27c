"""A published checkpoint is whole: what others get of it loads, and is the model that lay here."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from hf_immunize.errors import WeightsError
from hf_immunize.hub.collect import is_hub_id, public_name
from hf_immunize.hub.hashes import weight_files
from hf_immunize.text import library_words
from hf_immunize.vision.loading import ADAPTER_CONFIG_FILE, load_classifier
from hf_immunize.vision.round_trip import same_logits


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(
    folder: str | os.PathLike[str], trust_remote_code: bool = False, token: str | None = None
) -> PreTrainedModel:
    """The model of a folder, whole and from safetensors alone, in eval mode and float32.

    Args:
        folder: The checkpoint's folder.
        trust_remote_code: Run code that comes with the model.
        token: For the base of an adapter, in place of the one you are logged in with.

    Raises:
        WeightsError: If weights are pickled, missing, damaged, without a place, or no image classifier's.
    """
    weight_files(folder)
    try:
        return load_classifier(
            folder, use_safetensors=True, trust_remote_code=trust_remote_code, local_files_only=True, token=token
        )
    except WeightsError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise WeightsError(
            f"Expected an image classifier's config.json and weights, found: {library_words(error)}. Fetch or save "
            "them again."
        ) from error


def check_loads_back(
    folder: str | os.PathLike[str], names: list[str], token: str | None = None, trust_remote_code: bool = False
) -> None:
    """Refuse to publish files that others could not load as the model that lies here.

    Args:
        folder: The checkpoint's folder.
        names: Files that are about to be pushed.
        token: For the base of an adapter, in place of the one you are logged in with.
        trust_remote_code: Run code that comes with the model.

    Raises:
        WeightsError: If they do not load, or give other logits.
    """
    root = Path(folder).resolve()
    if ADAPTER_CONFIG_FILE in names:
        about = json.loads((root / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
        base = about.get("base_model_name_or_path")
        if not is_hub_id(base or "none"):
            raise WeightsError(
                f"Expected the adapter in {public_name(root)} to name its base by an id on the Hub, found "
                f"{public_name(base) if base else 'none'}, which nobody else has. Push the base first and name it "
                "(base_model_name_or_path), or save the model with its adapter merged (model.merge_and_unload())."
            )
    with tempfile.TemporaryDirectory() as staged:
        for name in names:
            try:
                os.symlink((root / name).resolve(), Path(staged) / name)
            except OSError:  # Windows, without the right to make links
                shutil.copyfile(root / name, Path(staged) / name)
        pushed = load_model(staged, trust_remote_code, token)
    if not same_logits(load_model(root, trust_remote_code, token), pushed):
        raise WeightsError(
            f"Expected the files to be pushed from {public_name(root)} to load as the model there, found one with "
            "other logits. Save the model again, and push that; nothing was sent."
        )
