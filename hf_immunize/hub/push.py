"""Pushing a checkpoint: an allow-list of files in one commit, which is made whole or not at all.

First what the Hub may answer, by name, and trying again; then the model, which must load from the files that are
pushed alone; then the push. It names its files one by one (`create_commit`): the patterns of `upload_folder` would be
as long, and would match names that were never looked at.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionResolutionError,
)
from huggingface_hub.utils import get_session
from transformers.utils import logging

from hf_immunize.errors import ArgumentError, CardError, HubError, RecordError, WeightsError
from hf_immunize.hub.card import CARD_NAME, CardOptions, write_card
from hf_immunize.hub.collect import is_hub_id
from hf_immunize.hub.outgoing import check_private, refuse_links
from hf_immunize.hub.record import PICTURES, RECORD_NAME, ImmunizationRecord, read_record
from hf_immunize.hub.weights import INDEX, changed_weights, weight_files
from hf_immunize.text import library_words, printable, public_name
from hf_immunize.vision.bare import HEAD_CONFIG_FILE
from hf_immunize.vision.loading import ADAPTER_CONFIG_FILE, LOADING_ERRORS, load_classifier, same_logits


if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.get_logger(__name__)


T = TypeVar("T")
_PASSING = ("rate_limited", "server_error", "unreachable")
_LONGEST_WAIT = 60.0
# Seconds without a byte after which a server counts as one that does not answer. The client's own default is to wait.
TIME_LIMIT = 30.0
# The client's HTTP library is httpx or its successor; its errors share the base of the client's own.
_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
_BY_STATUS = {401: "unauthorized", 403: "forbidden", 404: "not_found", 409: "conflict", 412: "conflict"}
_REMEDY = {
    "unauthorized": "Log in with `hf auth login`, or set HF_TOKEN to a valid token.",
    "forbidden": "Use a token with write access, and a repository that is yours or your organization's.",
    "not_found": "Check the spelling, and whether your token may see it.",
    "conflict": "It changed meanwhile, or is another than asked for; look at it, and try again.",
    "rejected": "The Hub's own words say why.",
    "rate_limited": "The Hub asks to go slower; try again later.",
    "server_error": "The Hub has trouble; try again later.",
    "unreachable": "Check the connection (and HF_ENDPOINT, if set), and try again; what was sent is not sent twice.",
    "timed_out": "It took the connection and then said nothing; try again later, or check HF_ENDPOINT and proxies.",
    "offline": "Unset HF_HUB_OFFLINE to talk to the Hub.",
}


@contextmanager
def named_outcomes(what: str) -> Iterator[None]:
    """Turn whatever the client raises within into a named outcome."""
    _limit_waiting()
    try:
        yield
    except Exception as error:
        named = name_outcome(error, what)
        if named is None:
            raise
        raise named from error


def name_outcome(error: BaseException, what: str) -> HubError | CardError | None:
    """The named outcome behind an exception of the client; None where it has nothing to do with the Hub."""
    if isinstance(error, HubError | CardError):
        return error
    if isinstance(error, ValueError) and "Invalid metadata in README.md" in str(error):
        return CardError(f"Expected metadata that the Hub accepts, found: {_words(error)}. Correct README.md.")
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    known = [named for each in chain if (named := _outcome_of(each)) is not None]
    if type(error) is RuntimeError:  # as the client's upload by hf_xet raises
        known.append((3, "unreachable", _words(error)))
    odd = isinstance(error, LookupError | TypeError | AttributeError) or type(error) is ValueError
    if odd and _raised_by_client(error):
        known.append((3, "unreachable", f"JSON of another shape than its own ({type(error).__name__})"))
    if not known:
        return None
    _, kind, found = min(known, key=lambda named: named[0])
    return HubError(f"Expected the Hub to answer the {what}, found {found}. {_REMEDY[kind]}", kind)


def _outcome_of(error: BaseException) -> tuple[int, str, str] | None:
    """Rank, outcome and words of one exception of a chain; the one of the lowest rank says most."""
    name = type(error).__name__
    if isinstance(error, OfflineModeIsEnabled):
        return 0, "offline", "HF_HUB_OFFLINE is set"
    if isinstance(error, LocalTokenNotFoundError):
        return 0, "unauthorized", "no token"
    if isinstance(error, HfHubHTTPError) and getattr(error, "response", None) is not None:
        status, said = error.response.status_code, _words(getattr(error, "server_message", None) or "")
        kind = "rate_limited" if status == 429 else "server_error" if status >= 500 else "rejected"
        return 0, _BY_STATUS.get(status, kind), f"{status}{f' ({said})' if said else ''}"
    if isinstance(error, TimeoutError) or (isinstance(error, _HTTPError) and "Timeout" in name):
        return 1, "timed_out", f"no answer in time ({name})"
    if isinstance(error, json.JSONDecodeError):
        return 1, "unreachable", "something else than its JSON (a proxy's or a login page, say)"
    if isinstance(error, _HTTPError | ConnectionError | RevisionResolutionError):
        return 2, "unreachable", f"no answer ({name})"
    return None


def _raised_by_client(error: BaseException) -> bool:
    """Whether the innermost frame is the client's, which takes the shape of an answer for granted."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("huggingface_hub.")


