"""The report of an audit: tables, JSON, words, and one HTML file that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_immunize.audit import serialization
from hf_immunize.audit.outcomes import AuditData
from hf_immunize.audit.summaries import ACCESSES, SUBJECTS
from hf_immunize.audit.text import clean, label, percent, ratio, signed
from hf_immunize.audit.thresholds import TARGET_SHARES, explain
from hf_immunize.audit.verdict import judge
from hf_immunize.audit.wording import CLASSES, sentence, sentences
from hf_immunize.errors import DataError
from hf_immunize.files import staged_directory
from hf_immunize.text import csv_cell


if TYPE_CHECKING:
    import pandas


class AuditReport:
    """What an audit found, for people and for programs.

    Args:
        data: What it found. Models and data sets named by an absolute path are called by its last part.

    Raises:
        DataError: If the numbers contradict themselves, such as an accuracy above 1.

    Example:
        >>> from hf_immunize.audit.outcomes import Outcome, Task
        >>> task = Task("harmful", "cars", train_size=300, test_size=1000, num_classes=10, chance=0.1)
        >>> run = Outcome("ridge", "head_input", "immunized", "harmful", "classifier", 0, "float64", accuracy=0.8)
        >>> report = AuditReport(AuditData("my/model", None, "quick", 1, {}, {"harmful": task}, [run]))
        >>> report.for_card()["strongest"]["head_input"]["accuracy"]
        0.8
        >>> report.for_card()["strongest"]["fine_tuning"] is None
        True
    """

    def __init__(self, data: AuditData) -> None:
        serialization.check(data)
        self.data = serialization.without_local_paths(data)

    def tables(self) -> dict[str, pandas.DataFrame]:
        """Data frames by name; see `hf_immunize.audit.tables.make_tables`."""
        from hf_immunize.audit.tables import make_tables

        return make_tables(self.data)

    def verdict(self) -> list[str]:
        """What is prevented, slowed and neither, in plain language, the most important first."""
        return sentences(self.data)

    def to_json(self) -> str:
        """Everything as JSON, without loss and with finite numbers only.

        Returns:
            The JSON: under "data" what was found, under "measures" the tables that follow from it, rows of plain
            values, so that another program need not compute them.
        """
        measures = {name: _records(table) for name, table in self.tables().items() if name != "outcomes"}
        return serialization.to_json(self.data, measures)

    @classmethod
    def from_json(cls, text: str) -> AuditReport:
        """The report of what `to_json` wrote.

        Args:
            text: The JSON.

        Raises:
            DataError: If it is not the JSON of an audit.
        """
        return cls(serialization.from_json(text))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AuditReport:
        """The report that `write` left in a folder.

        Args:
            path: The folder, or its ``audit.json``.

        Raises:
            DataError: If there is none, or it is not the JSON of an audit.
        """
        path = Path(path)
        path = path / "audit.json" if path.is_dir() else path
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"Expected the audit.json of an audit, found that {path} cannot be read: {error}."
            ) from error
        return cls.from_json(text)

    def for_card(self) -> dict[str, Any]:
        """The short form for a model card.

        Returns:
            Plain JSON: "preset", "preset_version", "strongest" (attacker, layer, accuracy, reference_accuracy and
            chance by class of attackers, None where none was tested), "utility" (None where it was not measured) and
            "verdict" (sentences; names in them come from outside, so escape them for where they go).
        """
        from hf_immunize.audit.tables import headline_table

        rows = headline_table(self.data).set_index("access")
        names = ("attacker", "layer", "accuracy", "reference_accuracy", "chance")
        utility = self.data.utility
        return {
            "preset": self.data.preset,
            "preset_version": self.data.preset_version,
            "strongest": {
                access: {name: _plain(rows.loc[access, name]) for name in names}
                if _plain(rows.loc[access, "accuracy"]) is not None
                else None
                for access in ACCESSES
            },
            "utility": utility
            and {
                "size": utility.size,
                "immunized": utility.immunized,
                "reference": utility.reference,
                "difference": utility.difference,
                "interval": list(utility.interval) if utility.interval else None,
            },
            "verdict": self.verdict(),
        }

    def summary(self) -> str:
        """The short form for a terminal: the headline and the verdict, as plain text.

        Returns:
            Lines without control characters. For rich, print it with ``markup=False``.
        """
        data = self.data
        lines = [f"Audit of {clean(data.model)} (preset {clean(data.preset)}, version {data.preset_version})"]
        lines += [f"reference: {clean(data.reference)}" if data.reference else "no reference", "", "Worst case:"]
        for row in self._headline():
            if not row["tested"]:
                lines.append(f"  {row['class']}: not tested")
                continue
            against = f"reference {row['reference']}, chance {row['chance']}"
            lines.append(f"  {row['class']}: {row['accuracy']} ({against}) by {row['attacker']}")
        lines += ["", "Verdict:", *(f"  - {one}" for one in self.verdict())]
        lines += ["", "Mind:", *(f"  - {clean(one, 300)}" for one in data.warnings)] if data.warnings else []
        return "\n".join(lines)

    def _headline(self) -> list[dict[str, Any]]:
        from hf_immunize.audit.tables import headline_table

        rows = []
        for row in _records(headline_table(self.data)):
            bound = "≥ " if row["steps_ratio_is_bound"] else ""
            rows.append(
                {
                    "class": CLASSES[row["access"]],
                    "tested": row["accuracy"] is not None,
                    "attacker": label(row["attacker"]) if row["attacker"] else "–",
                    "layer": clean(row["layer"]) if row["layer"] else "–",
                    "accuracy": percent(row["accuracy"]),
                    "interval": _range(row["low"], row["high"]),
                    "seeds": row["seeds"],
                    "reference": percent(row["reference_accuracy"]),
                    "reference_attacker": label(row["reference_attacker"]) if row["reference_attacker"] else "–",
                    "gap": signed(row["gap"]),
                    "random": percent(row["random_accuracy"]),
                    "chance": percent(row["chance"]),
                    "steps": "–" if row["steps_ratio"] is None else f"{bound}{ratio(row['steps_ratio'])} ×",
                    "finding": row["finding"],
                }
            )
        return rows

    def to_html(self) -> str:
        """The report as one HTML file: no network, no script, its figures within."""
        from jinja2 import Environment, StrictUndefined

        from hf_immunize.audit.figures import draw_all

        tables = self.tables()
        source = files("hf_immunize.audit").joinpath("templates/report.html.jinja").read_text(encoding="utf-8")
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.filters |= {"percent": percent, "clean": clean, "label": label, "ratio": ratio, "range": _range}
        environment.filters |= {"signed": signed, "deviation": lambda value: f"{signed(value / 100)}%"}
        return environment.from_string(source).render(
            data=self.data,
            findings=[(one, sentence(one, self.data)) for one in judge(self.data)],
            headline=self._headline(),
            tables={name: _records(table) for name, table in tables.items()},
            pictures=draw_all(self.data, tables["layers"], tables["fine_tuning"]),
            speed=_speed(_records(tables["steps"])),
            attacks=[(access, _attacks(_records(tables["attacks"]), access)) for access in ACCESSES],
            classes=CLASSES,
            words=explain(),
        )

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write ``report.html``, ``audit.json`` and the tables as CSV, all of them or none.

        Args:
            folder: Where to; it is made, and other files in it stay.

        Raises:
            CheckpointError: If they cannot be written; what was there before is untouched.
        """
        page, content, tables = self.to_html(), self.to_json(), self.tables()
        with staged_directory(folder) as staging:
            (staging / "report.html").write_text(page, encoding="utf-8")
            (staging / "audit.json").write_text(content, encoding="utf-8")
            for name, table in tables.items():
                table.map(csv_cell).to_csv(staging / f"{name}.csv", index=False, encoding="utf-8")


