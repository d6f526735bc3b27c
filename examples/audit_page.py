"""Write the page of an audit from its audit.json, so that no figure on it is typed by hand.

python -m examples.audit_page runs/audit --output docs/results/audit.md --command "hf-immunize audit ..."
"""

import argparse
import base64
from datetime import date
from pathlib import Path

from hf_immunize.audit.figures import draw_all
from hf_immunize.audit.names import CLASSES, QUESTION, label, percent, ratio, render, share, signed, source, spread
from hf_immunize.audit.names import removed as gone
from hf_immunize.audit.report import AuditReport
from hf_immunize.audit.statistics import TARGET_SHARE


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """A table of Markdown; every column but the first to the right."""
    if not rows:
        return []
    cells = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return [*("| " + " | ".join(row) + " |" for row in cells), ""]


def number(value: float | None, show=percent) -> str:
    return "–" if value is None or value != value else show(value)


def attacks(frame) -> dict[str, list[list[str]]]:
    """Class of attackers to its lines of the harmful task."""
    found: dict[str, list[list[str]]] = {access: [] for access in CLASSES}
    for row in frame[(frame["subject"] == "immunized") & (frame["task"] == "harmful")].to_dict("records"):
        layer = f", {row['layer']}" * (row["access"] == "any_layer")
        found[row["access"]].append(
            [
                label(row["attacker"]) + layer,
                number(row["reference_accuracy"]),
                number(row["accuracy"]) if row["accuracy"] == row["accuracy"] else (row["note"] or "–"),
                spread(row["low"], row["high"]),
                number(row["gap"], signed),
                f"{row['seconds']:,.1f}",
                str(row["seeds"]),
            ]
        )
    return found


def removed(frame) -> list[list[str]]:
    """Class of attackers to what is removed of the head start."""
    known = frame[frame["head_start"].notna()].to_dict("records")
    return [
        [
            CLASSES[row["access"]],
            gone(row["removed"]) if row["removed_claimed"] else "–",
            spread(row["removed_low"], row["removed_high"], share) if row["removed_claimed"] else "–",
            signed(row["head_start"]),
            *(percent(row[name]) for name in ("reference_accuracy", "accuracy", "random_accuracy")),
            f"{label(row['random_attacker'])} from {source(row['random_layer'])}",
        ]
        for row in known
    ]


def page(report: AuditReport, title: str, figure: str, command: str, note: str) -> str:
    data, harmful, tables = report.data, report.data.tasks["harmful"], report.tables()
    steps, tasks = (tables[name].to_dict("records") for name in ("steps", "tasks"))
    budget = " ".join(render("budget.html.jinja", data=data).split())
    sides = [("reference_accuracy", percent), ("accuracy", percent), ("gap", signed)]
    lines = [f"# {title}", "", f"{date.today().isoformat()}. Written by `python -m examples.audit_page` from what"]
    lines += ["", "```bash", command.strip(), "```", ""] if command else [""]
    lines += [
        f"found: `{data.model}` against `{data.reference}`, preset {data.preset}, version {data.preset_version}; "
        f"{len(data.outcomes)} runs, {data.seconds / 60:.1f} minutes; "
        f"{', '.join(f'{name}: {value}' for name, value in data.machine.items())}.",
        "",
        f"{harmful.num_classes} harmful classes, {harmful.train_size:,} images to learn from, {harmful.test_size:,} "
        f"to measure on, chance {percent(harmful.chance)}. {budget}",
        "",
        *([note, ""] if note else []),
        f"**{QUESTION}** {report.answer()}",
        "",
        "## In detail",
        "",
        *(f"- {one}" for one in report.verdict()),
        "",
        *(["Warnings:", "", *(f"- {one}" for one in data.warnings), ""] if data.warnings else []),
        f"![What the strongest attackers reach]({figure})",
        "",
    ]
    heads = [
        "",
        "of the head start gone",
        "interval",
        "head start, points",
        "before",
        "after",
        "without its weights",
        "by",
    ]
    lines += ["## Head start", "", *table(heads, rows)] if (rows := removed(tables["headline"])) else []
    heads = ["harmful task learnt by", "before", "after", "interval", "points lost", "seconds a run", "seeds"]
    for access, rows in attacks(tables["attacks"]).items():
        lines += [f"## {CLASSES[access]}", "", *table(heads, rows)] if rows else []
    lines += [
        "## Steps",
        "",
        f"Until an attacker has {TARGET_SHARE:.0%} of what it reached above chance before immunization.",
        "",
    ]
    lines += table(
        ["attacker", "task", "to", "before", "after", "ratio", "interval"],
        [
            [
                label(row["attacker"]),
                row["task"],
                percent(row["target"]),
                f"{row['reference_steps']:,.0f}",
                "more than " * row["is_bound"] + f"{row['immunized_steps']:,.0f}",
                # The start takes the whole budget too.
                number(row["ratio"], lambda value, row=row: "≥ " * row["is_bound"] + ratio(value)),
                spread(row["low"], row["high"], ratio),
            ]
            for row in steps
        ],
    )
    lines += ["## Other tasks", ""] if tasks else []
    lines += table(
        ["task", "class of attackers", "attacker", "before", "after", "points lost"],
        [
            [row["task"], CLASSES[row["access"]], label(row["attacker"])]
            + [number(row[name], show) for name, show in sides]
            for row in tasks
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
    pictures = {picture.section: picture for picture in draw_all(report.data, report.tables())}
    if picture := pictures.get("headline"):
        figure.write_bytes(base64.b64decode(picture.uri.split(",", 1)[1]))
    text = page(report, arguments.title, f"figures/{figure.name}", arguments.command, arguments.note)
    arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
