"""Curves of a Trainer's log history over the steps: losses and terms, κ, accuracy, RIR."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from hf_immunize.training.figures import COLOURS
from hf_immunize.training.history import History, by_step


if TYPE_CHECKING:
    from matplotlib.axes import Axes


_KAPPA = re.compile(r"(?P<source>.+)_(?P<side>benign|harmful)_log10_kappa")
_RIR = re.compile(r".+_log10_rir")
# Of a training log, what is neither a loss nor a term.
_NO_TERM = re.compile(
    r"step|epoch|learning_rate|grad_norm|num_input_tokens_seen|total_flos|train_.*|.*_weight|.*runtime"
)
_DASHES = ("-", "--", ":", "-.")


def history_panels(history: History) -> list[Callable[[Axes], None]]:
    """What there is to draw of a log history: one function for each panel, none for what was not logged.

    Args:
        history: ``trainer.state.log_history``.

    Returns:
        Functions that each draw into the axes they are given.

    Example:
        >>> history = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}, {"step": 2, "eval_accuracy": 0.9}]
        >>> len(history_panels(history))
        2
    """
    panels: list[Callable[[Axes], None]] = []
    terms = _terms(history)
    kappas = _of_the_whole_set(_curves(history, _KAPPA))
    accuracies = _curves(history, r"eval_.*accuracy", alias=r"eval_(.*_)?benign_accuracy")
    rirs = _of_the_whole_set(_curves(history, _RIR))
    if terms:
        panels.append(lambda axes: _draw_terms(axes, terms))
    if kappas:
        panels.append(lambda axes: _draw_kappas(axes, history, kappas))
    if accuracies:
        panels.append(lambda axes: _draw_accuracies(axes, accuracies))
    if rirs:
        panels.append(lambda axes: _draw_rir(axes, history, rirs))
    return panels


def _names(history: History) -> list[str]:
    return list(dict.fromkeys(key for entry in history for key in entry))


def _finite(values: dict[int, float]) -> dict[int, float]:
    return {step: value for step, value in sorted(values.items()) if math.isfinite(value)}


def _curves(history: History, pattern: str | re.Pattern[str], alias: str = "(?!)") -> dict[str, dict[int, float]]:
    """Curves of names that match; those of another name for the same values only where there is no other."""
    names = [name for name in _names(history) if re.fullmatch(pattern, name)]
    names = [name for name in names if not re.fullmatch(alias, name)] or names
    curves = {name: _finite(by_step(history, name)) for name in names}
    return {name: curve for name, curve in curves.items() if curve}


def _terms(history: History) -> dict[str, dict[int, float]]:
    logs = [entry for entry in history if "loss" in entry]
    numbers = {k for entry in logs for k, value in entry.items() if isinstance(value, (int, float))}
    names = [name for name in _names(logs) if name in numbers and not _NO_TERM.fullmatch(name)]
    curves = {name: _finite(by_step(logs, name)) for name in names}
    curves |= _curves(history, r"eval_(.+_)?loss", alias=r"eval_(.*_)?benign_loss")
    return {name: curve for name, curve in curves.items() if curve}


def _of_the_whole_set(curves: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    # Beside those of the whole evaluation set, those that a callback measured on a sample say nothing more.
    return {name: curve for name, curve in curves.items() if name.startswith("eval_")} or curves


def _draw_terms(axes: Axes, curves: dict[str, dict[int, float]]) -> None:
    for index, (name, curve) in enumerate(curves.items()):
        dash = _DASHES[index // 10 % len(_DASHES)]
        axes.plot(list(curve), list(curve.values()), dash, marker=".", label=name)
    values = [value for curve in curves.values() for value in curve.values()]
    if min(values) > 0:
        axes.set_yscale("log")
    else:
        smallest = min((abs(value) for value in values if value), default=1.0)
        axes.set_yscale("symlog", linthresh=max(smallest, 1e-6))
    _finish(axes, "Losses and terms", "value in the log")


def _draw_kappas(axes: Axes, history: History, curves: dict[str, dict[int, float]]) -> None:
    seen: dict[str, int] = {}
    kinds: set[str] = set()
    for name, curve in curves.items():
        match = _KAPPA.fullmatch(name)
        assert match is not None  # chosen by this
        side = match["side"]
        dash = _DASHES[seen.get(side, 0) % len(_DASHES)]
        seen[side] = seen.get(side, 0) + 1
        axes.plot(list(curve), list(curve.values()), dash, color=COLOURS[side], label=name)
        bound = by_step(history, name.removesuffix("log10_kappa") + "is_bound")
        kinds |= _mark(axes, curve, COLOURS[side], lower=bound)
    _explain(axes, kinds)
    _finish(axes, "Condition numbers of linear probing", "log10 κ(ZᵀZ)")


def _draw_accuracies(axes: Axes, curves: dict[str, dict[int, float]]) -> None:
    for index, (name, curve) in enumerate(curves.items()):
        dash = _DASHES[index % len(_DASHES)]
        axes.plot(list(curve), list(curve.values()), dash, marker="o", color=COLOURS["benign"], label=name)
    _finish(axes, "Accuracy", "as logged")


def _draw_rir(axes: Axes, history: History, curves: dict[str, dict[int, float]]) -> None:
    kinds: set[str] = set()
    for index, (name, curve) in enumerate(curves.items()):
        axes.plot(list(curve), list(curve.values()), _DASHES[index % len(_DASHES)], color="black", label=name)
        lower, upper = (
            by_step(history, name.removesuffix("log10_rir") + f"rir_is_{kind}_bound") for kind in ("lower", "upper")
        )
        kinds |= _mark(axes, curve, "black", lower, upper)
    _explain(axes, kinds)
    _finish(axes, "RIR (of linear probing; no attack was run)", "log10 RIR")


def _mark(
    axes: Axes, curve: dict[int, float], colour: str, lower: dict[int, float], upper: dict[int, float] | None = None
) -> set[str]:
    """Mark each value as exact or as a bound, with an arrow to where the true one lies; the kinds there were."""
    kinds = set()
    for step, value in curve.items():
        kind = "^" if lower.get(step) else "v" if (upper or {}).get(step) else "o"
        kinds.add(kind)
        axes.plot([step], [value], kind, color=colour, fillstyle="full" if kind == "o" else "none")
    return kinds


def _explain(axes: Axes, kinds: set[str]) -> None:
    for kind, words in (("^", "lower bound"), ("v", "upper bound")):
        if kind in kinds:
            axes.plot([], [], kind, color="black", fillstyle="none", label=words)


def _finish(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(True, alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
