"""Figures of spectra and of probing, before and after."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from hf_immunize.files import staged_directory


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Blue for benign, vermilion for harmful (Okabe and Ito's palette, told apart by colour-blind readers too).
COLOURS = {"benign": "#0072B2", "harmful": "#D55E00"}
STYLES = {"before": "--", "after": "-"}


def new_figure(panels: int, columns: int | None = None) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, drawn without a display.

    Args:
        panels: How many.
        columns: How many to a row; by default all.

    Returns:
        The figure and its axes, left to right, row by row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns or panels, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(5.2 * columns, 4.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]
    return figure, axes


def draw_spectra(axes: Axes, spectra: Mapping[tuple[str, str], Tensor]) -> None:
    """Singular values of the features relative to the largest, on a logarithmic scale.

    Args:
        axes: Where to draw.
        spectra: (side, moment), with side "benign" or "harmful" and moment "before" or "after", to the singular
            values of Z, descending.
    """
    for (side, moment), sigma in spectra.items():
        relative = (sigma / sigma[0]).clamp_min(1e-16).cpu().numpy()
        index = np.arange(1, len(relative) + 1)
        axes.semilogy(index, relative, STYLES[moment], color=COLOURS[side], label=f"{side}, {moment}")
    axes.set_xlabel("index i of singular value")
    axes.set_ylabel("σ_i(Z) / σ_1(Z)")
    axes.set_title("Spectra of the features")
    axes.grid(True, alpha=0.3)
    axes.legend(frameon=False)


def draw_curves(
    axes: Axes, curves: Mapping[tuple[str, str], Tensor], *, title: str, ylabel: str, log: bool = False
) -> None:
    """Curves over the steps of gradient descent, both axes' meaning written at them.

    Args:
        axes: Where to draw.
        curves: (side, moment) to values for steps 1, 2, ….
        title: Title of the panel.
        ylabel: Name of the values.
        log: Whether the values' axis is logarithmic.
    """
    for (side, moment), values in curves.items():
        steps = np.arange(1, len(values) + 1)
        axes.plot(steps, values.cpu().numpy(), STYLES[moment], color=COLOURS[side], label=f"{side}, {moment}")
    axes.set_xscale("log")
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("steps of gradient descent (exact line search)")
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(True, alpha=0.3)
    axes.legend(frameon=False)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG.

    Args:
        figure: The figure.
        path: File to write.
    """
    path = Path(path)
    with staged_directory(path.parent) as staging:
        figure.savefig(staging / path.name, dpi=130)
