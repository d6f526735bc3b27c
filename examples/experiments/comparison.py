"""The default beside other methods: who is ahead at equal benign accuracy."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from examples.audit_page import table
from examples.experiments.methods import TITLES
from examples.experiments.rows import Group, benign_change, log10_rir, points, probe, rir_text, spread
from hf_immunize.audit.names import signed


# Rows that lose more than this beyond the default do not count as keeping as much.
EQUAL_POINTS = 0.5
FIGURES = ("benign change, points", "probe, %", "log10 RIR")


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
        weaker = [pair for pair in able if pair.ahead(probe) < 0]
        higher, unknown = ([pair for pair in able if pair.higher_rir is wanted] for wanted in (True, None))
        bounds = f" Bounds leave open {_named(unknown)}." if unknown else ""
        found += [
            f"- Ahead of the default by a weaker strongest probe: "
            f"{_named(weaker, lambda pair: f'{-100 * pair.ahead(probe):.1f} points')}.",
            f"- Ahead of the default by exact RIR: "
            f"{_named(higher, lambda pair: f'by a factor of 10^{pair.ahead(log10_rir):.2f}')}.{bounds}",
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
        return self.ahead(benign_change) >= -EQUAL_POINTS / 100 - 1e-9

    def ahead(self, value: Callable[[dict[str, Any]], float | None]) -> float:
        """By how much the setting's mean of a figure is above the default's."""
        return _mean(self.setting, value) - _mean(self.default, value)

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


def _cells(group: Group) -> list[str]:
    return [spread(group.values(benign_change), signed), spread(group.values(probe), points), rir_text(group)]
