"""`hf-immunize ceiling`: before any training, how far are two tasks separable by conditioning?

Heavy imports wait until the command runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_immunize.errors import ArgumentError, RankError
from hf_immunize.files import check_writable


if TYPE_CHECKING:
    from hf_immunize.linear.optimum import Ceiling

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp", ".tif", ".tiff", ".eps", ".ps")


def ceiling(
    benign: Annotated[Path, typer.Argument(help="Features or raw data of the task to keep.", show_default=False)],
    harmful: Annotated[Path, typer.Argument(help="The same columns for the task to slow down.", show_default=False)],
    drop: Annotated[str | None, typer.Option(help="Columns of tables to leave out, separated by commas.")] = None,
    produced_dtype: Annotated[
        str | None, typer.Option(help=f"Precision of the features, if not the file's: {', '.join(_DTYPES)}.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Save the frontier, (i) against (ii), as an image.")] = None,
) -> None:
    """How far can a linear map immunize these two tasks? Known before any training, in seconds.

    A linear probe learns a task by gradient descent, and is as slow as the condition number κ of its problem is large
    (the ratio of the longest to the shortest axis of the loss, squared). Immunizing means raising κ of the harmful
    task without raising that of the benign one. The gain is counted as RIR, the relative immunization ratio:

        RIR = (how much κ rose for the harmful task) / (how much κ rose for the benign task)

    This command prints the CEILING of RIR: no linear map of the given features, however trained, can exceed it, and
    one that reaches it is known in closed form. A ceiling near 1 says that training such a map is futile. An infinite
    ceiling says that the harmful task has directions that the benign data do not use.

    Give two files with one sample a row: .npy, .csv or .parquet (numbers, or a column of feature lists). Features are
    best taken at the input of the classifier.

    A linear map slows gradient descent only: the ceiling does not say whether another optimizer is stopped.
    """
    import torch

    from hf_immunize.linear.inputs import read_pair
    from hf_immunize.linear.optimum import rir_ceiling, row_factor

    if produced_dtype not in (None, *_DTYPES):
        raise ArgumentError(f"Expected --produced-dtype out of {', '.join(_DTYPES)}, found {produced_dtype!r}.")
    if figure is not None:  # before any work is done
        if figure.suffix.lower() not in _FORMATS or figure.is_dir():
            raise ArgumentError(
                f"Expected --figure to end in one of {', '.join(_FORMATS)}, found {figure}. Rename it."
            )
        check_writable(figure.parent, "--figure")
    data = read_pair(benign, harmful, [] if drop is None else [name.strip() for name in drop.split(",")])
    dtype = getattr(torch, produced_dtype) if produced_dtype else None
    factors = [
        row_factor(X, f"the {name} data", produced_dtype=dtype)
        for name, X in zip(("benign", "harmful"), data, strict=True)
    ]
    found = rir_ceiling(factors[0], factors[1])
    _print(found)
    # Last, so that a figure that fails costs no number.
    if figure is not None:
        _save_frontier(found, figure)
        _note(f"Frontier saved to {figure}.")


def _print(found: Ceiling) -> None:
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
    console.print(f"Ceiling of RIR: [bold]{'infinite' if math.isinf(found.value) else f'{found.value:.4g}'}[/]")
    if found.harmful_only:
        shared_value = f"{found.common_value:.4g}" if found.common_rank else "none are shared"
        console.print(
            f"  {found.harmful_only} harmful directions are absent from the benign data (beyond an angle of sine "
            f"{found.tolerance:.1g})\n  ceiling on the shared directions alone: {shared_value}"
        )
    console.print(f"[bold]{advice(found)}[/]")
    for name, samples in (("benign", found.num_benign), ("harmful", found.num_harmful)):
        if samples < found.dim:
            _note(f"{samples} {name} samples in {found.dim} dimensions: the numbers describe this sample.")


def _note(note: str) -> None:
    from rich.console import Console

    # Notes quote paths and columns, in which brackets are no markup.
    Console(highlight=False, emoji=False).print(f"Note: {note}", style="yellow", markup=False)


def _save_frontier(ceiling: Ceiling, path: Path) -> None:
    """Draw the best harmful ratio (i) against the benign ratio (ii), of the shared directions where some are not."""
    from hf_immunize.training.spectrum_figure import new_figure, save_figure

    points = ceiling.frontier()
    if not points:
        raise RankError("Expected a frontier to draw, found tasks that share no direction. Leave --figure out.")
    shared = f" of the {ceiling.common_rank} shared directions" if ceiling.harmful_only else ""
    _, benign, harmful = zip(*points, strict=True)
    figure, (axis,) = new_figure(1)
    axis.plot(benign, harmful, linewidth=3, color="tab:blue", label=f"frontier{shared}")
    axis.plot(benign[0], harmful[0], "o", color="tab:blue", label="t = 1: benign perfectly conditioned")
    axis.plot(1, 1, "s", color="tab:red", label="as it is (θ = I)")
    axis.set(
        xscale="log",
        yscale="log",
        ylim=(min(min(harmful) / 10, 0.5), max(max(harmful) * 4, 2)),
        xlabel="(ii)  κ of the benign task, times what it was",
        ylabel="(i)  κ of the harmful task, times what it was",
        title=f"What a linear map can reach: RIR up to {ceiling.common_value if shared else ceiling.value:.3g}",
    )
    axis.legend(loc="lower right")
    axis.grid(alpha=0.3)
    save_figure(figure, path)
