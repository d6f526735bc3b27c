"""Text from outside, made harmless for Markdown, HTML and YAML."""

from __future__ import annotations

import html
import re
import unicodedata

from hf_immunize.hub.collect import HUB_ID
from hf_immunize.text import printable


def plain(text: str) -> str:
    r"""Text as one line without meaning in Markdown or HTML.

    Args:
        text: Anything a user chose, such as the name of a class.

    Returns:
        The same to the eye.

    Example:
        >>> print(plain("<b>a|b</b>\n--- www.x.org"))
        &lt;b&gt;a\|b&lt;/b&gt; --- www&#46;x.org
        >>> print(plain("- 1. item"), plain("3. item"))
        \- 1. item 3\. item
    """
    escaped = re.sub(r"([\\`*_{}\[\]()#!|~$])", r"\\\1", html.escape(printable(text), quote=False))
    # What opens a list, a heading's underline or a rule does so at the beginning of a line only.
    escaped = re.sub(r"^([-+=:])", r"\\\1", escaped)
    escaped = re.sub(r"^(\d+)([.)])", r"\1\\\2", escaped).replace("\\\\)", "\\)")
    # Addresses that Markdown would turn into links by themselves.
    escaped = re.sub(r"(?i)(https?|ftp|mailto|xmpp):", r"\1&#58;", escaped).replace("://", "&#58;//")
    return re.sub(r"(?i)www\.", lambda m: m[0][:3] + "&#46;", escaped).replace("@", "&#64;")


def slug(text: str) -> str:
    """Text as an identifier of letters, digits and ``-._/``, as dataset types and licences are on the Hub.

    Example:
        >>> slug("scikit-learn digits 0 to 4"), slug("日本"), slug("user/name")
        ('scikit-learn-digits-0-to-4', 'unnamed', 'user/name')
    """
    if HUB_ID.fullmatch(text):
        return text
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")[:96].rstrip("-") or "unnamed"


def code_place(place: str | None) -> str:
    """What the card's code loads: an id on the Hub, or words that stand for the folder.

    Example:
        >>> code_place("user/model"), code_place('x"); import os')
        ('user/model', 'path/to/this/folder')
    """
    return place if place is not None and HUB_ID.fullmatch(place) else "path/to/this/folder"
