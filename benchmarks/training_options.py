"""What a step costs with what no ratio is asked of: the defaults, IMMA, and the callback beside another Trainer."""

from typing import Any

from benchmarks.training_step import CALLBACK, COLUMNS, SIDE, STATED, step_table


def run() -> dict[str, Any]:
    table, _ = step_table({**STATED, CALLBACK: None}, rounds=2)
    return {
        "summary": (
            f"As in training_step, {SIDE} benign + {SIDE} harmful images. The callback's Trainer sees the benign half "
            "alone, and the callback both."
        ),
        "tables": [{"title": "Whole step", "columns": COLUMNS, "rows": table}],
    }
