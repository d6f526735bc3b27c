"""The rows that the page should have."""

from itertools import product
from pathlib import Path

import yaml

from examples.networks.settings import Run, load_experiment


PLAN = Path(__file__).parent / "plan.yaml"


def planned_runs(path: Path | None = None, only: list[str] | None = None, gpu: bool = False) -> list[Run]:
    """The runs of a plan, in its order, each once.

    Args:
        path: The plan; by default `PLAN`.
        only: Experiments to take; by default all for machines without a GPU, and with `gpu` all.
        gpu: Whether experiments for a GPU are among them.

    Returns:
        The runs, with default places.
    """
    runs: dict[str, Run] = {}
    for entry in yaml.safe_load((path or PLAN).read_text(encoding="utf-8")):
        sweep = entry.get("set") or [{}]
        for experiment, seed, method, changes in product(
            entry["experiments"], entry["seeds"], entry["methods"], sweep
        ):
            wanted = experiment in only if only else gpu or "GPU" not in load_experiment(experiment).get("machine", "")
            if wanted:
                run = Run(experiment, method, seed, dict(changes))
                runs.setdefault(run.name, run)
    return list(runs.values())
