"""`hf-immunize ceiling`: before any training, how far can two tasks be told apart by conditioning?

Heavy imports wait until the command runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_immunize.errors import ArgumentError, ImmunizationError, RankError
from hf_immunize.files import check_writable, staged_directory


if TYPE_CHECKING:
    from hf_immunize.linear.optimum import Ceiling


FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp", ".tif", ".tiff", ".eps", ".ps")


def prepare_figure(path: str | Path) -> None:
    """Make sure, before any work is done, that a figure can be saved there; create its folder.

    Args:
        path: Where to.

    Raises:
        ArgumentError: An unknown ending, a folder of that name, or no folder can be made.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ArgumentError(f"Expected a figure that ends in one of {', '.join(FORMATS)}, found {path}; rename it.")
    if path.is_dir():
        raise ArgumentError(f"Expected a file for the figure, found the folder {path}; choose another name.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            f"Expected a folder {path.parent} for the figure, found that it cannot be made ({error.strerror}); choose "
            "another place."
        ) from error
    check_writable(path.parent, "--figure")


def save_frontier(ceiling: Ceiling, path: str | Path) -> None:
    """Draw the best harmful ratio (i) against the benign ratio (ii), and save it.

    Where the harmful data have directions that the benign data lack, the line is that of the shared directions, and
    legend and title say so.

    Args:
        ceiling: Of two tasks.
        path: Where to; the ending decides the format. A missing folder is created.

    Raises:
        RankError: The tasks share no direction, so there is no frontier to draw.
        ArgumentError: The file cannot be written, or has an unknown ending.
    """
    prepare_figure(path)
    points = ceiling.frontier()
    if not points:
        raise RankError("The two tasks share no direction, so there is no frontier to draw; leave --figure out.")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    benign, harmful = [p[1] for p in points], [p[2] for p in points]
    figure, axis = plt.subplots(figsize=(7.5, 5.6), constrained_layout=True)
    axis.plot(benign, harmful, linewidth=3, color="tab:blue", label=_label(ceiling))
    axis.fill_between(benign, [min(harmful) / 10] * len(points), harmful, color="tab:blue", alpha=0.12)
    axis.plot([benign[0]], [harmful[0]], "o", markersize=10, color="tab:blue")
    axis.annotate(
        "t = 1: benign\nperfectly conditioned",
        (benign[0], harmful[0]),
        fontsize=12,
        textcoords="offset points",
        xytext=(12, -4),
        va="top",
    )
    axis.plot([1], [1], "s", markersize=11, color="tab:red", label="as it is (θ = I)")
    axis.axvline(1, color="gray", linestyle="--", linewidth=1.2)
    axis.axhline(1, color="gray", linestyle="--", linewidth=1.2)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(min(min(harmful) / 10, 0.5), max(max(harmful) * 4, 2))
    axis.set_xlabel("(ii)  κ of the benign task, times what it was", fontsize=13)
    axis.set_ylabel("(i)  κ of the harmful task, times what it was", fontsize=13)
    scope = f" on the shared directions ({ceiling.common_rank})" if ceiling.harmful_only else ""
    axis.set_title(f"What a linear map can reach{scope}", fontsize=14)
    axis.tick_params(labelsize=12)
    for line in (axis.xaxis, axis.yaxis):
        low, high = line.get_view_interval()
        line.set_major_formatter("{x:g}")
        # Between few decades the ticks in between need numbers; between many they would run into each other.
        line.set_minor_formatter("{x:g}" if high / low < 30 else "")
    axis.tick_params(which="minor", labelsize=10)
    axis.legend(fontsize=12, loc="lower right")
    axis.grid(alpha=0.3)
    try:
        with staged_directory(Path(path).parent) as staging:
            figure.savefig(staging / Path(path).name, dpi=100)
    except OSError as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        raise ArgumentError(
            f"Expected to write the figure {path}, found that it cannot be ({reason}); choose another place."
        ) from error
    finally:
        plt.close(figure)


