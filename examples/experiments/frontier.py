"""The frontier of an experiment: benign accuracy against what the strongest linear probe reads, and against RIR."""

import statistics
from pathlib import Path

from examples.experiments.methods import BASELINES, METHODS, TITLES
from examples.experiments.rows import Group, benign_change, bound_sign, log10_rir, probe
from hf_immunize.training.spectrum_figure import new_figure, save_figure


# Okabe and Ito's palette and a brown, which colour-blind readers distinguish too; a method's two recipes share one.
COLOURS = {"default": "#000000", "concentration": "#E69F00", "kappa": "#D55E00", "r_ill": "#0072B2"}
COLOURS |= {"opt_kappa": "#009E73", "imma": "#CC79A7", "inner_ridge": "#56B4E9", "class_collapse": "#8C564B"}
COLOURS |= {"dead_relu": "#F0E442"}


def draw_frontier(groups: list[Group], path: Path) -> None:
    """One point a row; filled: our recipe, open: the paper's; large: the default; triangles: a bound."""
    figure, (left, right) = new_figure(2)
    for method in METHODS:
        own = [group for group in groups if group.method == method]
        colour, ours = COLOURS[method.removesuffix("_ours")], method not in BASELINES
        for index, group in enumerate(own):
            for row in group.rows:
                style = {
                    "color": colour,
                    "markerfacecolor": colour if ours else "none",
                    "linestyle": "none",
                    "markersize": 9 if method == "default" and not group.changes else 6,
                    "label": TITLES[method] if index == 0 and row is group.rows[0] else None,
                }
                change = 100 * benign_change(row)
                if (read := probe(row)) is not None:
                    left.plot(change, 100 * read, marker="o", **style)
                if (log := log10_rir(row)) is not None:
                    right.plot(change, log, marker="^" if bound_sign([row]) else "o", **style)
    tasks = [row["probes"]["harmful"] for group in groups for row in group.rows]
    left.axhline(100 * statistics.fmean(task["chance"] for task in tasks), color="grey", linestyle=":", label="chance")
    before = [value for group in groups for value in group.values(lambda row: probe(row, moment="before"))]
    if before:
        left.axhline(100 * statistics.fmean(before), color="grey", linestyle="--", label="before immunization")
    left.set_ylabel("harmful accuracy of the strongest linear probe\nat the classifier's input, % (less is better)")
    right.set_ylabel("log10 of the exact RIR (more is better;\ntriangles: a bound)")
    for axes in (left, right):
        axes.set_xlabel("change of benign accuracy, points")
        axes.axvline(0, color="grey", linewidth=0.5)
        axes.grid(True, alpha=0.3)
    left.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
