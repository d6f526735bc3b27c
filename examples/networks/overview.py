"""One table of what the default reaches in every experiment: at the top of the page, and in the README."""

import statistics
from pathlib import Path
from typing import Any

from examples.audit_page import table
from examples.networks.rows import Group, pooled_difference
from examples.networks.settings import experiment_names, load_experiment
from examples.networks.tables import probe_change, rir_text
from hf_immunize.audit.names import signed
from hf_immunize.errors import DataError


BEGIN, END = "<!-- networks: begin -->", "<!-- networks: end -->"


def overview(groups: list[Group]) -> str:
    """A line for every experiment whose default was run, as Markdown.

    Args:
        groups: Of all experiments.

    Returns:
        The table; without one, a sentence that says so.
    """
    heads = ["experiment", "seeds", "benign change, points (95 %)", "log10 RIR, exact"]
    heads += ["strongest linear probe at the classifier's input, %", "chance, %", "at the best layer, %"]
    own = [group for group in groups if group.method == "default" and not group.changes]
    lines = [_line(group) for group in own]
    return "\n".join(table(heads, lines)).strip() if lines else "The default was not run in any experiment."


def _line(group: Group) -> list[Any]:
    mean, (low, high), _ = pooled_difference(group.rows)
    title = load_experiment(group.experiment)["title"] if group.experiment in experiment_names() else group.experiment
    return [
        title,
        group.seeds,
        f"{signed(mean)} ({signed(low)} to {signed(high)})",
        rir_text(group),
        probe_change(group, "harmful"),
        f"{100 * statistics.fmean([row['probes']['harmful']['chance'] for row in group.rows]):.1f}",
        probe_change(group, "harmful", "any_layer"),
    ]


def write_overview(readme: Path, text: str) -> None:
    """Put the table between its two marks in a file.

    Args:
        readme: The file.
        text: The table.

    Raises:
        DataError: If the file has no such marks.
    """
    whole = readme.read_text(encoding="utf-8")
    head, begin, rest = whole.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise DataError(f"Expected {BEGIN} and {END} in {readme}, between which the table belongs, found none.")
    readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")