def _plain(value: Any) -> Any:
    """A cell of a data frame as a plain value, None where it is missing."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and value != value else value


def _records(table: pandas.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): _plain(value) for key, value in row.items()} for row in table.to_dict("records")]


def _speed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of steps, one row for each attack, with the ratio at the lower share beside it."""
    given = [row for row in rows if row["share"] is None]
    early = {_key(row): row for row in rows if row["share"] == TARGET_SHARES[0]}
    late = [row | {"early": early.get(_key(row))} for row in rows if row["share"] == TARGET_SHARES[-1]]
    return {"rows": late, "given": given, "share": f"{TARGET_SHARES[-1]:.0%}", "early": f"{TARGET_SHARES[0]:.0%}"}


def _attacks(rows: list[dict[str, Any]], access: str) -> list[dict[str, Any]]:
    """Every attack of a class, its subjects side by side."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["access"] != access:
            continue
        empty = {"said": "–", "interval": "–", "gap": "–", "seconds": "–"}
        own = merged.setdefault(
            _key(row), row | dict.fromkeys(SUBJECTS, empty) | {"note": "", "seeds": 0, "last_step": 0}
        )
        lost = [f"{row[name]} {name}" for name in ("diverged", "skipped") if row[name]]
        said = ", ".join([percent(row["accuracy"])] * (row["accuracy"] is not None) + lost)
        own[row["subject"]] = {
            "said": said,
            "interval": _range(row["low"], row["high"]),
            "gap": signed(row["gap"]),
            "seconds": _seconds(row["seconds"], row["seconds_low"], row["seconds_high"]),
        }
        own["note"] = "; ".join(note for note in (own["note"], row["note"]) if note)
        own |= {name: max(own[name], row[name]) for name in ("seeds", "last_step")}
    return list(merged.values())


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("attacker", "access", "task", "layer", "precision"))


def _range(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}%"


def _seconds(mean: float, low: float | None, high: float | None) -> str:
    return f"{mean:,.1f}" if low is None or high is None else f"{mean:,.1f} ({low:,.1f} to {high:,.1f})"
