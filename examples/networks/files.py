"""Files that are written whole or not at all, and parts of a run that are done once."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"_unfinished-{os.getpid()}-{path.name}")
    try:
        unfinished.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What `write_json` wrote; None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


class Parts:
    """The parts of a run that are finished, with what each cost and found; on disk as soon as they are.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "parts.json"
        self.done: dict[str, dict[str, Any]] = read_json(self.path) or {}

    def run(self, name: str, work: Callable[[], Any], resumed: bool = False) -> Any:
        """The result of a part, computed now if it is not there yet.

        Args:
            name: Of the part.
            work: Computes plain values.
            resumed: Whether an earlier attempt did some of it, so that the seconds are of the last attempt alone.

        Returns:
            What it found.
        """
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
