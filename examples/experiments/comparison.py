"""The default beside other methods: who is ahead at equal benign accuracy."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from examples.audit_page import table
from examples.experiments.methods import TITLES
from examples.experiments.rows import Group, benign_change, points, probe, rir_text, spread
from hf_immunize.audit.names import signed


# Rows that lose more than this beyond the default do not count as keeping as much.
EQUAL_POINTS = 0.5
FIGURES = ("benign change, points", "probe, %", "log10 RIR")


def at_equal_accuracy(groups: list[Group]) -> list[str]:
    """Of each other method, its best setting among those that keep as much benign accuracy."""
    pairs = _pairs(groups)
    if not pairs:
        return ["There is no seed of which both the default and another method were run.", ""]
    able = [pair for pair in pairs if pair.keeps_as_much]
    lines = []
    for method in dict.fromkeys(pair.setting.method for pair in pairs):
        own = [pair for pair in able if pair.setting.method == method]
        if own:
            best = min(own, key=lambda pair: _mean(pair.setting, probe))
            lines.append([best.title, best.setting.named_seeds, *_cells(best.setting), *_cells(best.default)])
        else:
            count = sum(pair.setting.method == method for pair in pairs)
            lines.append([f"{TITLES[method]}: none of its {count} settings keeps as much", *[""] * 7])
    found = table(["setting", "seeds", *FIGURES, *(f"default's {one}" for one in FIGURES)], lines)
    if any(pair.other_length for pair in pairs):
        found += ["† The default was not run for as many steps, and is shown with its own.", ""]
    return found


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


def _mean(group: Group, value: Callable[[dict[str, Any]], float | None]) -> float:
    return statistics.fmean(group.values(value) or [math.inf])


def _cells(group: Group) -> list[str]:
    return [spread(group.values(benign_change), signed), spread(group.values(probe), points), rir_text(group)]
