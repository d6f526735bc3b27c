"""The rows that the page should have."""

from itertools import product
from pathlib import Path

import yaml

from examples.fine_tuning.settings import Run


PLAN = Path(__file__).parent / "plan.yaml"


def planned_runs(path: Path | None = None) -> list[Run]:
    """The runs of a plan, in its order, each once, with default places."""
    runs: dict[str, Run] = {}
    for entry in yaml.safe_load((path or PLAN).read_text(encoding="utf-8")):
        combinations = product(entry["experiments"], entry["seeds"], entry["candidates"], entry.get("set") or [{}])
        for experiment, seed, candidate, changes in combinations:
            run = Run(experiment, candidate, seed, dict(changes))
            runs.setdefault(run.name, run)
    return list(runs.values())
