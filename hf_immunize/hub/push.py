"""Pushing a checkpoint: an allow-list of files without token or local path, in one commit, whole or not at all.

The files are named one by one (`create_commit`): `upload_folder` makes several commits of large folders, and takes
names by patterns that were never looked at.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResultEntry,
    HfApi,
    eval_result_entries_to_yaml,
)
from PIL import Image
from transformers.utils import logging

from hf_immunize.errors import ArgumentError, HubError, RecordError, WeightsError
from hf_immunize.hub.card import CardOptions, write_card
from hf_immunize.hub.collect import HUB_ID, is_hub_id
from hf_immunize.hub.load import ALLOWED, INDEX, changed_weights, load_model, refuse_links, retried, weight_files
from hf_immunize.hub.record import PICTURES, RECORD_NAME, ImmunizationRecord, read_record
from hf_immunize.text import library_words, printable, public_name
from hf_immunize.vision.bare import HEAD_CONFIG_FILE
from hf_immunize.vision.loading import ADAPTER_CONFIG_FILE, same_logits


logger = logging.get_logger(__name__)
_REPO = re.compile(r"([\w.-]+/)?[\w.-]+", re.ASCII)
_WEIGHTS = re.compile(
    r"(model|adapter_model|pytorch_model|tf_model|flax_model|head)[\w.-]*\.(safetensors|bin|h5|msgpack)"
)
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
# Compressed pixels have bytes of every kind, "n:\\u" too, but hardly ever so many characters on end.
_LEGIBLE = re.compile(rb"[\x20-\x7e]{12,}")


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
    as_saved: bool = False,
    benchmark: str | None = None,
) -> PushResult:
    """Push a checkpoint to the Hub: card, record, weights, config, processor and figures, nothing else.

    With `benchmark`, ``user/data`` or ``user/data:task`` of the Hub, benign accuracy goes to its leaderboard too.
    What a Trainer saved goes with the card that it wrote; it has seen that the files load back (`as_saved`).
    """
    root = Path(folder)
    record = _record_of(root, repo_id, require_record)
    if record is not None and not (dry_run or as_saved):
        write_card(root, record, CardOptions(repo_id=repo_id))
    names = files_to_push(root, record)
    check_private(root, names, token)
    files: dict[str, str | bytes] = {name: str(root / name) for name in names}
    files |= benchmark_result(record, benchmark) if benchmark is not None else {}
    if not as_saved:
        check_loads_back(root, names, token, trust_remote_code)
    if dry_run:
        return PushResult(repo_id, _sizes(files))
    api = api or HfApi(token=token, library_name="hf_immunize")
    return _send(api, repo_id, files, private, revision, commit_message)


def _sizes(files: Mapping[str, str | bytes]) -> dict[str, int]:
    return {name: len(one) if isinstance(one, bytes) else os.path.getsize(one) for name, one in files.items()}


def benchmark_result(record: ImmunizationRecord | None, benchmark: str) -> dict[str, str | bytes]:
    """The file that puts benign accuracy on a benchmark's leaderboard, by its name."""
    dataset, _, task = benchmark.partition(":")
    if not (HUB_ID.fullmatch(dataset) and re.fullmatch(r"[\w.-]*", task, re.ASCII)):
        raise ArgumentError(
            f"Expected a benchmark user/data or user/data:task of the Hub, found {benchmark!r}. Correct the name."
        )
    metric = record.metric if record is not None else None
    if metric is None or metric.name != "accuracy":
        found = "none" if metric is None else printable(metric.name)
        raise ArgumentError(
            f"Expected a record with benign accuracy to send to {dataset}, found {found}. Evaluate on its test images "
            "and save, or leave the benchmark out."
        )
    notes = f"immunized with hf_immunize; before: {metric.before:.4f}" if metric.before is not None else None
    entry = EvalResultEntry(dataset, task or "default", round(metric.after, 4), notes=notes)
    text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return {f".eval_results/{dataset.replace('/', '_')}.yaml": text.encode()}


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


def _send(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, str | bytes],
    private: bool | None,
    revision: str | None,
    message: str,
) -> PushResult:
    sizes = _sizes(files)

    def commit() -> PushResult:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        info = api.model_info(name, revision=revision)
        if private and not info.private:
            raise HubError(
                f"Expected the private repository {name} that was asked for, found a public one of that name. Make it "
                "private on the Hub, or choose another name.",
                "conflict",
            )
        there = {sibling.rfilename for sibling in info.siblings or []} - set(sizes)
        forms = (ADAPTER_CONFIG_FILE, HEAD_CONFIG_FILE)  # each makes of the weights something else
        stale = sorted(file for file in there if _WEIGHTS.fullmatch(file) or file in forms)
        if stale:
            logger.warning(f"Removing {', '.join(stale)} from {name}: the pushed checkpoint does not have them.")
        # Operations can be committed only once; a new attempt needs new ones.
        operations: list[Any] = [CommitOperationAdd(file, content) for file, content in files.items()]
        operations += [CommitOperationDelete(file) for file in stale]
        done = api.create_commit(name, operations, commit_message=printable(message), revision=revision)
        return PushResult(name, sizes, done.oid, str(done.repo_url), changed=done.oid != info.sha)

    return retried(commit, f"push to {repo_id}")


# ---- whether it loads back ----


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


# ---- whether it is private ----


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
        raw = path.read_bytes()
        yield from (b"\n".join(_LEGIBLE.findall(form)) for form in (raw, raw.replace(b"\0", b"")))
        yield from _comments(path)
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
