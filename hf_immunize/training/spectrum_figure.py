"""A figure of spectra at every evaluation, for any `transformers.Trainer`; curves are for trackers to draw."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from hf_immunize.data.columns import find_columns
from hf_immunize.data.images import ImageRows
from hf_immunize.data.sources import choose
from hf_immunize.errors import ArgumentError, CheckpointError, NonFiniteError, RankError, named_extras
from hf_immunize.features.cache import seeded
from hf_immunize.features.extract import Measurement, extract, load_measurements, save_measurements, spectral_metrics
from hf_immunize.files import staged_directory
from hf_immunize.training.distributed import sharded_weights


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


logger = logging.get_logger(__name__)


# ---- drawing ----

# Blue for benign, vermilion for harmful (Okabe and Ito's palette, separable for colour-blind readers too).
COLOURS = {"benign": "#0072B2", "harmful": "#D55E00"}
STYLES = {"before": "--", "after": "-"}


def new_figure(panels: int) -> tuple[Figure, list[Axes]]:
    """A figure with panels in one row, drawn without a display."""
    with named_extras():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * panels, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, panels, index + 1) for index in range(panels)]


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


# ---- the callback ----

_REFERENCE = "starting_spectra.safetensors"


class SpectrumFigureCallback(TrainerCallback):
    """At every evaluation, draw the spectra of benign and harmful features, before and after.

    The figure is ``spectrum/spectrum.png`` in the Trainer's output_dir. A sample of ``benign`` and ``harmful`` is run
    through the model when training begins and at every evaluation, in full precision and in eval mode; training goes
    on as if this had not happened, random numbers included. What is found of the sample, if there are benign images,
    is added to the log history, as ``spectrum_log10_rir``, … (see `spectral_metrics`).

    The starting spectra are kept next to the figure, in ``starting_spectra.safetensors``, from where a resumed run
    reads them. Files are written whole or not at all, by the first process alone. Where the run reports to TensorBoard
    or trackio, the figures are there too, as images named ``spectra``.

    Args:
        benign: Benign images: a `datasets.Dataset`, or a map-style dataset of dictionaries. Labels are not needed.
        harmful: Harmful images, likewise.
        max_samples: How many images of each, drawn at random once and for all.
        batch_size: Images in one forward pass.
        head_module: The classifier's name, where it cannot be found without help.

    Raises:
        ArgumentError: For impossible values or no images; when training begins, for weights sharded over processes.
        DataError: If a dataset is empty or has no images.
        MissingPackageError: Without matplotlib, which ``hf-immunize[plots]`` brings.
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
        if not self._data:
            raise ArgumentError("Expected benign= or harmful= images to draw spectra of, found neither. Give some.")
        new_figure(1)  # in vain, so that a package that is missing costs no training
        self.batch_size, self.head_module = batch_size, head_module
        self._references: dict[str, Measurement] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the starting weights, or read what was measured of them before the run was stopped."""
        if sharded_weights():
            raise ArgumentError(
                "Expected whole weights in each process, found them sharded by FSDP or DeepSpeed. Leave the callback "
                "out."
            )
        if not state.is_world_process_zero:
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
        if not now:
            return
        figure, (axes,) = new_figure(1)
        _draw_measured(axes, now, before, metrics, "after" if state.global_step else "before")
        path = _folder(args) / "spectrum.png"
        try:
            save_figure(figure, path)
        except CheckpointError as error:
            # A figure is not worth the run.
            logger.warning(f"Passing over the figure {path}: {error}")
        else:
            _show(path, args, state.global_step)

    def _measure(self, args: Any, model: Any, processing_class: Any = None, **kwargs: Any) -> dict[str, Measurement]:
        found = {}
        with seeded(0):  # training goes on with the random numbers that it would have had
            for side, rows in self._data.items():
                found[side] = Measurement(compared="benign" in self._data)  # else spectra alone are drawn, none logged
                options: dict[str, Any] = {"batch_size": self.batch_size, "head_module": self.head_module}
                options |= {"description": f"spectrum of {side} features", "progress": not args.disable_tqdm}
                for batch in extract(model, rows, processing_class, **options):
                    found[side].update(batch.features, batch.pixel_values)
        return found


def _show(path: Path, args: Any, step: int) -> None:
    """The figure in the trackers of the run that keep pictures."""
    if not {"tensorboard", "trackio"} & {*args.report_to}:
        return
    pixels = np.asarray(Image.open(path).convert("RGB"))
    if "tensorboard" in args.report_to:
        from torch.utils.tensorboard import SummaryWriter

        # The Trainer's own writer is out of a callback's reach: in TensorBoard these are a run beside it.
        folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or os.path.join(args.output_dir, "runs")
        with SummaryWriter(os.path.join(folder, "spectra")) as writer:
            writer.add_image("spectra", pixels, step, dataformats="HWC")
    if "trackio" in args.report_to:
        import trackio  # type: ignore[import-not-found]

        trackio.log({"spectra": trackio.Image(pixels), "train/global_step": step})


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
