"""Files of a run: JSON that is whole or absent, folders held by one run at a time, parts that are done once."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_immunize.files import write_whole


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote; None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder that another run may be writing."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"Waiting for another run that works in {folder} …", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Parts:
    """The parts of a run that are finished, with what each cost and found; on disk as soon as they are."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "parts.json"
        self.done: dict[str, dict[str, Any]] = read_json(self.path) or {}

    def run(self, name: str, work: Callable[[], Any], resumed: bool = False) -> Any:
        """The plain result of a part, computed now if it is not there yet; `resumed` if some of it was done before."""
        if name not in self.done:
            print(f"[{time.strftime('%H:%M:%S')}] {self.path.parent.name}: {name}", flush=True)
            start = time.perf_counter()
            value = work()
            seconds = round(time.perf_counter() - start, 1)
            self.done[name] = {"seconds": seconds, "resumed": resumed, "value": value}
            write_json(self.path, self.done)
        return self.done[name]["value"]

    def seconds(self) -> dict[str, float]:
        """Seconds of each part."""
        return {name: part["seconds"] for name, part in self.done.items()}

    def resumed(self) -> list[str]:
        """Parts of whose seconds only the last attempt is known."""
        return [name for name, part in self.done.items() if part["resumed"]]
