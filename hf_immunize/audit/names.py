"""Names, numbers and prose of an audit, as text for people."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from hf_immunize.attacks.presets import ATTACKERS
from hf_immunize.intervals import removal
from hf_immunize.text import printable


if TYPE_CHECKING:
    from jinja2 import Environment

CLASSES = {
    "head_input": "Probes at the classifier's input",
    "any_layer": "Probes at any layer",
    "fine_tuning": "Fine-tuning",
}
SUBJECTS = {"immunized": "after immunization", "reference": "before immunization", "random": "without its weights"}
QUESTION = "Can the harmful task still be learnt?"


def clean(text: object, length: int = 80) -> str:
    r"""Text from outside as one printable line, shortened in the middle.

    Example:
        >>> clean("a\n b\x1b[31m")
        'a b[31m'
    """
    line = printable(text)
    return line if len(line) <= length else f"{line[: length // 2]} … {line[-(length - length // 2 - 3) :]}"


def label(attacker: str) -> str:
    """An attacker's name for people; of one that is unknown, its own without underscores.

    Example:
        >>> label("gd_line_search"), label("lora_r8"), label("head_first")
        ('gradient descent with exact line search', 'LoRA of rank 8', 'head first')
    """
    known = ATTACKERS.get(attacker)
    return known.label if known else clean(attacker).replace("_", " ")


def source(layer: str) -> str:
    """What an attacker without the released weights learnt from: raw pixels, or a copy with random weights."""
    return "raw pixels" if layer.startswith("pixels") else "random weights"


def percent(value: float | None) -> str:
    """An accuracy with one decimal, such as "48.6%"; "–" for None."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.1%}"


def points(value: float) -> str:
    """A difference of accuracies without sign, such as "1.2 points"."""
    return f"{abs(100 * value):.1f} points"


def signed(value: float | None) -> str:
    """A difference of accuracies in points with its sign, such as "+1.2"; "–" for None."""
    return "–" if value is None else f"{100 * value:+.1f}".replace("-", "−")


def share(value: float | None) -> str:
    """A share that may be below zero, such as "−12%"; "–" for None."""
    return "–" if value is None else f"{round(value, 2) + 0.0:.0%}".replace("-", "−")


def removed(value: float) -> str:
    """A share that is removed, for a table.

    Example:
        >>> removed(0.98), removed(-0.26)
        ('98%', 'none (−26%)')
    """
    return f"none ({share(value)})" if share(value).startswith("−") else share(value)


def ratio(value: float) -> str:
    """A ratio with two digits that count, large ones as powers of ten.

    Example:
        >>> ratio(1.234), ratio(31234.0), ratio(3e9)
        ('1.2', '31,000', '3.0e9')
    """
    if not math.isfinite(value):
        return "infinite" if value > 0 else "undetermined"
    if 10 <= value < 1e6:
        return f"{float(f'{value:.2g}'):,.0f}"
    return f"{value:.1f}" if value < 10 else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def spread(low: float | None, high: float | None, show: Callable[[float], str] = percent) -> str:
    """An interval, such as "48.1% to 50.2%"; "–" for None, and for one that shows no width.

    Example:
        >>> spread(0.481, 0.502), spread(1.0, 1.01, ratio), spread(75.0, math.inf, ratio)
        ('48.1% to 50.2%', '–', 'at least 75')
    """
    if low is None or high is None or math.isnan(low) or show(low) == show(high):
        return "–"
    return f"at least {show(low)}" if high == math.inf else f"{show(low)} to {show(high)}"


def render(template: str, **values: Any) -> str:
    """A template of this room with its values; HTML escapes them."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("hf_immunize.audit"),
        autoescape=lambda name: bool(name) and ".html" in str(name),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clean": clean, "label": label, "percent": percent, "points": points, "signed": signed}
    environment.filters |= {"ratio": ratio, "range": spread, "share": share, "source": source}
    environment.filters |= {"removal": removal, "removed": removed}
    environment.globals |= {"ratio": ratio, "signed": signed, "share": share}
    environment.globals |= {"classes": CLASSES, "subjects": SUBJECTS, "question": QUESTION, "zip": zip}
    environment.filters |= {"percent0": "{:.0%}".format, "points0": lambda value: f"{100 * value:.0f} points"}
    return environment
