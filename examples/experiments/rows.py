"""The rows that runs left behind, and what follows from several of them: means, spreads, pooled differences."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from examples.experiments.files import read_json
from examples.experiments.methods import METHODS, TITLES
from examples.experiments.run import ROW, VERSION
from examples.experiments.settings import describe_changes
from hf_immunize.audit.statistics import NORMAL
from hf_immunize.errors import DataError


@dataclass
class Group:
    """Rows of one experiment, method and changes, one a seed."""

    experiment: str
    method: str
    changes: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Method and changes, for people."""
        changes = describe_changes(self.changes)
        return TITLES[self.method] + (f", {changes}" if changes else "")

    @property
    def seeds(self) -> list[int]:
        """Of its rows."""
        return [row["seed"] for row in self.rows]

    @property
    def named_seeds(self) -> str:
        """The same, for people."""
        return ", ".join(map(str, self.seeds))

    def of_seeds(self, seeds: Iterable[int]) -> "Group":
        """Its rows of some seeds."""
        wanted = set(seeds)
        return replace(self, rows=[row for row in self.rows if row["seed"] in wanted])

    def values(self, value: Callable[[dict[str, Any]], Any]) -> list[float]:
        """One number a row, where the row has it."""
        return [one for one in map(value, self.rows) if one is not None]


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows in a folder of runs, of this version of the program alone."""
    rows = [read_json(path) for path in sorted(folder.glob(f"*/{ROW}"))]
    for row in rows:
        if row["settings"]["version"] != VERSION:
            raise DataError(
                f"Expected rows of version {VERSION}, found {row['name']} of version {row['settings']['version']}. "
                "Run it again with --redo, or move it away."
            )
    return rows


def group_rows(rows: Iterable[dict[str, Any]]) -> list[Group]:
    """Groups in the order of experiments, methods and changes."""
    groups: dict[tuple[str, str, str], Group] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        key = (row["experiment"], row["method"], describe_changes(row["changes"]))
        groups.setdefault(key, Group(row["experiment"], row["method"], row["changes"])).rows.append(row)
    order = {name: index for index, name in enumerate(METHODS)}
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], key[2] != "", order[key[1]], key[2]))]


def benign_change(row: dict[str, Any]) -> float:
    """Benign accuracy after less before, as a fraction."""
    return row["utility"]["difference"]


def probe(row: dict[str, Any], task: str = "harmful", kind: str = "linear", moment: str = "after") -> float | None:
    """Accuracy of the strongest linear probe, or None where it was not tried."""
    found = row["probes"].get(task, {}).get(kind)
    return None if found is None else found[moment]["accuracy"]


def above_chance(row: dict[str, Any], task: str = "harmful") -> float | None:
    """The same after immunization at the classifier's input, less chance."""
    accuracy = probe(row, task)
    return None if accuracy is None else accuracy - row["probes"][task]["chance"]


def log10_rir(row: dict[str, Any]) -> float | None:
    """Exact; None where bounds oppose each other."""
    return row["ratios"]["exact"]["log10_rir"]


def bound_sign(rows: list[dict[str, Any]]) -> str:
    """What the exact RIR of rows is of the true value: "≥ ", "≤ " or nothing."""
    bounds = {row["ratios"]["exact"]["bound"] for row in rows}
    return "≥ " if "lower" in bounds else "≤ " if "upper" in bounds else ""


def pooled_difference(rows: list[dict[str, Any]]) -> tuple[float, tuple[float, float], int]:
    """Mean difference of benign accuracy over all held-out images of all splits, its 95 % interval, how many images.

    Paired by image, and clustered by it: an image that several splits hold out counts in each, and its differences are
    not taken as independent. What another training would change is not in the interval; the spread over splits is.
    """
    clusters: dict[Any, list[int]] = defaultdict(list)
    for row in rows:
        hits = row["utility"]["hits"]
        differences = [int(after) - int(before) for before, after in zip(hits["before"], hits["after"], strict=True)]
        names = row["test_rows"].split() if row.get("test_rows") else range(len(differences))
        for name, difference in zip(names, differences, strict=True):
            clusters[str(name)].append(difference)
    size, count = sum(map(len, clusters.values())), len(clusters)
    mean = sum(map(sum, clusters.values())) / size
    squares = sum((sum(one) - len(one) * mean) ** 2 for one in clusters.values())
    half = NORMAL * math.sqrt(squares * count / max(count - 1, 1)) / size
    if all(not difference for one in clusters.values() for difference in one):
        half = min(1.0, 3 / count)  # the rule of three: how often an image might differ that never did
    return mean, (max(-1.0, mean - half), min(1.0, mean + half)), size


def seconds_of(rows: list[dict[str, Any]]) -> float:
    """Seconds of all parts of all rows, what several share counted once."""
    shared = {row["shared"]["name"]: sum(row["shared"]["seconds"].values()) for row in rows}
    starts = {row["settings"]["start"]["weights"]: row["start"].get("seconds", 0.0) for row in rows}
    return sum(sum(row["seconds"].values()) for row in rows) + sum(shared.values()) + sum(starts.values())


# ---- for people ----


def spread(values: list[float], show: Callable[[float], str]) -> str:
    """The mean, with the standard deviation where there are several."""
    if not values:
        return "–"
    mean = show(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean} ± {show(statistics.stdev(values)).lstrip('+')}"


def decimal(value: float) -> str:
    """A number with two decimals, and a minus sign where it is negative."""
    return f"{value:.2f}".replace("-", "−")


def points(value: float) -> str:
    """An accuracy in per cent, one decimal."""
    return f"{100 * value:.1f}"


def probe_change(group: Group, task: str = "harmful", kind: str = "linear") -> str:
    """What the strongest probe reads before and after, in per cent."""
    before, after = (
        spread([one for row in group.rows if (one := probe(row, task, kind, moment)) is not None], points)
        for moment in ("before", "after")
    )
    return f"{before} → {after}"


def rir_text(group: Group) -> str:
    """The exact RIR's logarithm, with the sign of a bound."""
    logs = group.values(log10_rir)
    return bound_sign(group.rows) + spread(logs, decimal) if logs else "undetermined"
