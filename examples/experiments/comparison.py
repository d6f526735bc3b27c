"""The default beside other methods: what objective and recipe contribute, who is ahead at equal benign accuracy."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from examples.audit_page import table
from examples.experiments.methods import BASELINES, METHODS, TITLES
from examples.experiments.rows import Group, benign_change, log10_rir, points, probe, rir_text, spread
from examples.experiments.settings import describe_changes
from hf_immunize.audit.names import signed


# Rows that lose more than this beyond the default do not count as keeping as much.
EQUAL_POINTS = 0.5
FIGURES = ("benign change, points", "probe, %", "log10 RIR")


def contributions(groups: list[Group]) -> list[str]:
    """Every objective under the paper's recipe and under ours, all on one seed and for as many steps."""
    plain = [group for group in groups if set(group.changes) <= {"max_steps"}]
    choices = [
        (length, seed, {group.method: group.of_seeds([seed]) for group in plain if _is(group, length, seed)})
        for length in dict.fromkeys(describe_changes(group.changes) for group in plain)
        for seed in dict.fromkeys(seed for group in groups for seed in group.seeds)
    ]
    length, seed, own = max(choices, key=lambda choice: len(choice[2]), default=("", 0, {}))
    if len(own) < 2:
        return []
    lines = []
    # An objective's name is that of its method under our recipe, less its ending.
    for name in dict.fromkeys(method.removesuffix("_ours") for method in METHODS if method in own):
        if name in BASELINES:
            lines.append([BASELINES[name][1], *_cells(own.get(name)), *_cells(own.get(f"{name}_ours"))])
        else:
            called = f"default ({own[name].objectives})" if name == "default" else TITLES[name]
            lines.append([called, *_cells(None), *_cells(own[name])])
    heads = [f"{recipe} {what}" for recipe in ("paper's recipe:", "ours:") for what in FIGURES]
    said = f"All of seed {seed}, {length or 'as many steps as the default'}; the recipe is all but the objective:"
    return [said, "", *table(["objective", *heads], lines)]


def at_equal_accuracy(groups: list[Group]) -> list[str]:
    """Of each other method, its best setting among those that keep as much benign accuracy; who is ahead of these."""
    pairs = _pairs(groups)
    if not pairs:
        return ["There is no seed of which both the default and another method were run.", ""]
    able = [pair for pair in pairs if pair.keeps_as_much]
    lines = []
    for method in dict.fromkeys(pair.setting.method for pair in pairs):
        own = [pair for pair in able if pair.setting.method == method]
        if own:
            best = min(own, key=lambda pair: _mean(pair.setting, probe, 1.0))
            lines.append([best.title, best.setting.named_seeds, *_cells(best.setting), *_cells(best.default)])
        else:
            count = sum(pair.setting.method == method for pair in pairs)
            lines.append([f"{TITLES[method]}: none of its {count} settings keeps as much", *[""] * 7])
    found = table(["setting", "seeds", *FIGURES, *(f"default's {one}" for one in FIGURES)], lines)
    if any(pair.other_length for pair in pairs):
        found += ["† The default was not run for as many steps, and is shown with its own.", ""]
    found += [f"- {len(able)} of {len(pairs)} settings of other methods keep as much benign accuracy as the default."]
    if able:
        weaker = [pair for pair in able if pair.probe_ahead > 0]
        higher, unknown = ([pair for pair in able if pair.higher_rir is wanted] for wanted in (True, None))
        bounds = f" Bounds leave open {_named(unknown)}." if unknown else ""
        found += [
            f"- Ahead of the default by a weaker strongest probe: "
            f"{_named(weaker, lambda pair: f'{100 * pair.probe_ahead:.1f} points')}.",
            f"- Ahead of the default by exact RIR: "
            f"{_named(higher, lambda pair: f'by a factor of 10^{pair.rir_ahead:.2f}')}.{bounds}",
        ]
    return [*found, ""]


@dataclass(frozen=True)
class Pair:
    """A setting of another method and the default, of the same length if there is one, both of the shared seeds."""

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
            shared = [seed for seed in group.seeds if seed in own.seeds]
            if shared:
                found.append(Pair(group.of_seeds(shared), own.of_seeds(shared)))
                break
    return found


def _is(group: Group, length: str, seed: int) -> bool:
    return describe_changes(group.changes) == length and seed in group.seeds


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
        seeds = f"seed{'s' if len(pair.setting.rows) > 1 else ''} {pair.setting.named_seeds}"
        return f"{pair.title} ({f'{by(pair)}, ' if by else ''}{seeds})"

    return "; ".join(map(one, pairs)) or "none"


def _cells(group: Group | None) -> list[str]:
    if group is None:
        return ["", "", ""]
    return [spread(group.values(benign_change), signed), spread(group.values(probe), points), rir_text(group)]
