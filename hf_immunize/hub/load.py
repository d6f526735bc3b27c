"""Loading an immunized checkpoint with its record, from a folder or from the Hub."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, snapshot_download

from hf_immunize.errors import ArgumentError, WeightsChangedWarning, WeightsError
from hf_immunize.hub.push import ALLOWED, load_model, retried
from hf_immunize.hub.record import ImmunizationRecord, read_record
from hf_immunize.hub.weights import changed_weights, pickled_weights


if TYPE_CHECKING:
    from transformers import PreTrainedModel


# No pickle is ever fetched. Code only where the caller asks for it.
_PATTERNS = [*ALLOWED, "*.safetensors"]


def load_immunized(
    repo_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, ImmunizationRecord]:
    """Load an immunized checkpoint: a plain transformers model, and the record of its immunization.

    Only safetensors are read. The weights' hashes are compared with the record's: where they differ, its figures are
    not those of the model, and a `WeightsChangedWarning` says so.

    Args:
        repo_or_folder: Id on the Hub, or a folder.
        revision: Branch, tag or commit on the Hub.
        token: In place of the one you are logged in with.
        trust_remote_code: Run code that comes with the model. Read it first.

    Returns:
        The model, in eval mode, and its record.

    Raises:
        RecordError: If there is no record, or it is damaged or of a newer schema (`RecordVersionError`).
        WeightsError: If there are no weights in safetensors.
        HubError: If the Hub does not give it.

    Example:
        >>> model, record = load_immunized("runs/demo")  # doctest: +SKIP
        >>> record.ratios["exact"].log10_rir  # doctest: +SKIP
        2.29
    """
    folder = fetch(repo_or_folder, revision=revision, token=token, with_code=trust_remote_code)
    record = read_record(folder)
    changed = changed_weights(folder, record.weights)
    if changed:
        warnings.warn(
            f"The record does not describe these weights: {'; '.join(changed)}. None of its figures holds for this "
            "model; measure again with hf-immunize verify.",
            WeightsChangedWarning,
            stacklevel=2,
        )
    return load_model(folder, trust_remote_code, token), record


def fetch(
    repo_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    with_code: bool = False,
    api: HfApi | None = None,
) -> Path:
    """The folder of a checkpoint, fetched from the Hub if need be."""
    path = Path(repo_or_folder).expanduser()
    if path.is_dir():
        return path
    repo_id = str(repo_or_folder)
    if repo_id.startswith(("/", ".", "~")) or repo_id.count("/") != 1:
        raise ArgumentError(f"Expected a folder or a repository 'user/name', found {repo_id!r}. Check the spelling.")
    api = api or HfApi(token=token, library_name="hf_immunize")
    patterns = [*_PATTERNS, *(["*.py"] if with_code else [])]

    def download() -> str:
        return snapshot_download(
            repo_id, revision=revision, token=api.token, endpoint=api.endpoint, allow_patterns=patterns
        )

    folder = Path(retried(download, f"request for {repo_id}"))
    if not any(folder.glob("*.safetensors")):
        names = retried(lambda: api.list_repo_files(repo_id, revision=revision), f"list of files of {repo_id}")
        pickled = pickled_weights(names)
        if pickled:
            raise WeightsError(
                f"Expected weights of {repo_id} in safetensors, found only pickled ones ({pickled[0]}), which can run "
                "any code when loaded. They were not fetched; ask the authors for safetensors."
            )
    return folder
