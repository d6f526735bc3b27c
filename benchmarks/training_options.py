"""What a step costs with the objectives and options that no ratio is asked of, and with a queue."""

from typing import Any

from benchmarks.training_step import ASKED, CALLBACK, COLUMNS, QUEUE, SIDE, STATED, measured, step_table, wide_vit


def run() -> dict[str, Any]:
    table, _ = step_table({**STATED, CALLBACK: None}, rounds=2)
    queued = []
    for objective in ("concentration", "kappa"):
        options = ASKED[objective]
        times = measured(wide_vit(), {"batch": options, "queue": options | {"queue_size": QUEUE}}, rounds=1)
        added = (times["queue"] - times["batch"]) / times["plain"]
        cells = [f"{1e3 * times[which]:.0f}" for which in ("plain", "batch", "queue")]
        queued.append([objective, *cells, f"{added:+.3f}", "≤ 0.05"])
    return {
        "summary": (
            f"As in training_step, {SIDE} benign + {SIDE} harmful images. The callback's Trainer sees the benign half "
            "alone, and the callback both."
        ),
        "tables": [
            {"title": "Whole step", "columns": COLUMNS, "rows": table},
            {
                "title": f"A queue of {QUEUE:,} rows at D = 768 (ViT-B/8 at 64 px)",
                "columns": ["objective", "Trainer, ms", "batch alone, ms", "queue, ms", "queue adds", "wanted"],
                "rows": queued,
            },
        ],
    }
