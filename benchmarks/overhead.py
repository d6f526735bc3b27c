"""What part of a step of a ViT-B-sized model is spent on the regularizers: forward, and backward to the features.

After each step of the Trainer, the regularizers run once more by themselves on features as that step had them, and
find the caches as the network's work left them: so both times are of the same minute and of the same state.
"""

import tempfile
import time
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification

from benchmarks.training_step import QUIET, SIDE, TASK, rows
from hf_immunize import ImmunizationArguments, ImmunizationTrainer
from hf_immunize.training.objectives import OBJECTIVES, Side


STEPS = 6
NAMES = ("concentration", "kappa", "r_ill", "opt_kappa")


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Seconds by the clock, and of this process's processors."""
    wall, processor = now()
    return wall - start[0], processor - start[1]


class Clock(TrainerCallback):
    """Seconds of each step, and of each objective's regularizers after it; the first step pays for allocations."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self.regularizers: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
        self.features = torch.empty(0)

    def keep(self, head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.features = inputs[0].detach()

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = now()

    def on_step_end(self, args, state, control, **kwargs):
        whole = since(self.started)
        spent = {}
        # Each in turn comes first, where the caches hold what the network left there.
        for name in NAMES[state.global_step % len(NAMES) :] + NAMES[: state.global_step % len(NAMES)]:
            start = now()
            benign, harmful = (part.clone().requires_grad_() for part in self.features.split(SIDE))
            terms = OBJECTIVES[name]()(Side(benign), Side(harmful))
            for side, features in ((terms.benign, benign), (terms.harmful, harmful)):
                for value in side.values():
                    torch.autograd.grad(value, features)
            spent[name] = since(start)
        if state.global_step > 1:
            self.steps.append(whole)
            for name, seconds in spent.items():
                self.regularizers[name].append(seconds)


def run() -> dict[str, Any]:
    """Medians over the steps of one run, and the shares."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=64, patch_size=8, num_labels=10))
    images, clock = rows(2 * SIDE * STEPS, seed=1), Clock()
    with tempfile.TemporaryDirectory() as folder:
        options = QUIET | TASK | {"max_steps": STEPS, "objective": "concentration"}
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
    whole = [median(each) for each in zip(*clock.steps, strict=True)]
    table, shares = [], {}
    for name, seconds in clock.regularizers.items():
        spent = [median(each) for each in zip(*seconds, strict=True)]
        shares[name] = [part / all_of_it for part, all_of_it in zip(spent, whole, strict=True)]
        table.append([name, f"{1e3 * spent[0]:.2f}", *[f"{share:.3%}" for share in shares[name]]])
    worst = [max(each) for each in zip(*shares.values(), strict=True)]
    return {
        "summary": (
            f"ViT-B with patches of 8 at 64 px (D = 768, 65 tokens), {SIDE} benign + {SIDE} harmful images a step, "
            f"the last stage moving, medians of {STEPS - 1} steps of {whole[0]:.2f} s: the regularizers are at most "
            f"{worst[0]:.3%} of a step by the clock, {worst[1]:.3%} by processor time. With automatic weights each "
            "backward to the features runs twice."
        ),
        "tables": [
            {
                "title": "Regularizers of both sides, forward and backward to the features",
                "columns": ["objective", "ms", "share of a step", "CPU"],
                "rows": table,
            }
        ],
        "step_seconds": whole[0],
        "share": shares,
    }
