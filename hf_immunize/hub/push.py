"""Pushing a checkpoint: an allow-list of files in one commit, which is made whole or not at all."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from transformers.utils import logging

from hf_immunize.errors import ArgumentError, HubError, RecordError
from hf_immunize.hub.card import CARD_NAME, CardOptions, write_card
from hf_immunize.hub.hashes import INDEX, changed_weights, weight_files
from hf_immunize.hub.outcomes import named_outcomes, retried
from hf_immunize.hub.outgoing import check_private, refuse_links
from hf_immunize.hub.record import ImmunizationRecord, read_record
from hf_immunize.hub.validation import PICTURES, RECORD_NAME
from hf_immunize.hub.whole import check_loads_back
from hf_immunize.text import printable
from hf_immunize.vision.bare import HEAD_CONFIG_FILE
from hf_immunize.vision.loading import ADAPTER_CONFIG_FILE


logger = logging.get_logger(__name__)
# All that leaves the building, beside the weights and the figures that the record names. The Trainer's
# training_args.bin is not among them: it is a pickle with local paths and the token in it.
ALLOWED = (
    CARD_NAME,
    RECORD_NAME,
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    ADAPTER_CONFIG_FILE,
    HEAD_CONFIG_FILE,
    INDEX,
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
)
_REPO = re.compile(r"([\w.-]+/)?[\w.-]+", re.ASCII)
_WEIGHTS = re.compile(
    r"(model|adapter_model|pytorch_model|tf_model|flax_model|head)[\w.-]*\.(safetensors|bin|h5|msgpack)"
)


@dataclass(frozen=True)
class PushResult:
    """What a push did, or in a dry run would do.

    Attributes:
        repo_id: The repository.
        files: Name to size in bytes.
        commit: The repository's commit after the push; None in a dry run.
        url: Where to look at it; None in a dry run.
        changed: Whether the push made a new commit.
    """

    repo_id: str
    files: dict[str, int]
    commit: str | None = None
    url: str | None = None
    changed: bool = False


def files_to_push(folder: str | os.PathLike[str], record: ImmunizationRecord | None) -> list[str]:
    """Names of the files of a checkpoint that are pushed; everything else stays.

    Args:
        folder: The checkpoint's folder.
        record: Its record, which names its figures.

    Returns:
        Sorted names.

    Raises:
        WeightsError: If weights are pickled or missing.
        ArgumentError: If one of them is a symbolic link.
    """
    root = Path(folder)
    refuse_links(root, _may_leave(root))
    weights = weight_files(root)
    names = {*ALLOWED, *weights, *(record.figures if record is not None else [])}
    if weights == ["model.safetensors"]:
        names.discard(INDEX)  # of an earlier save in shards
    return sorted(name for name in names if (root / name).is_file())


def _may_leave(folder: Path) -> list[str]:
    """Names there of files that some record could have pushed."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(name for name in names if name in ALLOWED or name.endswith((".safetensors", *PICTURES)))


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload an immunized checkpoint",
    dry_run: bool = False,
    require_record: bool = True,
    refresh_card: bool = True,
    load_back: bool = True,
    trust_remote_code: bool = False,
    api: HfApi | None = None,
) -> PushResult:
    """Push a checkpoint to the Hub: card, record, weights, config, processor and figures, nothing else.

    All files go in one commit: a push that is cut off leaves the repository as it was, and the next one sends only
    what has not arrived. Pushing again without a change makes no commit. Weight files of the repository that the
    checkpoint no longer has are removed, so that nobody loads them by mistake; its other files stay.

    Before anything is sent, the model is loaded from the files to be pushed alone, and compared by its logits.

    Args:
        folder: The checkpoint's folder.
        repo_id: "user/name", or "name" for a repository of your own.
        private: Whether to create it as private; a public one that exists is then refused.
        revision: Branch to push to, created if need be.
        token: In place of the one you are logged in with.
        commit_message: Message of the commit.
        dry_run: Only say what would be pushed; asks nothing of the network and writes nothing.
        require_record: Whether to refuse a checkpoint without a record.
        refresh_card: Whether to write the card anew from the record, with the repository's name in its code.
        load_back: Whether to see that the files to be pushed load as the whole model (`check_loads_back`).
        trust_remote_code: Whether to run code that comes with the model for that. Read it first.
        api: A client of your own.

    Returns:
        `PushResult`.

    Raises:
        RecordError: If the record is missing, damaged, or not of these weights.
        WeightsError: If weights are pickled or missing, or what is pushed does not load as this model.
        CardError: If the card's metadata cannot be read.
        ArgumentError: If a file is a symbolic link or holds a token or a local path, or the repository's name is none.
        HubError: If the Hub does not take it; nothing local is lost.
    """
    root = Path(folder)
    if not _REPO.fullmatch(repo_id) or ".." in repo_id:
        raise ArgumentError(f"Expected a repository 'user/name', found {repo_id!r}. Correct the name.")
    refuse_links(root, _may_leave(root))
    record = read_record(root) if require_record or (root / RECORD_NAME).is_file() else None
    changed = changed_weights(root, record.weights) if record is not None else []
    if changed:
        raise RecordError(
            f"Expected the weights that {RECORD_NAME} describes, found: {'; '.join(changed)}. Its figures are not "
            "theirs: evaluate and save the model again, then push."
        )
    if record is not None and refresh_card and not dry_run:
        write_card(root, record, CardOptions(repo_id=repo_id))
    names = files_to_push(root, record)
    check_private(root, names, token)
    if load_back:
        check_loads_back(root, names, token, trust_remote_code)
    sizes = {name: (root / name).stat().st_size for name in names}
    if dry_run:
        return PushResult(repo_id, sizes)
    api = api or HfApi(token=token, library_name="hf_immunize")

    def attempt() -> PushResult:
        # Operations can be committed only once; a new attempt needs new ones.
        operations: list[Any] = [CommitOperationAdd(name, str(root / name)) for name in names]
        return _commit(api, repo_id, operations, sizes, private, revision, printable(commit_message))

    return retried(attempt, f"push to {repo_id}")


def _commit(
    api: HfApi,
    repo_id: str,
    operations: list[Any],
    sizes: dict[str, int],
    private: bool | None,
    revision: str | None,
    message: str,
) -> PushResult:
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    info = api.model_info(repo_id, revision=revision)
    if private and not info.private:
        raise HubError(
            f"Expected the private repository {repo_id} that was asked for, found a public one of that name. Make it "
            "private on the Hub, or choose another name.",
            "conflict",
        )
    there = {sibling.rfilename for sibling in info.siblings or []}
    forms = (ADAPTER_CONFIG_FILE, HEAD_CONFIG_FILE)  # each makes of the weights something else
    stale = sorted(name for name in there - set(sizes) if _WEIGHTS.fullmatch(name) or name in forms)
    for name in stale:
        logger.warning(f"Removing {name} from {repo_id}: the pushed checkpoint does not have it.")
    operations += [CommitOperationDelete(name) for name in stale]
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return PushResult(repo_id, sizes, commit.oid, str(commit.repo_url), changed=commit.oid != info.sha)


def create_repository(api: HfApi, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Create a repository, or find it there.

    Args:
        api: The client.
        repo_id: Its name.
        private: Whether to create it as private.
        token: In place of the client's.

    Returns:
        Its full id.

    Raises:
        HubError: If the Hub does not.
    """
    with named_outcomes(f"creation of {repo_id}"):
        return api.create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id
