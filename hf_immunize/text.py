"""Text from outside, made fit to be shown."""

from __future__ import annotations

import unicodedata
from typing import Any


# Control characters, marks of writing direction, halves of surrogate pairs, private and unassigned code points.
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn")


def printable(text: Any) -> str:
    r"""Text as one line of visible characters, for cards, records and the terminal.

    What is dropped can hide or reverse what a reader sees, command a terminal, or cannot be written at all.

    Args:
        text: Anything that somebody else chose, such as the name of a class, a file or a repository.

    Returns:
        The same to the eye.

    Example:
        >>> printable("pets\n---\nlicense: mit"), printable("abc\u202edef"), printable("\x1b[2Jpets")
        ('pets --- license: mit', 'abcdef', '[2Jpets')
    """
    spaced = " ".join(str(text).split())
    visible = "".join(c for c in spaced if unicodedata.category(c) not in _INVISIBLE)
    return " ".join(visible.split())


def library_words(error: BaseException) -> str:
    r"""What another library said when it could not load something, as one line that says what to do.

    Args:
        error: As raised.

    Returns:
        At most 500 characters; of code that was not allowed to run, how to allow it.

    Example:
        >>> library_words(OSError("no file\nnamed x."))
        'no file named x'
    """
    words = printable(str(error) or type(error).__name__).rstrip(".")
    if "trust_remote_code" in words:
        return "code of its own, which runs only with trust_remote_code (--trust-remote-code): read it first"
    return words if len(words) <= 500 else words[:497] + "..."


def csv_cell(value: Any) -> Any:
    r"""A value as a cell of a CSV file: text stays text in a spreadsheet, and its row stays one row.

    Spreadsheets take what begins with ``=``, ``+``, ``-`` or ``@``, full-width forms included, for a formula.

    Args:
        value: Anything; only text is changed.

    Returns:
        One printable line, an apostrophe before it where it would be a formula.

    Example:
        >>> csv_cell("\r\n=1+1"), csv_cell("a\nb"), csv_cell("\uff1d1+1"), csv_cell(-1.5)
        ("'=1+1", 'a b', "'＝1+1", -1.5)
    """
    if not isinstance(value, str):
        return value
    line = printable(value)
    return f"'{line}" if unicodedata.normalize("NFKC", line[:1]).startswith(("=", "+", "-", "@")) else line
