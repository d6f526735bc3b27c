"""The tables of the page."""

import statistics
from collections.abc import Callable
from typing import Any

from examples.audit_page import table
from examples.networks.methods import TITLES
from examples.networks.rows import (
    Group,
    benign_change,
    bound_sign,
    decimal,
    log10_rir,
    pooled_difference,
    probe,
    spread,
)
from examples.networks.sentences import stopped
from hf_immunize.audit.names import percent, signed


def points(value: float) -> str:
    """An accuracy in per cent, one decimal."""
    return f"{100 * value:.1f}"


def probe_change(group: Group, task: str, kind: str = "linear") -> str:
    """What the strongest probe reads before and after, in per cent."""
    before = group.values(lambda row: probe(row, task, kind, "before"))
    return f"{spread(before, points)} → {spread(group.values(lambda row: probe(row, task, kind)), points)}"


def rir_text(group: Group) -> str:
    """The exact RIR's logarithm, with the sign of a bound."""
    logs = group.values(log10_rir)
    return bound_sign(group) + spread(logs, decimal) if logs else "undetermined"


def _reference(group: Group) -> str:
    values = group.values(lambda row: (row["ratios"].get("reference") or {}).get("rir"))
    return spread(values, lambda value: f"{value:.3g}")


def _part(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda row: row["ratios"]["exact"][name]


def summary(groups: list[Group], wanted: dict[str, Any]) -> list[str]:
    """What every method reaches with the experiment's own length of training."""
    heads = ["method", "seeds", "benign accuracy, %", "change, points (95 %)", "log10 RIR, exact", "(i)", "(ii)"]
    heads += ["RIR, noise-floored", "harmful probe, %", "", "any layer, %", "unseen classes, %", "unrelated task, %"]
    heads += ["minutes"]
    lines = []
    for group in groups:
        mean, (low, high), _ = pooled_difference(group.rows)
        before = spread(group.values(lambda row: row["utility"]["reference"]), points)
        after = spread(group.values(lambda row: row["utility"]["immunized"]), points)
        minutes = group.values(lambda row: sum(row["seconds"].values()) / 60)
        lines.append(
            [
                group.title,
                group.seeds,
                f"{before} → {after}",
                f"{signed(mean)} ({signed(low)} to {signed(high)})",
                rir_text(group),
                spread(group.values(_part("harmful_ratio")), lambda value: f"{value:.3g}"),
                spread(group.values(_part("benign_ratio")), lambda value: f"{value:.3g}"),
                _reference(group),
                probe_change(group, "harmful"),
                stopped(group, wanted),
                probe_change(group, "harmful", "any_layer"),
                probe_change(group, "unseen"),
                probe_change(group, "unrelated"),
                f"{statistics.fmean(minutes):.0f}",
            ]
        )
    return table(heads, lines)


def classes(groups: list[Group]) -> list[str]:
    """The strongest attacker by what it has, all attackers counted; each row's own worst, averaged over seeds."""
    names = {"head_input": "the classifier's input", "any_layer": "any layer", "fine_tuning": "all weights"}
    tasks = {"harmful": "used classes", "unseen": "unseen classes", "unrelated": "unrelated task"}
    lines = []
    for group in groups:
        for task, called in tasks.items():
            for access, name in names.items():
                found = [row["probes"].get(task, {}).get("by_class", {}).get(access) for row in group.rows]
                found = [one for one in found if one]
                if not found:
                    continue
                worst = max(found, key=lambda one: one["after"]["accuracy"])["after"]
                where = f" at {worst['layer']}" if access == "any_layer" else ""
                lines.append(
                    [
                        group.title,
                        called,
                        name,
                        spread([one["before"]["accuracy"] for one in found], points),
                        spread([one["after"]["accuracy"] for one in found], points),
                        worst["attacker"] + where,
                        percent(statistics.fmean([row["probes"][task]["chance"] for row in group.rows])),
                    ]
                )
    return table(["method", "task", "attacker has", "before, %", "after, %", "strongest", "chance"], lines)


def frontier(groups: list[Group], wanted: dict[str, Any]) -> list[str]:
    """Every method and setting, the least benign accuracy lost first."""
    heads = ["setting", "seeds", "change of benign accuracy, points", "harmful probe, %", "", "log10 RIR, exact"]
    ordered = sorted(groups, key=lambda group: -statistics.fmean(group.values(benign_change)))
    lines = [
        [
            group.title,
            group.seeds,
            spread(group.values(benign_change), signed),
            spread(group.values(probe), points),
            stopped(group, wanted),
            rir_text(group),
        ]
        for group in ordered
    ]
    return table(heads, lines)


def published(groups: list[Group], figures: dict[str, dict[str, float]]) -> list[str]:
    """The paper's table beside what was run here."""
    ours = {group.method: group for group in groups if not group.changes}
    lines = []
    for method in ("start", *(name for name in figures if name != "start"), "default"):
        paper, group = figures.get(method, {}), ours.get(method)
        measured = group.rows if group else []
        if method == "start" and ours:
            measured = next(iter(ours.values())).rows
        accuracy = "reference" if method == "start" else "immunized"
        lines.append(
            [
                "before immunization" if method == "start" else TITLES[method],
                f"{paper['rir']:g}" if "rir" in paper else "–",
                f"{paper['accuracy']:.2f}" if "accuracy" in paper else "–",
                _reference(group) if group else "",
                spread([row["utility"][accuracy] for row in measured], points) if measured else "",
            ]
        )
    return table(
        ["method", "RIR, the paper's", "benign %, the paper's", "RIR, noise-floored, here", "benign %, here"], lines
    )
