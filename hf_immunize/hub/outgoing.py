"""What may leave the machine: files of the folder itself and pictures that are some; no token, no local path."""

from __future__ import annotations

import html
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
from PIL import Image

from hf_immunize.errors import ArgumentError, RecordError
from hf_immunize.hub.record import PICTURES
from hf_immunize.text import library_words, printable, public_name


_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"
    r"|sk-(?:(?:proj|ant|svcacct)-[\w-]{20,}|[A-Za-z0-9]{32,})|xox[abeprs]-[\w-]{20,}|AKIA[0-9A-Z]{16})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----",
    re.ASCII,
)
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
# What JSON, YAML and Python write for a character.
_ESCAPED = re.compile(r"\\u00([0-9A-Fa-f]{2})|\\x([0-9A-Fa-f]{2})|\\(?=/)")
# Of transformers and PEFT: where a model was loaded from.
_LOADED_FROM = re.compile(r'"(?:\w*_)?name_or_path"\s*:\s*"((?:[^"\\]|\\.)+)"')
# A path from the root, or from a drive: neither part of an address nor a closing tag.
_ABSOLUTE = re.compile(
    r"(?:(?<![\w.:/\\~<%@#+*-])|(?<=file://))(?:/[\w.@+-]+(?:/[\w.@+-]+)+|[A-Za-z]:(?:\\\\?|/)\w[^\s\"'`<>|]*)"
)
_PERSONS = ("/home/", "/Users/", "/root/")
# The same on every machine: they give nothing away.
_SYSTEMS = ("/bin/", "/dev/", "/etc/", "/lib/", "/lib64/", "/proc/", "/sbin/", "/sys/", "/usr/")
_LONGEST_HEADER = 2**27


def refuse_links(folder: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Refuse symbolic links: what they lead to is no part of the folder."""
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


def check_private(folder: str | os.PathLike[str], names: Iterable[str], token: str | None = None) -> None:
    """Refuse to publish tokens and local paths, in whatever form a file holds its text."""
    root = Path(folder)
    tokens = {token, huggingface_hub.get_token(), *(os.environ.get(name) for name in _TOKEN_VARIABLES)}
    secrets = [value for value in tokens if value and len(value) >= 8]
    # A path ends where a name does: "/root" is no part of "/rooted".
    homes = {str(Path.home()), str(root.resolve())}
    own = [re.compile(rf"(?<![\w.]){re.escape(path)}(?![\w-])") for path in homes if len(path) > 2]
    for name in names:
        for text in (form for words in _words(root / name) for form in _forms(words)):
            if _TOKENS.search(text) or any(secret in text for secret in secrets):
                found: str | None = "a token"
            else:
                path = _local_path(text, own)
                found = None if path is None else f"the local path {printable(path)}"
            if found:
                raise ArgumentError(
                    f"Expected nothing private in what is pushed, found {found} in {printable(name)}. Remove it from "
                    "that file (of a model's source, put its name on the Hub), and push again; nothing was sent."
                )


def _words(path: Path) -> Iterator[bytes | str]:
    """What a reader of a file could find to read."""
    if path.suffix == ".safetensors":
        with open(path, "rb") as file:
            yield file.read(min(int.from_bytes(file.read(8), "little"), _LONGEST_HEADER))
    elif path.suffix in PICTURES:
        yield path.read_bytes()
        yield from _comments(path)
    elif zipfile.is_zipfile(path):  # as torch.save writes
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist() if name.endswith(".pkl"))
    else:
        yield path.read_bytes()


def _comments(picture: Path) -> list[bytes | str]:
    """Comments and metadata of a picture, unpacked."""
    try:
        with Image.open(picture, formats=[PICTURES[picture.suffix]]) as image:
            image.load()
            return [value for value in image.info.values() if isinstance(value, bytes | str)]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RecordError(
            f"Expected the figure {printable(picture.name)} to be a picture ({PICTURES[picture.suffix]}), found: "
            f"{library_words(error)}. Draw it again, or take it out of the record."
        ) from error


def _forms(words: bytes | str) -> Iterator[str]:
    """Text as it stands, without the zeros of wide encodings, and with escapes resolved."""
    text = words if isinstance(words, str) else words.decode("utf-8", errors="replace")
    yield text
    if "\0" in text:
        yield text.replace("\0", "")
    plain = _ESCAPED.sub(lambda match: chr(int(match[1] or match[2] or "0", 16)) if match[0] != "\\" else "", text)
    plain = unquote(html.unescape(plain))
    if plain != text:
        yield plain


def _local_path(text: str, own: list[re.Pattern[str]]) -> str | None:
    """The first local path in a text: of a person, of this machine, or where a model was loaded from."""
    for pattern in own:
        if match := pattern.search(text):
            return match[0]
    for match in _LOADED_FROM.finditer(text):
        if public_name(match[1]) != match[1] or Path(match[1]).exists():
            return match[1]
    for match in _ABSOLUTE.finditer(text):
        path = match[0]
        if not path.startswith("/") or path.startswith(_PERSONS):
            return path
        if not path.startswith(_SYSTEMS) and os.path.exists(path):
            return path
    return None
