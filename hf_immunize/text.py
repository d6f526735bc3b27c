"""Text from outside, made fit to be shown."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import Any


# Control characters, marks of writing direction, halves of surrogate pairs, private and unassigned code points:
# they hide or reverse what a reader sees, command a terminal, or cannot be written at all.
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn")


def printable(text: Any) -> str:
    r"""Text as one line of visible characters, for cards, records and the terminal.

    >>> printable("pets\n---\nlicense: mit"), printable("abc\u202edef"), printable("\x1b[2Jpets")
    ('pets --- license: mit', 'abcdef', '[2Jpets')
    """
    spaced = " ".join(str(text).split())
    visible = "".join(c for c in spaced if unicodedata.category(c) not in _INVISIBLE)
    return " ".join(visible.split())


def public_name(source: Any) -> str:
    """What records, reports and cards call a source: an id on the Hub as it is, a local path by its last part.

    A whole path may tell a user's name, or where secrets lie.

    >>> public_name("user/name"), public_name("/home/me/data/pets"), public_name("~/x/../pets")
    ('user/name', 'pets', 'pets')
    """
    text = str(source)
    if "://" in text:
        return printable(re.split(r"[?#]", text)[0].rstrip("/").rsplit("/", 1)[-1])
    path = Path(text).expanduser()
    if text and os.path.exists(path):  # `Path.exists` raises at a null byte
        return printable(path.resolve().name or "root")
    local = text.startswith(("/", "~", ".", "\\")) or bool(re.match(r"[A-Za-z]:[\\/]", text))
    if local or text.count("/") > 1 or "\\" in text:
        return printable(re.split(r"[\\/]", text.rstrip("\\/"))[-1].strip(".") or "unnamed")
    return printable(text)


def library_words(error: BaseException) -> str:
    """What another library said when it could not load something, as one line that says what to do."""
    words = printable(str(error) or type(error).__name__).rstrip(".")
    if "trust_remote_code" in words:
        return "code of its own, which runs only with trust_remote_code (--trust-remote-code): read it first"
    return words if len(words) <= 500 else words[:497] + "..."


def csv_cell(value: Any) -> Any:
    r"""A value as a cell of a CSV file: text stays text in a spreadsheet, and its row stays one row.

    Spreadsheets take what begins with ``=``, ``+``, ``-`` or ``@``, full-width forms included, for a formula.

    >>> csv_cell("\r\n=1+1"), csv_cell("a\nb"), csv_cell("\uff1d1+1"), csv_cell(-1.5)
    ("'=1+1", 'a b', "'＝1+1", -1.5)
    """
    if not isinstance(value, str):
        return value
    line = printable(value)
    return f"'{line}" if unicodedata.normalize("NFKC", line[:1]).startswith(("=", "+", "-", "@")) else line
