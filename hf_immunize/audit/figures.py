"""Figures of an audit, each with words for those who do not see it."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_immunize.audit.names import clean, label, percent
from hf_immunize.audit.report import CLASSES
from hf_immunize.audit.result import AuditResult, FeatureSpectrum, Outcome
from hf_immunize.audit.statistics import (
    ACCESSES,
    SUBJECTS,
    Summary,
    accuracy_interval,
    matched,
    of_class,
    strongest,
    summarize,
)


if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers; line and hatch tell them apart in grey.
COLOURS = {"immunized": "#D55E00", "reference": "#0072B2", "random": "#777777"}
LINES = {"immunized": "-", "reference": "--", "random": ":"}
HATCHES = {"immunized": "", "reference": "//", "random": ".."}
# Characters of a name at an axis.
_LONGEST = 34


@dataclass(frozen=True)
class Picture:
    """A figure for a report.

    Attributes:
        section: Part of the report it belongs to: "headline", "curves", "layers", "fine_tuning" or "spectra".
        caption: What it shows.
        alt: The same in words and numbers, for those who do not see it.
        uri: The figure as ``data:`` URI.
        width, height: Its size in CSS pixels.
    """

    section: str
    caption: str
    alt: str
    uri: str
    width: int
    height: int


def draw_all(data: AuditResult, layers: pandas.DataFrame, fine_tuning: pandas.DataFrame) -> list[Picture]:
    """All figures for which there are numbers.

    Args:
        data: What the audit found.
        layers: Table of layers, of `AuditReport.tables`.
        fine_tuning: Table of operators and budgets, of `AuditReport.tables`.

    Returns:
        The figures, in the order of the report.
    """
    summaries = summarize(data)
    chance = data.tasks["harmful"].chance
    pictures = [draw_headline(summaries, chance), *draw_curves(data, summaries), draw_layers(layers, chance)]
    pictures += [draw_operators(fine_tuning), *(draw_spectra(data.spectra, task) for task in ("harmful", "benign"))]
    return [one for one in pictures if one is not None]


def draw_headline(summaries: Sequence[Summary], chance: float) -> Picture | None:
    """Worst case of each class of attackers, as bars.

    Args:
        summaries: Outcomes over seeds.
        chance: Accuracy of always naming the most frequent class.

    Returns:
        The figure, or None without numbers.
    """
    rows: dict[str, dict[str, Summary]] = {}
    for access in ACCESSES:
        own = of_class(summaries, "immunized", "harmful", access)
        for subject in SUBJECTS:
            best = strongest(matched(of_class(summaries, subject, "harmful", access), own))
            if best is not None:
                rows.setdefault(access, {})[subject] = best
    if not rows:
        return None
    figure, axes = _new(0.9 + 0.85 * len(rows))
    values = {
        CLASSES[access]: {subject: (one.mean or 0.0, one.ends) for subject, one in by.items()}
        for access, by in rows.items()
    }
    _bars(axes, values, chance)
    alt = "; ".join(
        f"{CLASSES[access]}: " + ", ".join(f"{subject} {percent(one.mean)}" for subject, one in by.items())
        for access, by in rows.items()
    )
    caption = "Worst case by class of attackers, with intervals over seeds and test images."
    return _picture(figure, "headline", caption, alt)


def draw_layers(layers: pandas.DataFrame, chance: float) -> Picture | None:
    """Best probe at every layer, as bars.

    Args:
        layers: Table of layers.
        chance: Accuracy of always naming the most frequent class.

    Returns:
        The figure, or None without numbers.
    """
    values: dict[str, dict[str, tuple[float, tuple[float, float] | None]]] = {}
    for row in layers.to_dict("records"):
        for subject in SUBJECTS:
            mean, low, high = (row[f"{subject}_{name}"] for name in ("accuracy", "low", "high"))
            if mean == mean:
                by = values.setdefault(clean(row["layer"], _LONGEST), {})
                by[subject] = (mean, (low, high) if low == low else None)
    if not values:
        return None
    figure, axes = _new(0.9 + 0.6 * len(values))
    _bars(axes, values, chance)
    alt = "; ".join(f"{k}: " + ", ".join(f"{s} {percent(v[0])}" for s, v in by.items()) for k, by in values.items())
    return _picture(figure, "layers", "Best probe at every layer, in the network's order, the head's input last.", alt)


def _bars(axes: Axes, rows: dict[str, dict[str, tuple[float, tuple[float, float] | None]]], chance: float) -> None:
    drawn = [subject for subject in SUBJECTS if any(subject in by for by in rows.values())]
    height = 0.8 / len(drawn)
    for index, by in enumerate(rows.values()):
        for place, subject in enumerate(drawn):
            if subject not in by:
                continue
            mean, interval = by[subject]
            at = index + (place - (len(drawn) - 1) / 2) * height
            style: dict[str, Any] = {"color": COLOURS[subject], "hatch": HATCHES[subject], "edgecolor": "white"}
            axes.barh(at, 100 * mean, height * 0.92, **style)
            top = mean
            if interval is not None:
                ends = [[100 * (mean - interval[0])], [100 * (interval[1] - mean)]]
                axes.errorbar([100 * mean], [at], xerr=ends, color="black", capsize=2.5, linewidth=1)
                top = interval[1]
            axes.annotate(percent(mean), (100 * top, at), (4, 0), textcoords="offset points", va="center", size=8)
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    keys: list[Any] = [Patch(facecolor=COLOURS[s], hatch=HATCHES[s], edgecolor="white", label=s) for s in drawn]
    axes.axvline(100 * chance, color="black", linestyle=":", linewidth=1)
    keys.append(Line2D([], [], color="black", linestyle=":", linewidth=1, label="chance"))
    axes.set_yticks(range(len(rows)), [_plain(name) for name in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("test accuracy on the harmful task, %")
    axes.set_xlim(0, min(112.0, max(1.0, 1.15 * axes.get_xlim()[1])))
    axes.figure.legend(handles=keys, loc="outside upper center", ncols=4, frameon=False, fontsize=8)


def draw_curves(data: AuditResult, summaries: Sequence[Summary], task: str = "harmful") -> list[Picture]:
    """Accuracy against steps, a figure for each attacker that takes steps.

    An attacker of several precisions and layers is shown where it reads most from the immunized model.

    Args:
        data: What the audit found.
        summaries: Its outcomes over seeds.
        task: As in `Outcome`.

    Returns:
        Figures in the order of the audit.
    """
    shown: dict[str, Summary] = {}
    for one in summaries:
        if (one.subject, one.task) == ("immunized", task) and one.access != "any_layer" and one.budget:
            best = shown.get(one.attacker)
            if best is None or (one.mean or 0.0) > (best.mean or 0.0):
                shown[one.attacker] = one
    pictures = []
    for one in shown.values():
        key = (one.attacker, one.access, task, one.layer, one.precision)
        runs = [r for r in data.outcomes if (r.attacker, r.access, r.task, r.layer, r.precision) == key and r.curve]
        by = {subject: [run for run in runs if run.subject == subject] for subject in SUBJECTS}
        drawn = {k: v for k, v in by.items() if v}
        pictures.append(_draw_curve(one, drawn, data.tasks[task].chance, data.tested_images(runs[0])))
    return pictures


def _draw_curve(one: Summary, runs: dict[str, list[Outcome]], chance: float, images: int) -> Picture:
    figure, axes = _small()
    ends = []
    for subject, outcomes in runs.items():
        at_step: dict[int, list[float]] = {}
        for outcome in outcomes:
            for step, value in zip(outcome.steps, outcome.curve, strict=True):
                at_step.setdefault(step, []).append(value)
        steps = sorted(at_step)
        found = [accuracy_interval(at_step[step], images) for step in steps]
        means = [100 * mean for mean, _ in found]
        low, high = ([100 * interval[end] for _, interval in found] for end in (0, 1))
        style: dict[str, Any] = {"color": COLOURS[subject], "linestyle": LINES[subject], "linewidth": 1.6}
        axes.plot(steps, means, label=subject, marker="." if len(steps) < 12 else "", **style)
        axes.fill_between(steps, low, high, color=COLOURS[subject], alpha=0.18, linewidth=0)
        ends.append(f"{subject} {means[-1]:.1f}% after {steps[-1]:,} steps")
    axes.axhline(100 * chance, color="black", linestyle=":", linewidth=1, label="chance")
    untrained = any(run.steps[0] == 0 for group in runs.values() for run in group)
    axes.set_xscale("symlog" if untrained else "log")
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("steps")
    axes.set_ylabel("harmful test accuracy, %")
    axes.grid(True, alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    name = f"{label(one.attacker)[:1].upper()}{label(one.attacker)[1:]}"
    where = ", at the classifier's input" if one.access == "head_input" else ""
    caption = f"{name}{where}: accuracy against steps, mean and interval over seeds and test images."
    return _picture(figure, "curves", caption, f"{name}: {', '.join(ends)}; chance {percent(chance)}")


def draw_operators(table: pandas.DataFrame) -> Picture | None:
    """Fine-tuning: operators against budgets, as a heat table, the immunized model beside the reference.

    Args:
        table: Table of operators and budgets.

    Returns:
        The figure, or None without numbers.
    """
    if table.empty:
        return None
    subjects = [subject for subject in SUBJECTS if table[f"{subject}_accuracy"].notna().any()]
    operators = list(dict.fromkeys(table["operator"]))
    budgets = sorted(set(table["budget_steps"]))
    figure, panels = _new(1.1 + 0.38 * len(operators), panels=len(subjects))
    top = 100 * max(table[f"{subject}_accuracy"].max() for subject in subjects)
    for axes, subject in zip(panels, subjects, strict=True):
        wide = table.pivot(index="operator", columns="budget_steps", values=f"{subject}_accuracy")
        grid = 100 * wide.reindex(index=operators, columns=budgets).to_numpy(float)
        axes.pcolormesh(grid, cmap="cividis", vmin=0, vmax=max(top, 1.0), edgecolors="white", linewidth=1)
        axes.invert_yaxis()
        for row, line in enumerate(grid):
            for column, value in enumerate(line):
                colour = "black" if value > 0.55 * top else "white"
                text, colour = (f"{value:.0f}", colour) if value == value else ("–", "black")
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, size=8)
        axes.set_xticks(
            [index + 0.5 for index in range(len(budgets))], [f"{budget:,}" for budget in budgets], fontsize=7
        )
        names = [_plain(clean(label(name), _LONGEST)) for name in operators]
        axes.set_yticks([index + 0.5 for index in range(len(operators))], names)
        axes.tick_params(length=0)
        axes.set_title(subject, fontsize=9)
        axes.set_xlabel("steps, at most")
        if axes is not panels[0]:
            axes.set_yticklabels([])
    worst = table.loc[table["immunized_accuracy"].idxmax()] if table["immunized_accuracy"].notna().any() else None
    alt = "Numbers are in the table of fine-tuning." + (
        f" Best on the immunized model: {label(worst['operator'])}, {percent(worst['immunized_accuracy'])}."
        if worst is not None
        else ""
    )
    return _picture(figure, "fine_tuning", "Fine-tuning: best harmful accuracy in %, by operator and budget.", alt)


def draw_spectra(spectra: Sequence[FeatureSpectrum], task: str) -> Picture | None:
    """Singular values of a task's features before and after immunization, relative to the largest.

    Args:
        spectra: Of the audit.
        task: "harmful" or "benign".

    Returns:
        The figure, or None without spectra of the task.
    """
    found = [one for one in spectra if one.task == task and one.singular_values and one.singular_values[0] > 0]
    if not found:
        return None
    figure, axes = _small()
    words = []
    for one in sorted(found, key=lambda one: one.subject):
        sigma = [max(value / one.singular_values[0], 1e-16) for value in one.singular_values]
        said = f"{one.subject}: log10 κ {'≥ ' if one.is_bound else ''}{one.log10_kappa:.2f}, rank {one.rank:,}"
        colour, line = COLOURS.get(one.subject, "black"), LINES.get(one.subject, "-")
        axes.semilogy(range(1, len(sigma) + 1), sigma, color=colour, linestyle=line, label=said)
        words.append(said)
    axes.minorticks_off()
    axes.set_xlabel("index i of singular value")
    axes.set_ylabel("σ_i(Z) / σ_1(Z)")
    axes.grid(True, alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return _picture(figure, "spectra", f"Spectrum of the {task} features.", "; ".join(words))


def _new(height: float, panels: int = 0) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    FigureCanvasSVG(figure)
    if not panels:
        return figure, figure.add_subplot()
    return figure, [figure.add_subplot(1, panels, index + 1) for index in range(panels)]


def _small() -> tuple[Figure, Axes]:
    """A figure whose labels fit known margins: to find them out takes longer than to draw."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.9))
    FigureCanvasSVG(figure)
    return figure, figure.add_axes((0.15, 0.16, 0.82, 0.81))


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def _picture(figure: Figure, section: str, caption: str, alt: str) -> Picture:
    import matplotlib

    buffer = io.BytesIO()
    # Letters as outlines look the same wherever the file is opened; letters the font lacks are boxes, without a word.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "hf_immunize"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    width, height = (round(96 * side) for side in figure.get_size_inches())
    uri = f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(section, caption, alt, uri, width, height)
