"""A checkpoint's files: which are weights and which may be published, loading them, and what the Hub answers."""

from __future__ import annotations

import json
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from hf_immunize.errors import ArgumentError, CardError, HubError, WeightsChangedWarning, WeightsError
from hf_immunize.files import file_sha256
from hf_immunize.hub.record import RECORD_NAME, ImmunizationRecord, read_record
from hf_immunize.text import library_words, printable
from hf_immunize.vision.bare import HEAD_CONFIG_FILE, HEAD_FILE
from hf_immunize.vision.loading import ADAPTER_CONFIG_FILE, LOADING_ERRORS, load_classifier


if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.get_logger(__name__)
T = TypeVar("T")
INDEX = SAFE_WEIGHTS_INDEX_NAME
CARD_NAME = "README.md"
# All that leaves the machine, in addition to the weights and the figures that the record names. The Trainer's
# training_args.bin is not among them: it is a pickle with local paths and the token in it.
_CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json", ADAPTER_CONFIG_FILE, HEAD_CONFIG_FILE)
ALLOWED = (CARD_NAME, RECORD_NAME, *_CONFIGS, INDEX, "LICENSE", "LICENSE.txt", "LICENSE.md")
_PASSING = ("rate_limited", "server_error", "unreachable")
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


# ---- the files of a checkpoint ----


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
        raise WeightsError(
            "Expected weights in safetensors, found none (pickled ones, which can run code, are not read). Save the "
            "model with save_pretrained."
        )
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
    """Refuse symbolic links: what they lead to is no part of the folder."""
    for name in names:
        path = Path(folder) / name
        if path.is_symlink():
            raise ArgumentError(
                f"Expected files of the folder itself, found that {printable(name)} is a symbolic link to "
                f"{printable(os.readlink(path))}. Put a copy of that file in its place if it may be published."
            )


def _shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if odd := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise ValueError(odd)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"Expected {INDEX} to name safetensors beside it, found: {error!r}. It is damaged."
        ) from error
    return sorted(names)


# ---- loading ----


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
) -> Path:
    """The folder of a checkpoint, fetched from the Hub if need be."""
    path = Path(repo_or_folder).expanduser()
    if path.is_dir():
        return path
    repo_id = str(repo_or_folder)
    if repo_id.startswith(("/", ".", "~")) or repo_id.count("/") != 1:
        raise ArgumentError(f"Expected a folder or a repository 'user/name', found {repo_id!r}. Check the spelling.")
    # No pickle is ever fetched, and code only where the caller asks for it.
    patterns = [*ALLOWED, "*.safetensors", *(["*.py"] if with_code else [])]

    def download() -> str:
        return snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns)

    return Path(retried(download, f"request for {repo_id}"))


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


# ---- what the Hub answers, by name, and trying again ----


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
    kind, found = next((known for each in chain if (known := _answer(each))), (None, ""))
    if kind is None:
        of_network = [each for each in chain if isinstance(each, _HTTPError | ConnectionError | TimeoutError)]
        of_disk = isinstance(error, OSError) and error.errno is not None
        if not of_network and (of_disk or not _passed_the_client(error)):
            return None
        late = any("Timeout" in type(each).__name__ for each in chain)
        kind, found = "timed_out" if late else "unreachable", f"none that it understands ({type(error).__name__})"
    return HubError(f"Expected the Hub to answer the {what}, found {found}. {_REMEDY[kind]}", kind)


def _answer(error: BaseException) -> tuple[str, str] | None:
    """Outcome and words of an exception that holds the Hub's answer, or says why it was not asked."""
    if isinstance(error, OfflineModeIsEnabled):
        return "offline", "HF_HUB_OFFLINE is set"
    if isinstance(error, LocalTokenNotFoundError):
        return "unauthorized", "no token"
    if isinstance(error, HfHubHTTPError) and getattr(error, "response", None) is not None:
        status, said = error.response.status_code, _words(getattr(error, "server_message", None) or "")
        kind = "rate_limited" if status == 429 else "server_error" if status >= 500 else "rejected"
        return _BY_STATUS.get(status, kind), f"{status}{f' ({said})' if said else ''}"
    return None


def _passed_the_client(error: BaseException) -> bool:
    """Whether an error comes from within the client, which takes the shape of an answer for granted."""
    names = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.startswith("huggingface_hub.") for name in names)


def retried(call: Callable[[], T], what: str) -> T:
    """Call until it succeeds, or fails for a reason that trying again does not mend."""
    for wait in (1, 2, 4):
        try:
            with named_outcomes(what):
                return call()
        except HubError as error:
            if error.outcome not in _PASSING:
                raise
            logger.warning(f"{error} Trying again in {wait} s.")
            time.sleep(wait)
    with named_outcomes(what):
        return call()


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
