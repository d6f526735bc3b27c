"""Write the page of an audit from its audit.json, so that no figure on it is typed by hand.

python -m examples.audit_page runs/audit --output docs/results/audit.md --command "hf-immunize audit ..."
"""

import argparse
import base64
from datetime import date
from pathlib import Path

from hf_immunize.audit.figures import draw_headline
from hf_immunize.audit.names import CLASSES, label, percent, ratio, signed
from hf_immunize.audit.report import AuditReport
from hf_immunize.audit.statistics import TARGET_SHARES, summarize


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """A table of Markdown; every column but the first to the right."""
    if not rows:
        return []
    cells = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return [*("| " + " | ".join(row) + " |" for row in cells), ""]


def interval(low: float, high: float) -> str:
    return "–" if low != low else f"{100 * low:.1f} to {100 * high:.1f}"


def number(value: float, show=percent) -> str:
    return "–" if value is None or value != value else show(value)


def name_of(attacker: str, access: str, task: str, layer: str, precision: str) -> str:
    where = f", {layer}" if access == "any_layer" else ""
    return label(attacker) + where + (f", {precision}" if access == "head_input" and precision != "float64" else "")


def around(low: float, high: float) -> str:
    return "–" if low != low else f"{low:.0f} to {high:.0f}"


def sides(frame, subject: str):
    """Rows of a subject by what they are of."""
    own = frame[frame["subject"] == subject]
    return {(r["attacker"], r["access"], r["task"], r["layer"], r["precision"]): r for r in own.to_dict("records")}


def page(report: AuditReport, title: str, figure: str, command: str, note: str) -> str:
    data, tables = report.data, report.tables()
    harmful, machine = data.tasks["harmful"], data.machine
    budget = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in data.budget.items())
    ours, theirs = (sides(tables["attacks"], subject) for subject in ("immunized", "reference"))
    attacks = {
        access: [
            [
                name_of(*key),
                number(theirs.get(key, {}).get("accuracy")),
                number(row["accuracy"]) if row["accuracy"] == row["accuracy"] else (row["note"] or "–"),
                interval(row["low"], row["high"]),
                number(row["gap"], signed),
                f"{row['seconds']:,.1f}",
                str(row["seeds"]),
            ]
            for key, row in ours.items()
            if key[1:3] == (access, "harmful")
        ]
        for access in CLASSES
    }
    heads = ["before", "after", "interval, %", "gap, points", "seconds a run", "seeds"]
    lines = [f"# {title}", "", f"{date.today().isoformat()}. Written by `python -m examples.audit_page` from what"]
    lines += ["", "```bash", command.strip(), "```", ""] if command else [""]
    lines += [
        f"found: `{data.model}` against `{data.reference}`, preset {data.preset}, version {data.preset_version}; "
        f"{len(data.outcomes)} runs, {data.seconds / 60:.1f} minutes; "
        f"{', '.join(f'{name}: {value}' for name, value in machine.items())}.",
        "",
        f"{harmful.num_classes} harmful classes, {harmful.train_size:,} images to learn from, {harmful.test_size:,} "
        f"to measure on, chance {percent(harmful.chance)}. Budget: {budget}.",
        "",
        *([note, ""] if note else []),
        "## Verdict",
        "",
        *(f"- {one}" for one in report.verdict()),
        "",
        *(["Warnings:", "", *(f"- {one}" for one in data.warnings), ""] if data.warnings else []),
        f"![Worst case by class of attackers]({figure})",
        "",
    ]
    for access, name in CLASSES.items():
        if attacks[access]:
            lines += [f"## {name}", "", *table(["harmful task read by", *heads], attacks[access])]
    lines += ["## Fine-tuning, by budget", ""] if len(tables["fine_tuning"]) else []
    lines += table(
        ["operator", "steps, at most", "before", "after", "gap, points"],
        [
            [
                label(row["operator"]),
                f"{row['budget_steps']:,}",
                number(row["reference_accuracy"]),
                number(row["immunized_accuracy"]),
                number(row["gap"], signed),
            ]
            for row in tables["fine_tuning"].to_dict("records")
        ],
    )
    lines += table(
        ["relative fine-tuning deviation, %", "signed", "interval", "absolute", "interval"],
        [
            [
                label(row["operator"]),
                f"{row['signed']:+.0f}",
                around(row["signed_low"], row["signed_high"]),
                f"{row['absolute']:.0f}",
                around(row["absolute_low"], row["absolute_high"]),
            ]
            for row in tables["deviation"].to_dict("records")
        ],
    )
    lines += ["## Steps", "", f"To {TARGET_SHARES[-1]:.0%} of what the attacker reads before above chance.", ""]
    lines += table(
        ["attacker", "task", "to", "before", "after", "ratio", "interval"],
        [
            [
                label(row["attacker"]) + f", {row['precision']}" * (row["precision"] != "float64"),
                row["task"],
                percent(row["target"]),
                f"{row['reference_steps']:,.0f}",
                "not in " * row["is_bound"] + f"{row['immunized_steps']:,.0f}",
                "≥ " * row["is_bound"] + ratio(row["ratio"]),
                "–" if row["low"] != row["low"] else f"{ratio(row['low'])} to {ratio(row['high'])}",
            ]
            for row in tables["steps"].to_dict("records")
            if row["share"] == TARGET_SHARES[-1]
        ],
    )
    lines += ["## Other tasks", ""] if len(tables["tasks"]) else []
    lines += table(
        ["task", "class of attackers", "attacker", "before", "after", "gap, points"],
        [
            [
                row["task"],
                CLASSES[row["access"]],
                label(row["attacker"]),
                number(row["reference_accuracy"]),
                number(row["accuracy"]),
                number(row["gap"], signed),
            ]
            for row in tables["tasks"].to_dict("records")
        ],
    )
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="Folder that `hf-immunize audit` wrote.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--title", default="Audit")
    parser.add_argument("--command", default="", help="What was run, with paths that mean something to others.")
    parser.add_argument("--note", default="", help="A paragraph of what the figures need to be understood.")
    arguments = parser.parse_args()
    report = AuditReport.load(arguments.run)
    figure = arguments.output.parent / "figures" / f"{arguments.output.stem}.svg"
    figure.parent.mkdir(parents=True, exist_ok=True)
    picture = draw_headline(summarize(report.data), report.data.tasks["harmful"].chance)
    if picture is not None:
        figure.write_bytes(base64.b64decode(picture.uri.split(",", 1)[1]))
    text = page(report, arguments.title, f"figures/{figure.name}", arguments.command, arguments.note)
    arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
