"""A figure of spectra and of the log's curves at every evaluation, for any `transformers.Trainer`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from hf_immunize.data.columns import find_columns
from hf_immunize.data.images import ImageRows
from hf_immunize.data.sources import choose
from hf_immunize.errors import ArgumentError, CheckpointError, NonFiniteError, RankError
from hf_immunize.features.cache import seeded
from hf_immunize.features.extract import Measurement, extract, load_measurements, save_measurements, spectral_metrics
from hf_immunize.files import staged_directory
from hf_immunize.training.checkpoints import History, by_step
from hf_immunize.training.distributed import sharded_weights


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


logger = logging.get_logger(__name__)


# ---- drawing ----

# Blue for benign, vermilion for harmful (Okabe and Ito's palette, separable for colour-blind readers too).
COLOURS = {"benign": "#0072B2", "harmful": "#D55E00"}
STYLES = {"before": "--", "after": "-"}
_DASHES = ("-", "--", ":", "-.")


def new_figure(panels: int, columns: int | None = None) -> tuple[Figure, list[Axes]]:
    """A figure with panels row by row, by default in one row, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns or panels, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(5.2 * columns, 4.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]


def draw_spectra(axes: Axes, spectra: Mapping[tuple[str, str], Tensor]) -> None:
    """Draw, for (side, moment), the descending singular values of the features relative to the largest."""
    _draw_sides(axes, {key: (sigma / sigma[0]).clamp_min(1e-16) for key, sigma in spectra.items()})
    axes.set_yscale("log")
    _finish(axes, "Spectra of the features", "index i of singular value", "σ_i(Z) / σ_1(Z)")


def draw_curves(
    axes: Axes, curves: Mapping[tuple[str, str], Tensor], *, title: str, ylabel: str, log: bool = False
) -> None:
    """Draw, for (side, moment), values over the steps 1, 2, … of gradient descent."""
    _draw_sides(axes, curves)
    axes.set(xscale="log", yscale="log" if log else "linear")
    _finish(axes, title, "steps of gradient descent (exact line search)", ylabel)


def _draw_sides(axes: Axes, curves: Mapping[tuple[str, str], Tensor]) -> None:
    for (side, moment), values in curves.items():
        index = np.arange(1, len(values) + 1)
        axes.plot(index, values.cpu().numpy(), STYLES[moment], color=COLOURS[side], label=f"{side}, {moment}")


