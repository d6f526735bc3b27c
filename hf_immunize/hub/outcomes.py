"""What a call to the Hub can come to, by name, each with one sentence; and trying again where that helps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionResolutionError,
)
from huggingface_hub.utils import get_session
from transformers.utils import logging

from hf_immunize.errors import CardError, HubError
from hf_immunize.text import printable


logger = logging.get_logger(__name__)
T = TypeVar("T")
PASSING = ("rate_limited", "server_error", "unreachable")
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
    """Turn whatever the client raises within into a named outcome.

    Args:
        what: What is being done, as in "push to user/model".

    Raises:
        HubError: With its outcome by name.
        CardError: If the Hub refuses the card's metadata.
    """
    _limit_waiting()
    try:
        yield
    except Exception as error:
        named = name_outcome(error, what)
        if named is None:
            raise
        raise named from error


def name_outcome(error: BaseException, what: str) -> HubError | CardError | None:
    """The named outcome behind an exception of the client.

    Args:
        error: As raised; its causes are looked at too.
        what: What was being done.

    Returns:
        The named error; None where the exception has nothing to do with the Hub.
    """
    if isinstance(error, HubError | CardError):
        return error
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, ValueError) and "Invalid metadata in README.md" in str(error):
        return CardError(f"Expected metadata that the Hub accepts, found: {_words(error)}. Correct README.md.")
    for each in chain:
        if isinstance(each, OfflineModeIsEnabled):
            return _outcome("offline", what, "HF_HUB_OFFLINE is set")
        if isinstance(each, LocalTokenNotFoundError):
            return _outcome("unauthorized", what, "no token")
        if isinstance(each, HfHubHTTPError) and getattr(each, "response", None) is not None:
            return _of_status(each, what)
    for each in chain:
        if isinstance(each, TimeoutError) or (isinstance(each, _HTTPError) and "Timeout" in type(each).__name__):
            return _outcome("timed_out", what, f"no answer in time ({type(each).__name__})")
        if isinstance(each, json.JSONDecodeError):
            return _outcome("unreachable", what, "something else than its JSON (a proxy's or a login page, say)")
    transport = (_HTTPError, ConnectionError, TimeoutError, RevisionResolutionError)
    for each in chain:
        if isinstance(each, transport):
            return _outcome("unreachable", what, f"no answer ({type(each).__name__})")
    if type(error) is RuntimeError:  # as the client's upload by hf_xet raises
        return _outcome("unreachable", what, _words(error))
    return None


def retried(
    call: Callable[[], T],
    what: str,
    *,
    attempts: int = 4,
    wait: float = 1.0,
    sleep: Callable[[float], Any] | None = None,
) -> T:
    """Call until it succeeds, or fails for a reason that trying again does not mend.

    Args:
        call: What to do; must bear being done twice.
        what: What is being done, for messages.
        attempts: At most so many calls.
        wait: Seconds before the second, doubled before each further one; longer where the Hub says so.
        sleep: How to wait; by default `time.sleep`.

    Returns:
        What the call returns.

    Raises:
        HubError: With its outcome by name.
    """
    for attempt in range(1, attempts + 1):
        try:
            with named_outcomes(what):
                return call()
        except HubError as error:
            if error.outcome not in PASSING or attempt == attempts:
                raise
            pause = min(max(wait * 2 ** (attempt - 1), _retry_after(error)), _LONGEST_WAIT)
            logger.warning(f"{error} Trying again in {pause:.0f} s ({attempt} of {attempts - 1}).")
            (sleep or time.sleep)(pause)
    raise AssertionError("unreachable")


def _limit_waiting() -> None:
    """Have the client give each request a time limit, where its caller chose none."""
    hooks = get_session().event_hooks["request"]
    if _limit not in hooks:
        hooks.append(_limit)


def _limit(request: Any) -> None:
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        name: TIME_LIMIT if limits.get(name) is None else limits[name] for name in ("connect", "read", "write", "pool")
    }


def _of_status(error: HfHubHTTPError, what: str) -> HubError:
    status = error.response.status_code
    kind = "rate_limited" if status == 429 else "server_error" if status >= 500 else _BY_STATUS.get(status, "rejected")
    said = _words(getattr(error, "server_message", None) or "")
    return _outcome(kind, what, f"{status}{f' ({said})' if said else ''}")


def _outcome(kind: str, what: str, found: str) -> HubError:
    return HubError(f"Expected the Hub to answer the {what}, found {found}. {_REMEDY[kind]}", kind)


def _words(text: Any) -> str:
    words = printable(text)
    return words if len(words) <= 300 else words[:297] + "..."


def _retry_after(error: HubError) -> float:
    response = getattr(error.__cause__, "response", None)
    try:
        return float(response.headers.get("Retry-After", 0)) if response is not None else 0.0
    except ValueError:
        return 0.0
