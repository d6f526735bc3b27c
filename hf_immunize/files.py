"""Files written whole or not at all, on disk when that is said; checksums of files, of lines and of tensors."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from hf_immunize.errors import ArgumentError, CheckpointError, ImmunizationError


if TYPE_CHECKING:
    from torch import Tensor, nn


# Begins the names of what is being written; a push to the Hub leaves out what begins with "_".
UNFINISHED = "_unfinished-"
# What a full disk raises: torch.save a RuntimeError, safetensors its own.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
_LOCK = ".lock"
_CHECKSUM = "checksum"
# From file systems that have no such call.
_CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def flush(path: str | os.PathLike[str]) -> None:
    """Wait until a file's content, or the names in a folder, are on disk, where a power cut leaves them."""
    windows = os.name == "nt"
    if windows and os.path.isdir(path):  # has no such call
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def staged_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory within the target to write into; its files replace the target's only when all are on disk."""
    target = Path(target)
    new = [folder for folder in (target, *target.parents) if not folder.exists()]
    staging: Path | None = None
    lock: FileLock | None = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        # Within the target, which may be a mount of its own.
        staging = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=target))
        # It shows others that this is being written.
        lock = FileLock(staging / _LOCK)
        with suppress(NotImplementedError, OSError):  # of file systems that know no locks
            lock.acquire()
        yield staging
        written = sorted(path for path in staging.rglob("*") if path != staging / _LOCK)
        files, folders = ([path for path in written if path.is_file() is kind] for kind in (True, False))
        for file in files:
            flush(file)
        for folder in folders:
            (target / folder.relative_to(staging)).mkdir(exist_ok=True)
        for file in files:
            os.replace(file, target / file.relative_to(staging))
        for folder in (*reversed(folders), staging):
            flush(target / folder.relative_to(staging))
        for folder in new:
            flush(folder.parent)
    except ImmunizationError:
        raise
    except WRITE_ERRORS as error:
        raise CheckpointError(
            f"Expected to write {target}, found: {error}. What was there before is untouched; make room or choose "
            "another output_dir, and save again."
        ) from error
    finally:
        if lock is not None:
            lock.release()
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if new:
            with suppress(OSError):  # not empty: the files are in place
                target.rmdir()


def write_whole(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file in UTF-8, whole or not at all; it is on disk when this returns."""
    path = Path(path)
    with staged_directory(path.parent) as staging:
        (staging / path.name).write_text(text, encoding="utf-8")
    return path


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what killed processes were writing into a folder; what is being written now stays."""
    for leftover in Path(folder).glob(f"{UNFINISHED}*"):
        # The operating system lets go of a lock when its process ends, however that happens.
        with suppress(Timeout, NotImplementedError, OSError), FileLock(leftover / _LOCK, timeout=0):
            shutil.rmtree(leftover, ignore_errors=True)


def check_writable(folder: str | os.PathLike[str], option: str) -> None:
    """Make sure, before any work is done, that files can be written into a folder, which may not exist yet."""
    place = Path(folder)
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ArgumentError(
            f"Expected a folder that can be written as {option}, found {os.fspath(folder)} ({error.strerror}). Choose "
            "another, or change its rights."
        ) from error


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def with_checksum(values: Mapping[str, Any]) -> str:
    """Plain values as one line of JSON that `checked` can tell from a damaged one."""
    return json.dumps({**values, _CHECKSUM: _checksum(values)})


def checked(line: str) -> dict[str, Any]:
    """The values in a line that `with_checksum` made."""
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError("no JSON object")
    if values.pop(_CHECKSUM, None) != _checksum(values):
        raise ValueError("the checksum is of other values")
    return values


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def tensor_bytes(tensor: Tensor) -> Any:
    """A tensor's values as a numpy array of bytes, whose buffer a hash reads."""
    import torch  # where there is a tensor, it is loaded already

    # A view as bytes, since numpy knows no bfloat16.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def tensors_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """Hash tensors with their names, types and shapes, in order; a sum would not see two values change places."""
    digest = hashlib.blake2b(digest_size=20)
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """Hash all weights and statistics of a model; of those in parts, the part that this process holds."""
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if hasattr(value, "detach")}
    return tensors_hash((name, _own_part(value).detach()) for name, value in state.items())


def _own_part(value: Any) -> Any:
    """What this process holds of a tensor of FSDP2, of ZeRO 3, or of any other."""
    return value.to_local() if hasattr(value, "to_local") else getattr(value, "ds_tensor", value)
