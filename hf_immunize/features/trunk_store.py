"""The stored activations of several datasets beside one another: found, or written once the disk is known to do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import Timeout
from huggingface_hub.utils import WeakFileLock
from transformers.utils import logging

from hf_immunize.errors import DiskSpaceError
from hf_immunize.features.processes import Processes
from hf_immunize.features.trunk_cache import TrunkCache, readable_size
from hf_immunize.features.trunk_rows import CachedRows
from hf_immunize.files import UNFINISHED


logger = logging.get_logger(__name__)


def open_or_write(*caches: TrunkCache) -> list[CachedRows]:
    """Find stored activations, and write those that are missing, once the disk is known to hold them all.

    The caches' processes do this together. Other runs that share the folder wait until it is done.

    Args:
        *caches: Caches in sister folders, of the same processes.

    Returns:
        The rows of each.

    Raises:
        DiskSpaceError: If the disk does not hold them, before anything is written or removed.
        NonFiniteError, ProcessError: See `TrunkCache.write`.
    """
    processes, parent = caches[0].processes, caches[0].folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    with _locked(parent / ".lock", processes):
        processes.from_first(lambda: _remove_leftovers(parent))
        found = processes.everywhere(lambda: [cache.find() for cache in caches])
        # Rounding may differ between processes, and one that wrote alone would wait for the others forever.
        lacking = processes.together(lambda: [index for index, rows in enumerate(found) if rows is None])
        anew = {index for indices in lacking for index in indices}
        if anew:
            processes.from_first(lambda: _check_space(parent, [caches[index] for index in sorted(anew)]))
        return [
            cache.write() if rows is None or index in anew else rows
            for index, (cache, rows) in enumerate(zip(caches, found, strict=True))
        ]


@contextmanager
def _locked(path: Path, processes: Processes) -> Iterator[None]:
    """Hold a lock on behalf of all processes.

    Another run may hold it for as long as it writes, which no collective would wait for: so each process waits at the
    file first, and the first one takes it only if it is still free.
    """
    with ExitStack() as stack:

        def take() -> bool:
            try:
                stack.enter_context(WeakFileLock(path, timeout=None if processes.count == 1 else 1))
            except Timeout:
                return False
            return True

        while True:
            if processes.count > 1:
                with WeakFileLock(path):
                    pass
                processes.together(lambda: None)  # else the last to pass would wait for the first to let go
            if processes.from_first(take):
                break
        yield


def _remove_leftovers(parent: Path) -> None:
    for leftover in parent.glob(f"{UNFINISHED}*"):  # of a run that was killed, or it would hold the lock
        shutil.rmtree(leftover, ignore_errors=True)


def _check_space(parent: Path, missing: list[TrunkCache]) -> None:
    needed = sum(cache.nbytes for cache in missing)
    replaced = sum(file.stat().st_size for cache in missing for file in cache.folder.glob("*"))
    free = shutil.disk_usage(parent).free + replaced
    what = ", ".join(f"{len(cache):,} {cache.name}" for cache in missing)
    logger.info(f"Caching the frozen trunk of {what}: about {readable_size(needed)} of {readable_size(free)} free.")
    if needed > free:
        raise DiskSpaceError(
            f"Expected {readable_size(needed)} for the cached trunk ({what}), found {readable_size(free)} free in "
            f"{parent}. Make room, choose another trunk_cache_dir, use cache_trunk='float16' or fewer "
            "trunk_cache_views, or train without (cache_trunk='no')."
        )
