"""The tables of the page."""

import statistics
from typing import Any

from examples.audit_page import table
from examples.experiments.methods import TITLES
from examples.experiments.rows import (
    Group,
    benign_change,
    points,
    pooled_difference,
    probe,
    probe_change,
    rir_text,
    spread,
)
from examples.experiments.sentences import stopped
from hf_immunize.audit.names import percent, signed


def overview(groups: list[Group]) -> str:
    """A line for every experiment whose default was run, as Markdown; without one, a sentence that says so."""
    heads = ["experiment", "seeds", "benign change, points (95 %)", "log10 RIR, exact"]
    heads += ["strongest linear probe at the classifier's input, %", "chance, %", "at the best layer, %"]
    lines = [
        [
            group.rows[0]["title"],
            group.named_seeds,
            _pooled(group),
            rir_text(group),
            probe_change(group),
            points(_chance(group, "harmful")),
            probe_change(group, kind="any_layer"),
        ]
        for group in groups
        if group.method == "default" and not group.changes
    ]
    return "\n".join(table(heads, lines)).strip() if lines else "The default was not run in any experiment."


def summary(groups: list[Group], wanted: dict[str, Any]) -> list[str]:
    """What every method reaches with the experiment's own length of training."""
    heads = ["method", "seeds", "benign accuracy, %", "change, points (95 %)", "log10 RIR, exact", "(i)", "(ii)"]
    heads += ["RIR, noise-floored", "harmful probe, %", "", "any layer, %", "unseen classes, %", "unrelated task, %"]
    heads += ["minutes"]
    lines = []
    for group in groups:
        before, after = (
            spread([row["utility"][side] for row in group.rows], points) for side in ("reference", "immunized")
        )
        parts = (
            spread([row["ratios"]["exact"][name] for row in group.rows], lambda value: f"{value:.3g}")
            for name in ("harmful_ratio", "benign_ratio")
        )
        lines.append(
            [
                group.title,
                group.named_seeds,
                f"{before} → {after}",
                _pooled(group),
                rir_text(group),
                *parts,
                _reference(group),
                probe_change(group),
                stopped(group, wanted),
                probe_change(group, kind="any_layer"),
                probe_change(group, "unseen"),
                probe_change(group, "unrelated"),
                f"{statistics.fmean(sum(row['seconds'].values()) / 60 for row in group.rows):.0f}",
            ]
        )
    return table(heads, lines)


def classes(groups: list[Group]) -> list[str]:
    """The strongest attacker by what it has, all attackers counted; each row's own worst, averaged over seeds."""
    names = {"head_input": "the classifier's input", "any_layer": "any layer", "fine_tuning": "all weights"}
    tasks = {"harmful": "used classes", "unseen": "unseen classes", "unrelated": "unrelated task"}
    lines = []
    for group in groups:
        for task, access in ((task, access) for task in tasks for access in names):
            tried = [row["probes"].get(task, {}).get("by_class", {}).get(access) for row in group.rows]
            found = [one for one in tried if one]
            if not found:
                continue
            worst = max(found, key=lambda one: one["after"]["accuracy"])["after"]
            accuracies = ([one[moment]["accuracy"] for one in found] for moment in ("before", "after"))
            lines.append(
                [
                    group.title,
                    tasks[task],
                    names[access],
                    *(spread(values, points) for values in accuracies),
                    worst["attacker"] + (f" at {worst['layer']}" if access == "any_layer" else ""),
                    percent(_chance(group, task)),
                ]
            )
    return table(["method", "task", "attacker has", "before, %", "after, %", "strongest", "chance"], lines)


def frontier(groups: list[Group], wanted: dict[str, Any]) -> list[str]:
    """Every method and setting, the least benign accuracy lost first."""
    heads = ["setting", "seeds", "change of benign accuracy, points", "harmful probe, %", "", "log10 RIR, exact"]
    lines = [
        [
            group.title,
            group.named_seeds,
            spread(group.values(benign_change), signed),
            spread(group.values(probe), points),
            stopped(group, wanted),
            rir_text(group),
        ]
        for group in sorted(groups, key=lambda group: -statistics.fmean(group.values(benign_change)))
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
        side = "reference" if method == "start" else "immunized"
        lines.append(
            [
                "before immunization" if method == "start" else TITLES[method],
                f"{paper['rir']:g}" if "rir" in paper else "–",
                f"{paper['accuracy']:.2f}" if "accuracy" in paper else "–",
                _reference(group) if group else "",
                spread([row["utility"][side] for row in measured], points) if measured else "",
            ]
        )
    heads = ["method", "RIR, the paper's", "benign %, the paper's", "RIR, noise-floored, here", "benign %, here"]
    return table(heads, lines)


def _pooled(group: Group) -> str:
    mean, (low, high), _ = pooled_difference(group.rows)
    return f"{signed(mean)} ({signed(low)} to {signed(high)})"


def _chance(group: Group, task: str) -> float:
    return statistics.fmean(row["probes"][task]["chance"] for row in group.rows)


def _reference(group: Group) -> str:
    values = group.values(lambda row: (row["ratios"].get("reference") or {}).get("rir"))
    return spread(values, lambda value: f"{value:.3g}")
