"""``python -m benchmarks [part ...]``: run parts, print their tables, write results/<part>.json and the README."""

import argparse
import importlib
import json
import re
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.common import describe_machine


# Name -> module with `run() -> {"summary": str, "tables": [{"title", "columns", "rows"}], ...}`; a part is one line.
PARTS = {
    "regularizers": "benchmarks.regularizers",
    "streaming": "benchmarks.streaming",
    "training_step": "benchmarks.training_step",
    "training_options": "benchmarks.training_options",
    "overhead": "benchmarks.overhead",
    "evaluation": "benchmarks.evaluation",
    "linear_step": "benchmarks.linear_step",
    "trunk": "benchmarks.trunk",
    "gpu": "benchmarks.gpu",
}
HERE = Path(__file__).parent


def render_table(table: dict[str, Any]) -> str:
    """A table in Markdown, aligned so that it reads in a terminal too."""
    rows = [table["columns"], *[[str(cell) for cell in row] for row in table["rows"]]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return f"{table['title']}\n\n" + "\n".join(lines)


def render_part(result: dict[str, Any]) -> str:
    """A part's section: when and where it ran, what it says, its tables."""
    head = f"{result['date']}, {result['machine']}."
    return "\n\n".join([head, result["summary"], *[render_table(table) for table in result["tables"]]])


def rewrite_section(readme: Path, part: str, text: str) -> None:
    """Put the text between the part's markers, which are added at the end where they are missing."""
    content = readme.read_text(encoding="utf-8")
    section = f"<!-- part:{part} -->\n\n{text}\n\n<!-- /part:{part} -->"
    pattern = re.compile(rf"<!-- part:{part} -->.*?<!-- /part:{part} -->", re.DOTALL)
    if pattern.search(content):
        content = pattern.sub(lambda _: section, content)
    else:
        content = f"{content.rstrip()}\n\n## {part}\n\n{section}\n"
    readme.write_text(content, encoding="utf-8")


def main() -> None:
    """Run the parts named on the command line, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"out of {', '.join(PARTS)}; all by default")
    parts = parser.parse_args().parts or list(PARTS)
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"expected parts out of {', '.join(PARTS)}, found {', '.join(unknown)}")
    (HERE / "results").mkdir(exist_ok=True)
    for part in parts:
        result = {"date": date.today().isoformat(), "machine": describe_machine()}
        result |= importlib.import_module(PARTS[part]).run()
        text = render_part(result)
        print(f"\n== {part} ==\n\n{text}", flush=True)
        path = HERE / "results" / f"{part}.json"
        path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        rewrite_section(HERE / "README.md", part, text)


if __name__ == "__main__":
    main()
