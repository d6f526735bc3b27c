"""A default step on stored activations: its median time, and how much of it each part takes.

    python -m benchmarks.stored_step START --benign DATA --harmful DATA

320 images of each side, 64 a step, and as many benign ones to distil on, half as many a step. `PYTHONPATH=OTHER python
benchmarks/stored_step.py …` measures another commit's checkout with the same file; take turns, and compare ratios.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import datasets
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainerCallback

from hf_immunize import ImmunizationArguments, ImmunizationTrainer


WARM = 8  # of two epochs' first steps, which fill what is kept


class Clock(TrainerCallback):
    """Seconds of every step but the first, and of the network's two passes in it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.passes: dict[str, list[float]] = {"forward": [], "backward": []}
        self.within = dict.fromkeys(self.passes, 0.0)

    def on_step_begin(self, args, state, control, **kwargs):
        self.started, self.within = time.perf_counter(), dict.fromkeys(self.passes, 0.0)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > WARM:
            self.steps.append(time.perf_counter() - self.started)
            for name, seconds in self.within.items():
                self.passes[name].append(seconds)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, its time added to that of a pass."""

        @functools.wraps(call)
        def run(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*given, **named)
            finally:
                self.within[name] += time.perf_counter() - started

        return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start")
    parser.add_argument("--benign", required=True)
    parser.add_argument("--harmful", required=True)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    torch.manual_seed(0)
    sides = {
        side: datasets.load_dataset(getattr(given, side), split="train").select(range(320))
        for side in ("benign", "harmful")
    }
    clock = Clock()
    options = {"max_steps": given.steps, "per_device_train_batch_size": 64, "cache_trunk": "float32", "use_cpu": True}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    with tempfile.TemporaryDirectory() as folder:
        trainer = ImmunizationTrainer(
            AutoModelForImageClassification.from_pretrained(given.start),
            ImmunizationArguments(folder, trunk_cache_dir=f"{folder}/trunk", **options, **quiet),  # type: ignore[arg-type]
            train_dataset=sides["benign"],
            harmful_dataset=sides["harmful"],
            distillation_dataset=sides["benign"],
            processing_class=AutoImageProcessor.from_pretrained(given.start),
            callbacks=[clock],
        )
        trainer.accelerator.backward = clock.timed("backward", trainer.accelerator.backward)
        trainer.model.forward = clock.timed("forward", trainer.model.forward)
        trainer.train()
    step = statistics.median(clock.steps)
    shares = ", ".join(f"{statistics.median(one) / step:.0%} {name}" for name, one in clock.passes.items())
    print(f"a step: {1e3 * step:,.0f} ms (median of {len(clock.steps)}), of which the network's passes: {shares}")


if __name__ == "__main__":
    main()
