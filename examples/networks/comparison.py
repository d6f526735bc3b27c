"""The default beside other methods: what objective and recipe contribute, who is ahead at equal benign accuracy."""

import math
import statistics
from collections.abc import Callable
from typing import Any

from examples.audit_page import table
from examples.networks.methods import BASELINES, METHODS, TITLES
from examples.networks.rows import Group, benign_change, log10_rir, probe, spread
from examples.networks.settings import describe_changes
from examples.networks.tables import points, rir_text
from hf_immunize.attacks.text import signed


# Rows that lose this much more than the default do not count as keeping as much.
EQUAL_POINTS = 0.5


def contributions(groups: list[Group]) -> list[str]:
    """Every objective under the paper's recipe and under ours, all on one seed and for as many steps.

    Args:
        groups: Of one experiment.

    Returns:
        Lines of a paragraph and a table; none where fewer than two methods can be compared.
    """
    lengths = dict.fromkeys(describe_changes(group.changes) for group in groups if set(group.changes) <= {"max_steps"})
    choices = [
        (length, seed, {group.method: group.of_seeds([seed]) for group in groups if _is(group, length, seed)})
        for length in lengths
        for seed in dict.fromkeys(row["seed"] for group in groups for row in group.rows)
    ]
    length, seed, own = max(choices, key=lambda choice: len(choice[2]), default=("", 0, {}))
    if len(own) < 2:
        return []
    # An objective's name is that of its method under our recipe, less its ending.
    objectives = dict.fromkeys(method.removesuffix("_ours") for method in METHODS if method in own)
    lines = []
    for name in objectives:
        papers, ours = (own.get(name), own.get(f"{name}_ours")) if name in BASELINES else (None, own.get(name))
        lines.append([_objective(name), *_cells(papers), *_cells(ours)])
    heads = [
        f"{recipe} {what}"
        for recipe in ("paper's recipe:", "ours:")
        for what in ("benign change, points", "probe, %", "log10 RIR")
    ]
    said = f"All of seed {seed}, {length or 'as many steps as the default'}; the recipe is all but the objective:"
    return [said, "", *table(["objective", *heads], lines)]


def at_equal_accuracy(groups: list[Group]) -> list[str]:
    """Of each other method, its best setting among those that keep as much benign accuracy as the default.

    Args:
        groups: Of one experiment.

    Returns:
        Lines of a table.
    """
    own = _default(groups)
    if own is None:
        return ["The default was not run, so nothing is compared with it.", ""]
    lines = [[f"**{own.title}**", own.seeds, *_cells(own)]]
    for method in dict.fromkeys(group.method for group in groups):
        others = [group for group in groups if group.method == method and group is not own]
        able = [group for group in others if _keeps_as_much(group, own)]
        if able:
            best = min(able, key=lambda group: statistics.fmean(group.values(probe) or [1.0]))
            lines.append([best.title, best.seeds, *_cells(best)])
        elif others:
            lines.append([f"{TITLES[method]}: none of its {len(others)} settings keeps as much", "", "", "", ""])
    heads = ["setting", "seeds", "change of benign accuracy, points", "harmful probe, %", "log10 RIR"]
    return table(heads, lines)


def standing(groups: list[Group]) -> list[str]:
    """Which settings of other methods are ahead of the default, of those that keep as much benign accuracy.

    Args:
        groups: Of one experiment.

    Returns:
        Lines; none where there is nothing to compare.
    """
    own = _default(groups)
    others = [group for group in groups if group.method != "default"]
    if own is None or not others:
        return []
    able = [group for group in others if _keeps_as_much(group, own)]
    lines = [
        f"- {len(able)} of {len(others)} settings of other methods keep as much benign accuracy as the default on the "
        "seeds they share with it."
    ]
    if able:
        pairs = [(group, *_paired(group, own)) for group in able]
        weaker = [group for group, one, other in pairs if _mean(one, probe) < _mean(other, probe)]
        rirs = [(group, _higher_rir(one, other)) for group, one, other in pairs]
        higher, unknown = ([group for group, found in rirs if found is wanted] for wanted in (True, None))
        lines += [
            f"- Ahead of the default by a weaker strongest probe: {_named(weaker)}.",
            f"- Ahead of the default by exact RIR: {_named(higher)}"
            + (f"; bounds do not tell of {_named(unknown)}." if unknown else "."),
        ]
    return [*lines, ""]


def _default(groups: list[Group]) -> Group | None:
    return next((group for group in groups if group.method == "default" and not group.changes), None)


def _is(group: Group, length: str, seed: int) -> bool:
    return describe_changes(group.changes) == length and seed in _seeds(group)


def _seeds(group: Group) -> list[int]:
    return [row["seed"] for row in group.rows]


def _keeps_as_much(group: Group, own: Group) -> bool:
    group, own = _paired(group, own)
    return _mean(group, benign_change) >= _mean(own, benign_change) - EQUAL_POINTS / 100


def _paired(group: Group, own: Group) -> tuple[Group, Group]:
    """Both on the seeds that they share, so on the same images; as they are where they share none."""
    shared = [seed for seed in _seeds(group) if seed in _seeds(own)]
    return (group.of_seeds(shared), own.of_seeds(shared)) if shared else (group, own)


def _mean(group: Group, value: Callable[[dict[str, Any]], float | None]) -> float:
    values = group.values(value)
    return statistics.fmean(values) if values else math.nan


def _higher_rir(group: Group, own: Group) -> bool | None:
    """Whether the exact RIR of the first is the higher one; None where bounds leave it open."""
    (low, high), (own_low, own_high) = _between(group), _between(own)
    return True if low > own_high else False if high <= own_low else None


def _between(group: Group) -> tuple[float, float]:
    """The least and the greatest that the mean logarithm of the exact RIR can be."""
    low, high = [], []
    for row in group.rows:
        log, bound = log10_rir(row), row["ratios"]["exact"]["bound"]
        low.append(-math.inf if log is None or bound == "upper" else log)
        high.append(math.inf if log is None or bound == "lower" else log)
    return statistics.fmean(low), statistics.fmean(high)


def _named(groups: list[Group]) -> str:
    return "; ".join(group.title for group in groups) or "none"


def _objective(name: str) -> str:
    return "κ" if name == "kappa" else TITLES[name]


def _cells(group: Group | None) -> list[str]:
    if group is None:
        return ["", "", ""]
    return [spread(group.values(benign_change), signed), spread(group.values(probe), points), rir_text(group)]
