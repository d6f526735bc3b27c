"""What the two linear experiments share: command line, measuring a map, a store that resumes, and the results page.

Run `house_prices.py` or `mnist_pairs.py`; this module does nothing by itself.
"""

import json
import math
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_immunize.linear.optimum import common_basis, map_ratio, optimal_map, rir_ceiling, row_factor
from hf_immunize.linear.probe import least_squares_probe
from hf_immunize.spectra.ratio import reference_condition_number


ROOT = Path(__file__).resolve().parents[1]
TEXTS = Path(__file__).parent / "linear_pages"
PAGE = ROOT / "docs" / "results" / "linear.md"
FIGURES = ROOT / "docs" / "results" / "figures"


def command_line(description: str, data: str) -> ArgumentParser:
    """The options of both; `data` says what ``--data`` is."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", help=data)
    parser.add_argument("--work", default="runs/linear", help="where results are kept (default %(default)s)")
    parser.add_argument("--no-page", action="store_true", help="print only; leave docs/results/linear.md alone")
    return parser


class Measure:
    """Exact ratios, the reference protocol's, and the paper's Definition 3.1, of any map on one pair of tasks.

    (a) harmful probing becomes much slower, (b) benign probing no slower, (c) and the benign task is solved as well.
    """

    def __init__(self, X_benign: Tensor, X_harmful: Tensor, y: Tensor | None = None) -> None:
        self.benign, self.harmful, self.targets = X_benign, X_harmful, y
        self.P, self.H = row_factor(X_benign), row_factor(X_harmful)
        self.before = reference_condition_number(X_harmful), reference_condition_number(X_benign)

    def __call__(self, theta: Tensor) -> dict[str, Any]:
        """Everything the tables show of one map ``(D, D)``."""
        ratio = map_ratio(self.P, self.H, theta)
        assert ratio.benign is not None
        before = after = math.nan
        kept = ratio.benign.rank == self.P.rank  # (c) without targets
        if self.targets is not None:
            # Through the row space, so that rounding in the null directions is not blown up into new features.
            inside = self.benign.to(torch.float64) @ self.P.V
            before, after = (self._best_loss(Z) for Z in (inside, inside @ (self.P.V.T @ theta)))
            kept = after <= before * 1.01 + 1e-9 * float(self.targets.var(0, correction=0).sum())
        harmful = reference_condition_number(self.harmful @ theta) / self.before[0]
        benign = reference_condition_number(self.benign @ theta) / self.before[1]
        return {
            "i": ratio.harmful_ratio,
            "ii": ratio.benign_ratio,
            "rir": ratio.rir,
            "bound": ratio.bound,
            "a": ratio.harmful_ratio >= 10,
            "b": ratio.benign_ratio <= 1 + 1e-6 and not ratio.benign.is_bound,
            "c": kept,
            "loss_before": before,
            "loss_after": after,
            "reference_i": harmful,
            "reference_ii": benign,
            "reference_rir": harmful / benign,
        }

    def _best_loss(self, Z: Tensor) -> float:
        """Squared loss per sample of the best linear probe with intercept."""
        targets = self.targets.reshape(len(Z), -1).to(Z)
        return float((targets - least_squares_probe(Z, targets, intercept=True).predict(Z)).square().sum(1).mean())


def attained(P: Tensor, H: Tensor, several: bool = False) -> dict[str, Any]:
    """The ceiling, and the least share of it that the closed form reaches on the shared directions.

    At t = 1, with `several` at 10 and κ(K_P) too; checked by singular values of the features themselves.
    """
    start, start_cpu = time.perf_counter(), time.process_time()
    ceiling = rir_ceiling(P, H)
    optimal_map(P, H)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    basis = common_basis(row_factor(P), row_factor(H), ceiling.tolerance)
    shares = []
    for t in (1.0, 10.0, ceiling.common_benign_kappa) if several else (1.0,):
        theta = optimal_map(P @ basis, H @ basis, t=t)
        s_p, s_h = (torch.linalg.svdvals(X @ basis @ theta) for X in (P, H))
        reached = float((s_h[0] / s_h[-1]) / (s_p[0] / s_p[-1])) ** 2
        reached *= ceiling.common_benign_kappa / ceiling.common_harmful_kappa
        shares.append(reached / ceiling.common_value)
    return {**vars(ceiling), "fraction": min(shares), "seconds": seconds, "cpu_seconds": cpu_seconds}


class Store:
    """Results as lines of JSON under their keys, written as they come, so that a second run resumes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, Any]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the line that an interruption cut off
                continue
            self.rows[row["key"]] = row

    def get(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result under this key, computed now if it is not there yet."""
        if key not in self.rows:
            self.rows[key] = {"key": key} | compute()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[key]) + "\n")
        return self.rows[key]


def hub_dataset(name: str, **options: Any) -> Any:
    """A data set of the hub, or an OSError: no network, no such data set, another layout there, no `datasets` here."""
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise OSError("the package datasets is not installed") from error
    try:
        return load_dataset(name, **options)
    except (DatasetsError, ValueError) as error:
        raise OSError(str(error)) from error


def number(value: float, digits: int = 3) -> str:
    """A number as a table shows it."""
    if value != value:
        return "–"
    return f"{value:.{digits}g}" if abs(value) < 1e4 else f"{value:.2e}"


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    data = torch.tensor(values, dtype=torch.float64)
    if len(data) < 2 or float(data.std()) == 0:
        return number(float(data.mean()))
    return f"{number(float(data.mean()))} ± {number(float(data.std()), 2)}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def write_section(name: str, **parts: Any) -> None:
    """Put a section into the results page, in place of the one of that name; `parts` go into its text."""
    opening = (TEXTS / "opening.md").read_text(encoding="utf-8")
    text = (TEXTS / f"{name.replace(' ', '_')}.md").read_text(encoding="utf-8").format(**parts)
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else opening
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    block = f"{start}\n{text.strip()}\n{end}"
    if start in page:
        page = page[: page.index(start)] + block + page[page.index(end) + len(end) :]
    else:
        page = page.rstrip() + "\n\n" + block + "\n"
    # The page opens as it should, whatever an older run wrote there.
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(opening.rstrip() + "\n\n" + page[page.index("<!-- ") :], encoding="utf-8")