def _label(ceiling: Ceiling) -> str:
    if ceiling.harmful_only:
        return f"frontier of the shared directions: RIR = {ceiling.common_value:.3g}"
    if ceiling.harmful_rank == 1:
        return f"frontier: one harmful direction, RIR up to {ceiling.value:.3g}"
    return f"frontier: RIR = {ceiling.value:.3g}"


_DTYPES = ("float16", "bfloat16", "float32", "float64")


def ceiling(
    benign: Annotated[Path, typer.Argument(help="Features or raw data of the task to keep.", show_default=False)],
    harmful: Annotated[Path, typer.Argument(help="The same columns for the task to slow down.", show_default=False)],
    key: Annotated[str | None, typer.Option(help="Array to take from .npz and .safetensors files.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns to use of tables, separated by commas; default: all of them.")
    ] = None,
    drop: Annotated[str | None, typer.Option(help="Columns of tables to leave out, such as the target.")] = None,
    fill: Annotated[
        float | None, typer.Option(help="Value for missing cells; without it they are an error.", show_default=False)
    ] = None,
    image_size: Annotated[int, typer.Option(help="Images are resized to this many pixels a side, in grey.")] = 28,
    standardized: Annotated[
        bool, typer.Option("--standardize", help="Centre and scale every column, each file on its own.")
    ] = False,
    produced_dtype: Annotated[
        str | None,
        typer.Option(help=f"Precision that computed the features, if not the file's: {', '.join(_DTYPES)}."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Sine of the angle from which a harmful direction counts as absent.")
    ] = None,
    leading: Annotated[int, typer.Option(min=1, help="How many leading directions to compare by angle.")] = 5,
    figure: Annotated[Path | None, typer.Option(help="Save the frontier, (i) against (ii), as an image.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """How far can a linear map immunize these two tasks? Known before any training, in seconds.

    A linear probe learns a task by gradient descent, and is as slow as the condition number κ of its problem is large
    (the ratio of the longest to the shortest axis of the loss, squared). Immunizing means raising κ of the harmful
    task without raising that of the benign one. The gain is counted as RIR, the relative immunization ratio:

        RIR = (how much κ rose for the harmful task) / (how much κ rose for the benign task)

    RIR = 1 means nothing gained; 100 means that harmful probing became 100 times worse conditioned than benign probing
    did. This command prints the CEILING of RIR: no linear map of the given features, however trained, can exceed it,
    and one that reaches it is known in closed form. A ceiling near 1 says that training such a map is futile. An
    infinite ceiling says that the harmful task has directions that the benign data do not use.

    Give two files with one sample a row: .npy, .npz, .safetensors, .csv, .parquet (numbers, feature lists or images),
    or folders of images. Features are best taken at the input of the classifier.

    What it does not say: whether an attacker with another optimizer is stopped. A linear map slows gradient descent
    only; it is a yardstick for training, not a defence.
    """
    try:
        _run(
            benign,
            harmful,
            key,
            columns,
            drop,
            fill,
            image_size,
            standardized,
            produced_dtype,
            tolerance,
            leading,
            figure,
            as_json,
        )
    except ImmunizationError as error:
        from rich.console import Console
        from rich.text import Text

        # Messages quote paths and cells, in which brackets are no markup.
        Console(stderr=True).print(Text.assemble(("Error:", "bold red"), f" {error}"))
        raise typer.Exit(2) from error


def _run(
    benign: Path,
    harmful: Path,
    key: str | None,
    columns: str | None,
    drop: str | None,
    fill: float | None,
    image_size: int,
    standardized: bool,
    produced_dtype: str | None,
    tolerance: float | None,
    leading: int,
    figure: Path | None,
    as_json: bool,
) -> None:
    import torch

    from hf_immunize.cli.ceiling import prepare_figure, save_frontier
    from hf_immunize.linear.inputs import read_pair, standardize
    from hf_immunize.linear.optimum import factor_angles, factor_ceiling, row_factor

    if produced_dtype is not None and produced_dtype not in _DTYPES:
        raise ArgumentError(f"--produced-dtype must be one of {', '.join(_DTYPES)}, found {produced_dtype!r}.")
    if figure is not None:
        prepare_figure(figure)
    pick, leave = (None if text is None else [name.strip() for name in text.split(",")] for text in (columns, drop))
    notes: list[str] = []
    data = read_pair(
        benign, harmful, key=key, columns=pick, drop=leave or [], fill=fill, image_size=image_size, notes=notes
    )
    dtype = getattr(torch, produced_dtype) if produced_dtype else None
    if standardized:
        parts = []
        for name, X in zip(("benign", "harmful"), data, strict=True):
            scaled, constant = standardize(X, name)
            parts.append(scaled)
            if constant:
                notes.append(f"{len(constant)} constant columns of the {name} data became 0 (first: {constant[0]}).")
        dtype = dtype or (data[0].dtype if data[0].is_floating_point() else None)
        data = (parts[0], parts[1])
    P = row_factor(data[0], "the benign data", produced_dtype=dtype)
    H = row_factor(data[1], "the harmful data", produced_dtype=dtype)
    found = factor_ceiling(P, H, tolerance)
    angles = factor_angles(P, H, leading).tolist()
    for name, samples in (("benign", found.num_benign), ("harmful", found.num_harmful)):
        if samples < found.dim:
            notes.append(f"{samples} {name} samples in {found.dim} dimensions: the numbers describe this sample.")
    if as_json:
        from hf_immunize.linear.optimum import advice

        numbers: dict[str, Any] = dataclasses.asdict(found)
        # JSON knows neither infinity nor NaN.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}
        typer.echo(
            json.dumps(
                clean
                | {"infinite": math.isinf(found.value), "angles": angles, "advice": advice(found), "notes": notes}
            )
        )
    else:
        _print(found, angles, notes)
    # Last, so that a figure that fails costs no number.
    if figure is not None:
        save_frontier(found, figure)
        if not as_json:
            _note(f"Frontier saved to {figure}.")


def _print(found: Ceiling, angles: list[float], notes: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from hf_immunize.linear.optimum import advice

    console = Console(highlight=False)
    table = Table("", "benign", "harmful", title="Two tasks, one linear map")
    table.add_row("samples × dimensions", *(f"{n} × {found.dim}" for n in (found.num_benign, found.num_harmful)))
    table.add_row("rank", str(found.benign_rank), str(found.harmful_rank))
    table.add_row("κ as it is", f"{found.benign_kappa:.4g}", f"{found.harmful_kappa:.4g}")
    if found.common_rank and found.common_rank < max(found.benign_rank, found.harmful_rank):
        shared = f"{found.common_benign_kappa:.4g}", f"{found.common_harmful_kappa:.4g}"
        table.add_row(f"κ on the {found.common_rank} shared directions", *shared)
    console.print(table)
    value = "infinite" if math.isinf(found.value) else f"{found.value:.4g}"
    console.print(f"Ceiling of RIR: [bold]{value}[/]")
    if found.harmful_only:
        console.print(
            f"  {found.harmful_only} harmful directions are absent from the benign data (beyond an angle of sine "
            f"{found.tolerance:.1g})"
        )
        shared_value = f"{found.common_value:.4g}" if found.common_rank else "none are shared"
        console.print(f"  ceiling on the shared directions alone: {shared_value}")
    text = ", ".join(f"{angle:.1f}°" for angle in angles)
    console.print(f"Angles between the {len(angles)} leading directions of each: {text}")
    console.print(f"[bold]{advice(found)}[/]")
    for note in notes:
        _note(note)


def _note(note: str) -> None:
    from rich.console import Console
    from rich.text import Text

    # Notes quote paths and columns, in which brackets are no markup.
    Console().print(Text(f"Note: {note}", style="yellow"))
