"""Figures of an audit, each with words for those who do not see it."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import pandas
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hf_immunize.audit.names import CLASSES, SUBJECTS, clean, label, percent
from hf_immunize.audit.result import AuditResult


# Okabe and Ito's palette, separable by colour-blind readers; line and hatch separate them in grey.
COLOURS = {"immunized": "#D55E00", "reference": "#0072B2", "random": "#999999"}
LINES = {"immunized": "-", "reference": "--", "random": "-."}
HATCHES = {"immunized": "", "reference": "//", "random": "\\\\"}
# Characters of a name at an axis.
_LONGEST = 42


@dataclass(frozen=True)
class Picture:
    """A figure as ``data:`` URI for a section of the report, with its caption and the same in words and numbers."""

    section: str  # "headline", "curves" or "layers"
    caption: str
    alt: str
    uri: str


def draw_all(data: AuditResult, tables: Mapping[str, pandas.DataFrame]) -> list[Picture]:
    """All figures for which there are numbers, in the order of the report."""
    chance = data.tasks["harmful"].chance
    whose = {"immunized": "", "reference": "reference_", "random": "random_"}
    heads = _rows(tables["headline"].replace({"access": CLASSES}), "access", whose)
    layers = _rows(tables["layers"], "layer", {subject: f"{subject}_" for subject in SUBJECTS})
    caption = "Accuracy of the strongest attacker of each class, with intervals over seeds and test images."
    pictures = [_draw_bars("headline", caption, heads, chance, 0.85)] if heads else []
    pictures += draw_curves(tables["attacks"], tables["curves"], chance)
    caption = "The strongest probe at every layer, in the network's order, the classifier's input last."
    return pictures + ([_draw_bars("layers", caption, layers, chance, 0.6)] if layers else [])


# By name and subject: mean, and ends of its interval.
Bars = dict[str, dict[str, tuple[float, float, float]]]


def _rows(table: pandas.DataFrame, name: str, prefixes: Mapping[str, str]) -> Bars:
    rows: Bars = {}
    for row in table.to_dict("records"):
        for subject, prefix in prefixes.items():
            mean, low, high = (row[f"{prefix}{end}"] for end in ("accuracy", "low", "high"))
            if mean == mean:
                rows.setdefault(row[name], {})[subject] = (mean, low, high)
    return rows


def _draw_bars(section: str, caption: str, rows: Bars, chance: float, inches: float) -> Picture:
    """The best of attackers on each subject, as bars."""
    figure = Figure(figsize=(7.4, 0.9 + inches * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    drawn = [subject for subject in SUBJECTS if any(subject in by for by in rows.values())]
    height = 0.8 / len(drawn)
    styles: dict[str, dict[str, Any]] = {
        subject: {"facecolor": COLOURS[subject], "hatch": HATCHES[subject], "edgecolor": "white"} for subject in drawn
    }
    for index, by in enumerate(rows.values()):
        for s, (mean, low, high) in by.items():
            at = index + (drawn.index(s) - (len(drawn) - 1) / 2) * height
            axes.barh(at, 100 * mean, height * 0.92, **styles[s])
            if high > low:
                ends = [[100 * max(0.0, mean - low)], [100 * max(0.0, high - mean)]]  # of all equal rows, rounding
                axes.errorbar([100 * mean], [at], xerr=ends, color="black", capsize=2.5, linewidth=1)
            axes.annotate(percent(mean), (100 * high, at), (4, 0), textcoords="offset points", va="center", size=8)
    keys: list[Any] = [Patch(label=SUBJECTS[subject], **styles[subject]) for subject in drawn]
    axes.axvline(100 * chance, color="black", linestyle=":", linewidth=1)
    keys.append(Line2D([], [], color="black", linestyle=":", linewidth=1, label="chance"))
    axes.set_yticks(range(len(rows)), [_plain(clean(name, _LONGEST)) for name in rows], size=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("test accuracy on the harmful task, %")
    axes.set_xlim(0, min(112.0, max(1.0, 1.15 * axes.get_xlim()[1])))
    figure.legend(handles=keys, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    told = [", ".join(f"{SUBJECTS[s]} {percent(mean)}" for s, (mean, *_) in by.items()) for by in rows.values()]
    alt = [f"{clean(name)}: {words}" for name, words in zip(rows, told, strict=True)]
    return _picture(figure, section, caption, "; ".join(alt))


def draw_curves(attacks: pandas.DataFrame, curves: pandas.DataFrame, chance: float) -> list[Picture]:
    """Harmful accuracy against steps for each attacker that takes steps, where it reads most from the model."""
    own = attacks[(attacks["subject"] == "immunized") & (attacks["task"] == "harmful")]
    own = own[(own["access"] != "any_layer") & (own["last_step"] > 0)]
    keys = ["attacker", "access", "task", "layer"]
    shown = own.loc[own.groupby("attacker", sort=False)["accuracy"].idxmax(), keys]
    return [_draw_curve(curves[(curves[keys] == row).all(axis=1)], chance) for _, row in shown.iterrows()]


def _draw_curve(rows: pandas.DataFrame, chance: float) -> Picture:
    figure = Figure(figsize=(4.2, 2.9))
    # Labels fit these margins: to find them out takes longer than to draw.
    axes = figure.add_axes((0.15, 0.16, 0.82, 0.81))
    ends = []
    for subject in SUBJECTS:
        own = rows[rows["subject"] == subject].sort_values("step")
        if own.empty:
            continue
        style: dict[str, Any] = {"color": COLOURS[subject], "linestyle": LINES[subject], "linewidth": 1.6}
        style |= {"label": SUBJECTS[subject], "marker": "." if len(own) < 12 else ""}
        axes.plot(own["step"], 100 * own["accuracy"], **style)
        axes.fill_between(own["step"], 100 * own["low"], 100 * own["high"], color=COLOURS[subject], alpha=0.18, lw=0)
        ends.append(f"{SUBJECTS[subject]} {own['accuracy'].iloc[-1]:.1%} after {own['step'].iloc[-1]:,} steps")
    axes.axhline(100 * chance, color="black", linestyle=":", linewidth=1, label="chance")
    axes.set_xscale("symlog" if (rows["step"] == 0).any() else "log")
    axes.set_ylim(bottom=0)
    axes.minorticks_off()
    axes.set_xlabel("steps")
    axes.set_ylabel("harmful test accuracy, %")
    axes.grid(True, alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    name = label(rows["attacker"].iloc[0])
    name = name[:1].upper() + name[1:]
    where = ", at the classifier's input" if rows["access"].iloc[0] == "head_input" else ""
    return _picture(figure, "curves", f"{name}{where}.", f"{name}: {', '.join(ends)}; chance {percent(chance)}")


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def _picture(figure: Figure, section: str, caption: str, alt: str) -> Picture:
    buffer = io.BytesIO()
    # Letters as outlines look the same wherever the file is opened; letters the font lacks are boxes, without a word.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "hf_immunize"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    uri = f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(section, caption, alt, uri)
