"""Names and numbers as text for people."""

from __future__ import annotations

import math
import re

from hf_immunize.text import printable


LABELS = {
    "adam": "Adam",
    "adamw": "AdamW",
    "batchnorm_adamw": "AdamW behind a BatchNorm",
    "bias_only": "fine-tuning of the biases",
    "conjugate_gradient": "conjugate gradient",
    "gd_line_search": "gradient descent with exact line search",
    "knn": "k nearest neighbours",
    "last_stage": "fine-tuning of the last stage",
    "lbfgs": "L-BFGS",
    "lda": "linear discriminant analysis",
    "logistic_regression": "scikit-learn's logistic regression",
    "mlp": "an MLP head",
    "momentum": "SGD with momentum",
    "restore_interpolation": "mixing the public weights back in",
    "restore_swap": "putting the public weights back",
    "ridge": "closed-form least squares (ridge)",
    "sgd": "SGD",
    "whitening": "least squares on whitened features",
    "whole_network": "fine-tuning of the whole network",
}


def clean(text: object, length: int = 80) -> str:
    r"""Text from outside as one short printable line.

    Args:
        text: Anything a user chose.
        length: Most characters.

    Returns:
        The text without control and formatting characters, shortened in the middle.

    Example:
        >>> clean("a\n b\x1b[31m")
        'a b[31m'
    """
    line = printable(text)
    return line if len(line) <= length else f"{line[: length // 2]} … {line[-(length - length // 2 - 3) :]}"


def label(attacker: str) -> str:
    """An attacker's name for people: without underscores, unless a better one is known.

    Example:
        >>> label("gd_line_search"), label("lora_r8"), label("head_first")
        ('gradient descent with exact line search', 'LoRA of rank 8', 'head first')
    """
    if rank := re.fullmatch(r"lora_r(\d{1,6})", attacker):
        return f"LoRA of rank {rank.group(1)}"
    return LABELS.get(attacker) or clean(attacker).replace("_", " ")


def percent(value: float | None) -> str:
    """An accuracy in per cent with one decimal; "–" for None.

    Example:
        >>> percent(0.4857)
        '48.6%'
    """
    return "–" if value is None or not math.isfinite(value) else f"{value:.1%}"


def points(value: float) -> str:
    """A difference of accuracies in points, without sign.

    Example:
        >>> points(-0.0123)
        '1.2 points'
    """
    return f"{abs(100 * value):.1f} points"


def signed(value: float | None) -> str:
    """A difference of accuracies in points, with its sign; "–" for None.

    Example:
        >>> signed(0.0123)
        '+1.2'
    """
    return "–" if value is None else f"{100 * value:+.1f}".replace("-", "−")


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
