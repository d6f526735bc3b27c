"""What a step costs with the objectives and options that no ratio is asked of, and with a queue."""

import copy
import tempfile
import time
from statistics import median
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from benchmarks.training_step import ASKED, CALLBACK, COLUMNS, QUIET, SIDE, STATED, PlainTrainer, rows, step_table
from hf_immunize import ImmunizationArguments, ImmunizationTrainer
from hf_immunize.vision.scope import modules_in_eval, select_trainable


QUEUE = 2048
TURNS = 5


def wide_trainers(folder: str, options: dict[str, Any]) -> dict[str, Trainer]:
    """On a ViT-B/8 at 64 px (D = 768): the plain one, and ours without and with a full queue."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=64, patch_size=8, num_labels=10))
    plain = PlainTrainer(copy.deepcopy(model), TrainingArguments(folder, **QUIET))
    plain.still = modules_in_eval(plain.model, select_trainable(plain.model, "last_stage"))
    trainers: dict[str, Trainer] = {"plain": plain}
    for name, queue_size in (("batch", 0), ("queue", QUEUE)):
        images = rows(2, seed=1)
        arguments = ImmunizationArguments(
            folder, per_device_train_batch_size=2, queue_size=queue_size, **QUIET, **options
        )
        trainer = ImmunizationTrainer(copy.deepcopy(model), arguments, train_dataset=images, harmful_dataset=images)
        for queue in trainer._step._queues.values():  # as it is once the run is under way
            queue.push(1 + torch.randn(QUEUE, 768))
        trainers[name] = trainer
    return trainers


class Clock:
    """Seconds that calls of some methods take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, thing: Any, method: str) -> None:
        function = getattr(thing, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(thing, method, timed)


def queue_row(objective: str) -> list[str]:
    """What a queue touches is timed inside the steps: whole steps differ by more than a queue adds."""
    pixels = torch.randn(2 * SIDE, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(2 * SIDE) % 10
    sides = ("benign", slice(SIDE)), ("harmful", slice(SIDE, None))
    pair = {side: {"pixel_values": pixels[part], "labels": labels[part]} for side, part in sides}
    steps: dict[str, list[float]] = {}
    parts: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainers = wide_trainers(folder, ASKED[objective])
        clocks = {name: Clock() for name in ("batch", "queue")}
        for name, clock in clocks.items():
            step = trainers[name]._step
            clock.watch(step, "_terms")
            clock.watch(step.weighting, "weigh")  # the gradients with respect to the features
            for queue in step._queues.values():
                clock.watch(queue, "push")
        for turn in range(TURNS + 1):
            for name, trainer in trainers.items():
                batch = {"pixel_values": pixels, "labels": labels} if name == "plain" else copy.deepcopy(pair)
                trainer.current_gradient_accumulation_steps = 1  # what `train` sets
                start = time.perf_counter()
                trainer.training_step(trainer.model, batch)
                if turn:  # the first pays for allocations
                    steps.setdefault(name, []).append(time.perf_counter() - start)
                    if name in clocks:
                        parts.setdefault(name, []).append(clocks[name].seconds)
                if name in clocks:
                    clocks[name].seconds = 0.0
                trainer.model.zero_grad()
    plain, batch_part, queue_part = median(steps["plain"]), median(parts["batch"]), median(parts["queue"])
    times = [f"{1e3 * seconds:.0f}" for seconds in (plain, batch_part, queue_part)]
    return [objective, *times, f"{(queue_part - batch_part) / plain:+.3f}", "≤ 0.05"]


def run() -> dict[str, Any]:
    table, _ = step_table({**STATED, CALLBACK: None}, rounds=2)
    return {
        "summary": (
            f"As in training_step, {SIDE} benign + {SIDE} harmful images. The callback's Trainer sees the benign half "
            "alone, and the callback both. A queue touches the terms and their gradients on the features alone; these "
            f"are timed inside steps taken in turns, medians of {TURNS}, and set against the plain Trainer's step."
        ),
        "tables": [
            {"title": "Whole step", "columns": COLUMNS, "rows": table},
            {
                "title": f"A queue of {QUEUE:,} rows at D = 768 (ViT-B/8 at 64 px)",
                "columns": ["objective", "Trainer's step, ms", "terms, ms", "with queue, ms", "queue adds", "wanted"],
                "rows": [queue_row(objective) for objective in ("concentration", "kappa")],
            },
        ],
    }
