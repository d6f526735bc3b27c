"""A figure of spectra and of the log's curves at every evaluation, for any `transformers.Trainer`."""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_immunize.data.columns import find_columns
from hf_immunize.data.images import ImageRows
from hf_immunize.errors import ArgumentError, CheckpointError, NonFiniteError, RankError
from hf_immunize.features.extract import Measurement, extract, load_measurements, save_measurements, spectral_metrics
from hf_immunize.files import staged_directory
from hf_immunize.training.checkpoints import History, by_step, sharded_weights


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


logger = logging.get_logger(__name__)


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


_REFERENCE = "starting_spectra.safetensors"


class SpectrumFigureCallback(TrainerCallback):
    """At every evaluation, draw the spectra of benign and harmful features, before and after, and the log's curves.

    The curves (losses and terms, log10 κ, accuracy, log10 RIR over the steps) are those of the log history. The
    spectra need images: with ``benign`` or ``harmful``, a sample of each is run through the model when training begins
    and at every evaluation, in full precision and in eval mode; training goes on as if this had not happened, random
    numbers included. What is found is added to the evaluation's entry of the log history, as
    ``spectrum_benign_log10_kappa``, ``spectrum_log10_rir``, … (see `spectral_metrics`); it is of the sample.

    The starting spectra are kept beside the figures, in ``starting_spectra.safetensors``, from where a resumed run
    takes them; the callback itself has no state. Files are written whole or not at all, by the first process alone.

    Args:
        output_dir: Where the figures go; by default ``spectrum`` within the Trainer's output_dir.
        benign: Benign images: a `datasets.Dataset`, or a map-style dataset of dictionaries. Labels are not needed.
        harmful: Harmful images, likewise.
        processing_class: Turns images into pixel values; by default the Trainer's.
        max_samples: How many images of each, drawn at random once and for all.
        keep_all: Keep the figure of every step, as ``spectrum-000100.png``, not the last one as ``spectrum.png``.
        batch_size: Images in one forward pass.
        head_module: The classifier's name, where it cannot be found without help.

    Raises:
        ArgumentError: For impossible values; when training begins, for images with weights sharded over processes.
        DataError: If a dataset is empty or has no images.
        CheckpointError: When training begins, if the starting spectra cannot be written. A figure that cannot be
            written later on is passed over with a warning.

    Example:
        >>> import os, tempfile
        >>> from transformers import ViTConfig, ViTForImageClassification, Trainer
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        ...                    image_size=8, patch_size=4, num_labels=2)
        >>> rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 2} for i in range(16)]
        >>> args = TrainingArguments(tempfile.mkdtemp(), max_steps=2, eval_strategy="steps", eval_steps=1,
        ...     report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", logging_steps=1)
        >>> trainer = Trainer(ViTForImageClassification(config), args, train_dataset=rows, eval_dataset=rows,
        ...     callbacks=[SpectrumFigureCallback(benign=rows[:8], harmful=rows[8:])])
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {'loss': ...
        >>> sorted(os.listdir(f"{args.output_dir}/spectrum"))
        ['spectrum.png', 'starting_spectra.safetensors']
    """

    def __init__(
        self,
        output_dir: str | None = None,
        *,
        benign: Any = None,
        harmful: Any = None,
        processing_class: Any = None,
        max_samples: int = 2048,
        keep_all: bool = False,
        batch_size: int = 64,
        head_module: str | None = None,
    ) -> None:
        for name, value in (("max_samples", max_samples), ("batch_size", batch_size)):
            if value < 1:
                raise ArgumentError(f"Expected {name}= of at least 1, found {value}.")
        given = {"benign": benign, "harmful": harmful}
        self._data = {side: _sample(data, side, max_samples) for side, data in given.items() if data is not None}
        self.output_dir = output_dir
        self.processing_class = processing_class
        self.keep_all = keep_all
        self.batch_size = batch_size
        self.head_module = head_module
        self._references: dict[str, Measurement] = {}
        # Of the step at hand: several evaluation sets are evaluated one after the other.
        self._now: tuple[int, dict[str, Measurement]] | None = None
        self._training = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the starting weights, or take what was measured of them before the run was stopped."""
        self._training, self._now = True, None
        if self._data and sharded_weights():
            raise ArgumentError(
                "Expected whole weights in each process for spectra of images, found weights sharded by FSDP or "
                "DeepSpeed. Leave benign= and harmful= out to draw the curves alone."
            )
        if not self._data or not state.is_world_process_zero:
            return
        path = self._folder(args) / _REFERENCE
        if state.global_step == 0:
            self._references = self._measure(args, **kwargs)
            with staged_directory(path.parent) as staging:
                save_measurements(staging / _REFERENCE, self._references)
        elif path.is_file():
            self._references = load_measurements(path)
        else:
            self._references = {}
            logger.warning(
                f"Expected the starting spectra in {path}, found no such file: the figures will show those of the "
                "weights now alone. Copy it from where the run began."
            )

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forget the spectra, since the weights are about to change."""
        self._now = None

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Forget the spectra, since other weights may have been loaded."""
        self._training, self._now = False, None

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure and draw."""
        if not state.is_world_process_zero:
            return
        try:
            now = self._measured_now(args, state, **kwargs) if self._data else {}
            before = {side: m for side, m in self._references.items() if side in now and now[side].same_data(m)}
            if set(self._references) & set(now) - set(before):
                logger.warning_once(
                    f"The starting spectra in {self._folder(args)} are of other images than those now given, and are "
                    "left out. Give the same images, or start anew in another output_dir."
                )
            metrics = _metrics(now, before)
        except (RankError, NonFiniteError) as error:
            logger.warning(f"No spectra in the figure of step {state.global_step}: {error}")
            now, before, metrics = {}, {}, {}
        if state.log_history and metrics:
            state.log_history[-1].update({f"spectrum_{name}": value for name, value in metrics.items()})
        panels = history_panels(state.log_history)
        if now:
            panels.insert(0, _spectra_panel(now, before, metrics, "after" if state.global_step else "before"))
        if not panels:
            return
        figure, axes = new_figure(len(panels), columns=3 if len(panels) > 4 else 2)
        for panel, draw in zip(axes, panels, strict=True):
            draw(panel)
        outside = "After training" if state.global_step else "Before training"
        figure.suptitle(f"Step {state.global_step}" if self._training else outside)
        name = f"spectrum-{state.global_step:06d}.png" if self.keep_all else "spectrum.png"
        try:
            with staged_directory(self._folder(args)) as staging:
                save_figure(figure, staging / name)
        except CheckpointError as error:
            # A figure is not worth the run.
            logger.warning(f"Passing over the figure of step {state.global_step}: {error}")

    def _folder(self, args: TrainingArguments) -> Path:
        return Path(self.output_dir) if self.output_dir is not None else Path(args.output_dir) / "spectrum"

    def _measured_now(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> dict[str, Measurement]:
        if self._now is None or self._now[0] != state.global_step or not self._training:
            self._now = (state.global_step, self._measure(args, **kwargs))
        return self._now[1]

    def _measure(
        self, args: TrainingArguments, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> dict[str, Measurement]:
        processor = self.processing_class if self.processing_class is not None else processing_class
        found = {}
        with _undisturbed(model):
            for side, rows in self._data.items():
                found[side] = Measurement()
                batches = extract(
                    model,
                    rows,
                    processor,
                    batch_size=self.batch_size,
                    head_module=self.head_module,
                    description=f"spectrum of {side} features",
                    progress=not args.disable_tqdm,
                )
                for batch in batches:
                    found[side].update(batch.features, batch.pixel_values)
        return found


def _sample(dataset: Any, name: str, max_samples: int) -> Any:
    if not isinstance(dataset, ImageRows):
        dataset = ImageRows(dataset, name, find_columns(dataset, need_label=False)[0])
    if len(dataset) <= max_samples:
        return dataset
    # Neither the first ones nor every k-th one: data sets are often in the order of their classes.
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:max_samples]
    return torch.utils.data.Subset(dataset, sorted(chosen.tolist()))


def _metrics(now: dict[str, Measurement], before: dict[str, Measurement]) -> dict[str, float]:
    if "benign" in now:
        return spectral_metrics(now["benign"], before.get("benign"), now.get("harmful"), before.get("harmful"))
    if "harmful" in now:
        metrics = spectral_metrics(now["harmful"], before.get("harmful"), None, None)
        return {name.replace("benign", "harmful"): value for name, value in metrics.items()}
    return {}


def _spectra_panel(
    now: dict[str, Measurement], before: dict[str, Measurement], metrics: dict[str, float], moment: str
) -> Callable[[Axes], None]:
    spectra = {}
    for side, measurement in now.items():
        if moment == "after" and side in before:
            spectra[side, "before"] = before[side].factor.singular_values()
        spectra[side, moment] = measurement.factor.singular_values()

    def draw(axes: Axes) -> None:
        draw_spectra(axes, spectra)
        axes.set_title(f"Spectra of the features{_rir_words(metrics)}")

    return draw


def _rir_words(metrics: dict[str, float]) -> str:
    if "log10_rir" not in metrics:
        return ""
    lower, upper = metrics["rir_is_lower_bound"], metrics["rir_is_upper_bound"]
    if lower and upper:
        return "\nRIR of the sample: undetermined"
    sign = "≥" if lower else "≤" if upper else "="
    return f"\nlog10 RIR of the sample {sign} {metrics['log10_rir']:.2f}"


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model in full precision, and leave modes and random numbers as they were."""
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    # What accelerate put in place of the class's own forward runs under autocast, whatever is set around it.
    patched = vars(model).pop("forward", None)
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if patched is not None:
            model.forward = patched
        for module, training in modes.items():
            module.training = training