def retried(call: Callable[[], T], what: str) -> T:
    """Call until it succeeds, or fails for a reason that trying again does not mend."""
    for wait in (1.0, 2.0, 4.0, None):
        try:
            with named_outcomes(what):
                return call()
        except HubError as error:
            if error.outcome not in _PASSING or wait is None:
                raise
            pause = min(max(wait, _retry_after(error)), _LONGEST_WAIT)
            logger.warning(f"{error} Trying again in {pause:.0f} s.")
            time.sleep(pause)
    raise AssertionError("unreachable")


def _limit_waiting() -> None:
    """Have the client give each request a time limit; its own goes up to a minute, six times for each file."""
    hooks = get_session().event_hooks["request"]
    if _limit not in hooks:
        hooks.append(_limit)


def _limit(request: Any) -> None:
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        name: min(TIME_LIMIT, limits.get(name) or TIME_LIMIT) for name in ("connect", "read", "write", "pool")
    }


def _words(text: Any) -> str:
    words = printable(text)
    return words if len(words) <= 300 else words[:297] + "..."


def _retry_after(error: HubError) -> float:
    response = getattr(error.__cause__, "response", None)
    try:
        return float(response.headers.get("Retry-After", 0)) if response is not None else 0.0
    except ValueError:
        return 0.0


def load_model(
    folder: str | os.PathLike[str], trust_remote_code: bool = False, token: str | None = None
) -> PreTrainedModel:
    """The model of a folder, whole and from safetensors alone, in eval mode and float32."""
    weight_files(folder)
    try:
        return load_classifier(
            folder, use_safetensors=True, trust_remote_code=trust_remote_code, local_files_only=True, token=token
        )
    except WeightsError:
        raise
    except LOADING_ERRORS as error:
        raise WeightsError(
            f"Expected an image classifier's config.json and weights, found: {library_words(error)}. Fetch or save "
            "them again."
        ) from error


def check_loads_back(
    folder: str | os.PathLike[str], names: list[str], token: str | None = None, trust_remote_code: bool = False
) -> None:
    """Refuse to publish files that others could not load as the model that lies here."""
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


# All that leaves the machine, in addition to the weights and the figures that the record names. The Trainer's
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
    """What a push did, or in a dry run would do."""

    repo_id: str
    files: dict[str, int]
    commit: str | None = None
    url: str | None = None
    changed: bool = False


def files_to_push(folder: str | os.PathLike[str], record: ImmunizationRecord | None) -> list[str]:
    """Names of the files of a checkpoint that are pushed; everything else stays."""
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
    trust_remote_code: bool = False,
    api: HfApi | None = None,
) -> PushResult:
    """Push a checkpoint to the Hub: card, record, weights, config, processor and figures, nothing else."""
    root = Path(folder)
    record = _record_of(root, repo_id, require_record)
    if record is not None and not dry_run:
        write_card(root, record, CardOptions(repo_id=repo_id))
    sizes = _sizes(root, record, token)
    check_loads_back(root, list(sizes), token, trust_remote_code)
    if dry_run:
        return PushResult(repo_id, sizes)
    api = api or HfApi(token=token, library_name="hf_immunize")
    return _send(api, repo_id, root, sizes, private, revision, commit_message)


def push_as_saved(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    token: str | None,
    commit_message: str,
) -> PushResult:
    """Push what a Trainer saved, with the card that it wrote; it has seen that the files load back."""
    root = Path(folder)
    sizes = _sizes(root, _record_of(root, repo_id, required=False), token)
    api = HfApi(token=token, library_name="hf_immunize")
    return _send(api, repo_id, root, sizes, private, revision, commit_message)


def _record_of(root: Path, repo_id: str, required: bool) -> ImmunizationRecord | None:
    """The record of a checkpoint that may be pushed, once it is known to be of the weights there."""
    if not _REPO.fullmatch(repo_id) or ".." in repo_id:
        raise ArgumentError(f"Expected a repository 'user/name', found {repo_id!r}. Correct the name.")
    refuse_links(root, _may_leave(root))
    record = read_record(root) if required or (root / RECORD_NAME).is_file() else None
    changed = changed_weights(root, record.weights) if record is not None else []
    if changed:
        raise RecordError(
            f"Expected the weights that {RECORD_NAME} describes, found: {'; '.join(changed)}. Its figures are not "
            "theirs: evaluate and save the model again, then push."
        )
    return record


def _sizes(root: Path, record: ImmunizationRecord | None, token: str | None) -> dict[str, int]:
    """The files to push, none of which holds what is private, with their sizes."""
    names = files_to_push(root, record)
    check_private(root, names, token)
    return {name: (root / name).stat().st_size for name in names}


def _send(
    api: HfApi,
    repo_id: str,
    root: Path,
    sizes: dict[str, int],
    private: bool | None,
    revision: str | None,
    message: str,
) -> PushResult:
    words = printable(message)
    return retried(lambda: _commit(api, repo_id, root, sizes, private, revision, words), f"push to {repo_id}")


def _commit(
    api: HfApi,
    repo_id: str,
    root: Path,
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
    # Operations can be committed only once; a new attempt needs new ones.
    operations: list[Any] = [CommitOperationAdd(name, str(root / name)) for name in sizes]
    operations += [CommitOperationDelete(name) for name in stale]
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return PushResult(repo_id, sizes, commit.oid, str(commit.repo_url), changed=commit.oid != info.sha)