def _finish(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(True, alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, whole or not at all."""
    path = Path(path)
    with staged_directory(path.parent) as staging:
        figure.savefig(staging / path.name, dpi=130)


# ---- the curves of a log ----

# Of a training log, what is neither a loss nor a term.
_NO_TERM = re.compile(
    r"step|epoch|learning_rate|grad_norm|num_input_tokens_seen|total_flos|train_.*|.*_weight|.*runtime"
)
# Title and unit of a panel, and the names of its curves; of the first one, the losses of evaluations.
_PANELS = {
    ("Losses and terms", "value in the log"): r"eval_(.+_)?loss",
    ("Condition numbers of linear probing", "log10 κ(ZᵀZ)"): r".+_(benign|harmful)_log10_kappa",
    ("Accuracy", "as logged"): r"eval_.*accuracy",
    ("RIR (of linear probing; no attack was run)", "log10 RIR"): r".+_log10_rir",
}


def history_panels(history: History) -> list[Callable[[Axes], None]]:
    """What there is to draw of a log history: functions that each draw one panel; none for what was not logged."""
    logged = {name for entry in history if "loss" in entry for name in entry}
    curves: dict[str, dict[int, float]] = {}
    for name in dict.fromkeys(
        key for entry in history for key, value in entry.items() if isinstance(value, int | float)
    ):
        curves[name] = {step: value for step, value in by_step(history, name).items() if math.isfinite(value)}
    panels: list[Callable[[Axes], None]] = []
    for (title, unit), pattern in _PANELS.items():
        terms = logged if "terms" in title else set()
        names = [
            name
            for name, curve in curves.items()
            if curve
            and (re.fullmatch(pattern, name) or (name in terms and not _NO_TERM.fullmatch(name)))
            # Another name for the same values.
            and not ("benign_" in name and name.replace("benign_", "") in curves)
        ]
        if not terms:  # what a callback measured on a sample says nothing more than the whole evaluation set
            names = [name for name in names if name.startswith("eval_")] or names
        if names:
            drawn = {name: curves[name] for name in names}
            panels.append(partial(_draw_panel, history=history, curves=drawn, title=title, unit=unit))
    return panels


def _draw_panel(axes: Axes, history: History, curves: dict[str, dict[int, float]], title: str, unit: str) -> None:
    """Draw curves, each value marked as exact or as a bound, with an arrow to where the true one lies."""
    kinds = set()
    for index, (name, curve) in enumerate(curves.items()):
        stem, _, what = name.rpartition("log10_")
        side = stem.rstrip("_").rpartition("_")[2]
        colour = COLOURS[side] if what == "kappa" else "black" if what == "rir" else f"C{index}"
        dashes = _DASHES[index // (2 if what else 10) % len(_DASHES)]
        axes.plot(list(curve), list(curve.values()), dashes, color=colour, label=name)
        lower = by_step(history, f"{stem}is_bound" if what == "kappa" else f"{stem}rir_is_lower_bound")
        upper = by_step(history, f"{stem}rir_is_upper_bound") if what == "rir" else {}
        for step, value in curve.items():
            kind = "^" if lower.get(step) else "v" if upper.get(step) else "o"
            kinds.add(kind)
            axes.plot([step], [value], kind, color=colour, fillstyle="full" if kind == "o" else "none")
    for kind in sorted(kinds - {"o"}):
        axes.plot([], [], kind, color="black", fillstyle="none", label=f"{'lower' if kind == '^' else 'upper'} bound")
    if "terms" in title:
        values = [abs(value) for curve in curves.values() for value in curve.values()]
        axes.set_yscale("symlog", linthresh=max(min(filter(None, values), default=1.0), 1e-6))
    _finish(axes, title, "step", unit)


# ---- the callback ----

_REFERENCE = "starting_spectra.safetensors"


class SpectrumFigureCallback(TrainerCallback):
    """At every evaluation, draw the spectra of benign and harmful features, before and after, and the log's curves.

    The figure is ``spectrum/spectrum.png`` in the Trainer's output_dir. The curves (losses and terms, log10 κ,
    accuracy, log10 RIR over the steps) are those of the log history. The spectra need images: a sample of ``benign``
    and ``harmful`` is run through the model when training begins and at every evaluation, in full precision and in
    eval mode; training goes on as if this had not happened, random numbers included. What is found of the sample, if
    there are benign images, is added to the log history, as ``spectrum_log10_rir``, … (see `spectral_metrics`).

    The starting spectra are kept next to the figure, in ``starting_spectra.safetensors``, from where a resumed run
    reads them. Files are written whole or not at all, by the first process alone.

    Args:
        benign: Benign images: a `datasets.Dataset`, or a map-style dataset of dictionaries. Labels are not needed.
        harmful: Harmful images, likewise.
        max_samples: How many images of each, drawn at random once and for all.
        batch_size: Images in one forward pass.
        head_module: The classifier's name, where it cannot be found without help.

    Raises:
        ArgumentError: For impossible values; when training begins, for images with weights sharded over processes.
        DataError: If a dataset is empty or has no images.
        CheckpointError: When training begins, if the starting spectra cannot be written. A figure that cannot be
            written later on is passed over with a warning.

    Example:
        >>> rows = [{"pixel_values": torch.randn(3, 8, 8)} for _ in range(16)]
        >>> callback = SpectrumFigureCallback(benign=rows[:8], harmful=rows[8:])
    """

    def __init__(
        self,
        *,
        benign: Any = None,
        harmful: Any = None,
        max_samples: int = 2048,
        batch_size: int = 64,
        head_module: str | None = None,
    ) -> None:
        if min(max_samples, batch_size) < 1:
            raise ArgumentError(f"Expected sizes of at least 1, found {max_samples=}, {batch_size=}. Raise them.")
        given = {"benign": benign, "harmful": harmful}
        self._data = {side: _sample(data, side, max_samples) for side, data in given.items() if data is not None}
        self.batch_size, self.head_module = batch_size, head_module
        self._references: dict[str, Measurement] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the starting weights, or read what was measured of them before the run was stopped."""
        if self._data and sharded_weights():
            raise ArgumentError(
                "Expected whole weights in each process, found them sharded by FSDP or DeepSpeed. Leave benign= and "
                "harmful= out to draw the curves alone."
            )
        if not self._data or not state.is_world_process_zero:
            return
        path = _folder(args) / _REFERENCE
        if state.global_step == 0:
            self._references = self._measure(args, **kwargs)
            with staged_directory(path.parent) as staging:
                save_measurements(staging / _REFERENCE, self._references)
        else:
            self._references = load_measurements(path) if path.is_file() else {}

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure and draw."""
        if not state.is_world_process_zero:
            return
        before: dict[str, Measurement] = {}
        metrics: dict[str, float] = {}
        try:
            now = self._measure(args, **kwargs)
            before = {side: m for side, m in self._references.items() if side in now and now[side].same_data(m)}
            if state.global_step and set(now) - set(before):
                logger.warning_once(
                    f"The starting spectra in {_folder(args)} are missing or of other images than those now given: "
                    "the figure shows the present ones alone. Give the same images, or start anew in another "
                    "output_dir."
                )
            if "benign" in now:
                each = now["benign"], before.get("benign"), now.get("harmful"), before.get("harmful")
                metrics = spectral_metrics(*each)
        except (RankError, NonFiniteError) as error:
            logger.warning(f"No spectra in the figure of step {state.global_step}: {error}")
            now = {}
        if state.log_history and metrics:
            state.log_history[-1].update({f"spectrum_{name}": value for name, value in metrics.items()})
        moment = "after" if state.global_step else "before"
        panels = history_panels(state.log_history)
        if now:
            panels.insert(0, partial(_draw_measured, now=now, before=before, metrics=metrics, moment=moment))
        if panels:
            self._draw(_folder(args) / "spectrum.png", panels)

    def _draw(self, path: Path, panels: list[Callable[[Axes], None]]) -> None:
        figure, axes = new_figure(len(panels), columns=3 if len(panels) > 4 else 2)
        for panel, draw in zip(axes, panels, strict=True):
            draw(panel)
        try:
            save_figure(figure, path)
        except CheckpointError as error:
            # A figure is not worth the run.
            logger.warning(f"Passing over the figure {path}: {error}")

    def _measure(self, args: Any, model: Any, processing_class: Any = None, **kwargs: Any) -> dict[str, Measurement]:
        found = {}
        with seeded(0):  # training goes on with the random numbers that it would have had
            for side, rows in self._data.items():
                found[side] = Measurement()
                options: dict[str, Any] = {"batch_size": self.batch_size, "head_module": self.head_module}
                options |= {"description": f"spectrum of {side} features", "progress": not args.disable_tqdm}
                for batch in extract(model, rows, processing_class, **options):
                    found[side].update(batch.features, batch.pixel_values)
        return found


def _folder(args: Any) -> Path:
    return Path(args.output_dir) / "spectrum"


def _sample(dataset: Any, name: str, max_samples: int) -> Any:
    if not isinstance(dataset, ImageRows):
        dataset = ImageRows(dataset, name, find_columns(dataset, need_label=False)[0])
    # Neither the first ones nor every k-th one: data sets are often in the order of their classes.
    return torch.utils.data.Subset(dataset, sorted(choose(len(dataset), max_samples, 0)))


def _draw_measured(
    axes: Axes, now: dict[str, Measurement], before: dict[str, Measurement], metrics: dict[str, float], moment: str
) -> None:
    shown = {(side, "before"): measurement for side, measurement in before.items() if moment == "after"}
    shown |= {(side, moment): measurement for side, measurement in now.items()}
    draw_spectra(axes, {key: measurement.factor.singular_values() for key, measurement in shown.items()})
    title = "Spectra of the features"
    if "log10_rir" in metrics:
        lower, upper = metrics["rir_is_lower_bound"], metrics["rir_is_upper_bound"]
        value = f"{'≥' if lower else '≤' if upper else '='} {metrics['log10_rir']:.2f}"
        title += "\nRIR of the sample: undetermined" if lower and upper else f"\nlog10 RIR of the sample {value}"
    axes.set_title(title)
