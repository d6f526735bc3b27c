"""The default beside other methods: what objective and recipe contribute, who is ahead at equal benign accuracy."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from examples.audit_page import table
from examples.networks.methods import BASELINES, METHODS, TITLES
from examples.networks.rows import Group, benign_change, log10_rir, probe, spread
from examples.networks.settings import describe_changes
from examples.networks.tables import points, rir_text
from hf_immunize.audit.names import signed


# Rows that lose more than this beyond the default do not count as keeping as much.
EQUAL_POINTS = 0.5
_OTHER_LENGTH = "† The default was not run for as many steps, and stands with its own."


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
        called = f"default ({ours.objectives})" if name == "default" and ours else _objective(name)
        lines.append([called, *_cells(papers), *_cells(ours)])
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
    pairs = _pairs(groups)
    if not pairs:
        return ["There is no seed of which both the default and another method were run.", ""]
    lines = []
    for method in dict.fromkeys(pair.setting.method for pair in pairs):
        own = [pair for pair in pairs if pair.setting.method == method]
        able = [pair for pair in own if pair.keeps_as_much]
        if able:
            best = min(able, key=lambda pair: _mean(pair.setting, probe, 1.0))
            lines.append([best.title, best.setting.seeds, *_cells(best.setting), *_cells(best.default)])
        else:
            lines.append([f"{TITLES[method]}: none of its {len(own)} settings keeps as much", *[""] * 7])
    what = ("benign change, points", "probe, %", "log10 RIR")
    heads = ["setting", "seeds", *what, *(f"default's {one}" for one in what)]
    return table(heads, lines) + ([_OTHER_LENGTH, ""] if any(pair.other_length for pair in pairs) else [])


def standing(groups: list[Group]) -> list[str]:
    """Which settings of other methods are ahead of the default, of those that keep as much benign accuracy.

    Args:
        groups: Of one experiment.

    Returns:
        Lines; none where there is nothing to compare.
    """
    pairs = _pairs(groups)
    if not pairs:
        return []
    able = [pair for pair in pairs if pair.keeps_as_much]
    lines = [f"- {len(able)} of {len(pairs)} settings of other methods keep as much benign accuracy as the default."]
    if able:
        weaker = [pair for pair in able if pair.probe_ahead > 0]
        higher, unknown = ([pair for pair in able if pair.higher_rir is wanted] for wanted in (True, None))
        bounds = f" Bounds do not tell of {_named(unknown)}." if unknown else ""
        lines += [
            f"- Ahead of the default by a weaker strongest probe: "
            f"{_named(weaker, lambda pair: f'{100 * pair.probe_ahead:.1f} points')}.",
            f"- Ahead of the default by exact RIR: "
            f"{_named(higher, lambda pair: f'by a factor of 10^{pair.rir_ahead:.2f}')}.{bounds}",
        ]
    return [*lines, ""]


@dataclass(frozen=True)
class Pair:
    """A setting of another method and the default of the same length, both of the seeds that they share.

    Attributes:
        setting: Rows of the one.
        default: Of the other.
    """

    setting: Group
    default: Group

    @property
    def title(self) -> str:
        """Of the setting; marked where the default was not run for as many steps."""
        return self.setting.title + (" †" if self.other_length else "")

    @property
    def other_length(self) -> bool:
        """Whether the two were not trained for as many steps."""
        return self.setting.changes.get("max_steps") != self.default.changes.get("max_steps")

    @property
    def keeps_as_much(self) -> bool:
        """Whether the setting's mean benign accuracy is at most `EQUAL_POINTS` behind the default's."""
        behind = _mean(self.default, benign_change) - _mean(self.setting, benign_change)
        return behind <= EQUAL_POINTS / 100 + 1e-9

    @property
    def probe_ahead(self) -> float:
        """By how much less the strongest probe reads than of the default, a fraction."""
        return _mean(self.default, probe) - _mean(self.setting, probe)

    @property
    def rir_ahead(self) -> float:
        """Difference of the mean logarithms of the exact RIR."""
        return _mean(self.setting, log10_rir) - _mean(self.default, log10_rir)

    @property
    def higher_rir(self) -> bool | None:
        """Whether the setting's exact RIR is the higher one; None where bounds leave it open."""
        (low, high), (own_low, own_high) = _between(self.setting), _between(self.default)
        return True if low > own_high else False if high <= own_low else None


def _pairs(groups: list[Group]) -> list[Pair]:
    """Every setting of another method that shares a seed with the default; the default of its own length if any."""
    defaults = [group for group in groups if group.method == "default" and set(group.changes) <= {"max_steps"}]
    found = []
    for group in (one for one in groups if one.method != "default"):
        length = group.changes.get("max_steps")
        for own in sorted(defaults, key=lambda one: (one.changes.get("max_steps") != length, bool(one.changes))):
            shared = [seed for seed in _seeds(group) if seed in _seeds(own)]
            if shared:
                found.append(Pair(group.of_seeds(shared), own.of_seeds(shared)))
                break
    return found


def _is(group: Group, length: str, seed: int) -> bool:
    return describe_changes(group.changes) == length and seed in _seeds(group)


def _seeds(group: Group) -> list[int]:
    return [row["seed"] for row in group.rows]


def _mean(group: Group, value: Callable[[dict[str, Any]], float | None], missing: float = math.nan) -> float:
    values = group.values(value)
    return statistics.fmean(values) if values else missing


def _between(group: Group) -> tuple[float, float]:
    """The least and the greatest that the mean logarithm of the exact RIR can be."""
    low, high = [], []
    for row in group.rows:
        log, bound = log10_rir(row), row["ratios"]["exact"]["bound"]
        low.append(-math.inf if log is None or bound == "upper" else log)
        high.append(math.inf if log is None or bound == "lower" else log)
    return statistics.fmean(low), statistics.fmean(high)


def _named(pairs: list[Pair], by: Callable[[Pair], str] | None = None) -> str:
    def one(pair: Pair) -> str:
        seeds = f"seed{'s' if len(pair.setting.rows) > 1 else ''} {pair.setting.seeds}"
        return f"{pair.title} ({f'{by(pair)}, ' if by else ''}{seeds})"

    return "; ".join(map(one, pairs)) or "none"


def _objective(name: str) -> str:
    return "κ" if name == "kappa" else TITLES[name]


def _cells(group: Group | None) -> list[str]:
    if group is None:
        return ["", "", ""]
    return [spread(group.values(benign_change), signed), spread(group.values(probe), points), rir_text(group)]
