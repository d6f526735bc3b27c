"""What part of a step of a ViT-B-sized model is spent on the regularizers: forward, and backward to the features.

After each step of the Trainer, the regularizers run once more by themselves on features as that step had them, and
find the caches as the network's work left them: so both times are of the same minute and of the same state.
"""

import tempfile
import time
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.training_step import QUIET, SIDE, TASK, rows, wide_vit
from hf_immunize import ImmunizationArguments, ImmunizationTrainer
from hf_immunize.training.objectives import OBJECTIVES, Side


STEPS = 4
OBJECTIVE_NAMES = ("concentration", "kappa", "r_ill", "opt_kappa")


class Clock(TrainerCallback):
    """Seconds of each step and of its regularizers; the first step pays for allocations and is left out."""

    def __init__(self, objective: str) -> None:
        self.objective = OBJECTIVES[objective]
        self.steps: list[float] = []
        self.regularizers: list[float] = []
        self.features = torch.empty(0)

    def keep(self, head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.features = inputs[0].detach()

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        whole = time.perf_counter() - self.started
        start = time.perf_counter()
        benign, harmful = (part.clone().requires_grad_() for part in self.features.split(SIDE))
        terms = self.objective(Side(benign), Side(harmful), False)
        for side, features in ((terms.benign, benign), (terms.harmful, harmful)):
            for value in side.values():
                torch.autograd.grad(value, features)
        spent = time.perf_counter() - start
        if state.global_step > 1:
            self.steps.append(whole)
            self.regularizers.append(spent)


def share(objective: str, model: torch.nn.Module) -> tuple[float, float]:
    """Median seconds of the regularizers and of a step."""
    images, clock = rows(2 * SIDE * STEPS, seed=1), Clock(objective)
    with tempfile.TemporaryDirectory() as folder:
        options = QUIET | TASK | {"max_steps": STEPS, "objective": objective}
        trainer = ImmunizationTrainer(
            model,
            ImmunizationArguments(folder, per_device_train_batch_size=SIDE, **options),
            train_dataset=images[::2],
            harmful_dataset=images[1::2],
            callbacks=[clock],
        )
        hook = trainer._step.head.register_forward_pre_hook(clock.keep)
        trainer.train()
        hook.remove()
    return median(clock.regularizers), median(clock.steps)


def run() -> dict[str, Any]:
    table, shares = [], {}
    for objective in OBJECTIVE_NAMES:
        spent, whole = share(objective, wide_vit())
        shares[objective] = spent / whole
        table.append([objective, f"{1e3 * spent:.2f}", f"{1e3 * whole:.0f}", f"{shares[objective]:.2%}"])
    return {
        "summary": (
            f"ViT-B with patches of 8 at 64 px (D = 768, 65 tokens), {SIDE} benign + {SIDE} harmful images a step, "
            f"the last stage moving: the regularizers are at most {max(shares.values()):.2%} of a step."
        ),
        "tables": [
            {
                "title": "Regularizers of both sides, forward and backward to the features",
                "columns": ["objective", "regularizers, ms", "whole step, ms", "share"],
                "rows": table,
            }
        ],
        "share": shares,
    }
