"""One training step of ImmunizationTrainer against one of the plain Trainer: same images, same parameters moving.

Both see 32 + 32 images in one forward pass, move the last stage, and keep BatchNorm statistics frozen. A step is what
lies between `on_step_begin` and `on_step_end`: forward, backward, clipping, optimizer; loading data is left out.
"""

import copy
import tempfile
import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_immunize import ImmunizationArguments, ImmunizationTrainer
from hf_immunize.training.objectives import Side, kappa
from hf_immunize.training.step import weigh
from hf_immunize.vision.scope import modules_in_eval, select_trainable


SIDE = 32
STEPS = 6
ROUNDS = 7
QUIET: dict[str, Any] = {
    "max_steps": STEPS,
    "learning_rate": 1e-4,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
    "use_cpu": True,
}


class StepClock(TrainerCallback):
    """Seconds of every step but the first, which pays for allocations."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 1:
            self.seconds.append(time.perf_counter() - self.started)


class PlainTrainer(Trainer):
    """The plain Trainer with the same modules kept in eval mode."""

    still: list[torch.nn.Module]

    def compute_loss(self, *args, **kwargs):
        for module in self.still:
            module.training = False
        return super().compute_loss(*args, **kwargs)


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    vit = ViTConfig(
        image_size=64,
        patch_size=8,
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
    )
    resnet = ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic")
    for config in (vit, resnet):
        config.num_labels = 10
    return {
        "ViT-tiny (D = 192), 64 px": ViTForImageClassification(vit),
        "ResNet-18 (D = 512), 64 px": ResNetForImageClassification(resnet),
    }


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(3, 64, 64, generator=generator), "labels": i % 10} for i in range(count)]


def plain_steps(model: torch.nn.Module, images: list[dict[str, Any]], folder: str) -> list[float]:
    model, clock = copy.deepcopy(model), StepClock()
    arguments = TrainingArguments(folder, per_device_train_batch_size=2 * SIDE, **QUIET)
    trainer = PlainTrainer(model, arguments, train_dataset=images, callbacks=[clock])
    trainer.still = modules_in_eval(model, select_trainable(model, "last_stage"))
    trainer.train()
    return clock.seconds


def immunizing_steps(model: torch.nn.Module, images: list[dict[str, Any]], folder: str) -> list[float]:
    clock = StepClock()
    trainer = ImmunizationTrainer(
        copy.deepcopy(model),
        ImmunizationArguments(folder, per_device_train_batch_size=SIDE, **QUIET),
        train_dataset=images[::2],
        harmful_dataset=images[1::2],
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds


def parts(dim: int) -> dict[str, float]:
    """Milliseconds of the regularizers' values, of the weights by gradient norm, and of their backward pass."""
    torch.manual_seed(0)
    head = torch.nn.Linear(dim, 10)
    labels = torch.arange(SIDE) % 10
    spent: dict[str, list[float]] = {"regularizers": [], "weights": [], "backward": []}
    for _ in range(30):
        features = (1 + torch.randn(2 * SIDE, dim)).requires_grad_()
        benign, harmful = Side(features[:SIDE]), Side(features[SIDE:])
        loss = torch.nn.functional.cross_entropy(head(features)[:SIDE], labels)
        times = [time.perf_counter()]
        terms = kappa(benign, harmful)
        times.append(time.perf_counter())
        weights: dict[str, str | float] = {"benign": "auto", "harmful": "auto"}
        total, _ = weigh(loss, benign, harmful, terms, weights, 0.3, features)
        times.append(time.perf_counter())
        (total - loss).backward()
        times.append(time.perf_counter())
        for name, (start, end) in zip(spent, pairwise(times), strict=True):
            spent[name].append(1e3 * (end - start))
    return {name: median(values) for name, values in spent.items()}


def run() -> dict[str, Any]:
    table, shares = [], []
    for name, model in models().items():
        images = rows(2 * SIDE * STEPS, seed=1)
        plain, ours = [], []
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(ROUNDS):  # in turns, so that a slow minute of the machine falls on both
                plain += plain_steps(model, images, folder)
                ours += immunizing_steps(model, images, folder)
        before, after = 1e3 * median(plain), 1e3 * median(ours)
        table.append([name, f"{before:.1f}", f"{after:.1f}", f"{after / before:.3f}"])
        dim = 192 if "ViT" in name else 512
        shares.append([name, *(f"{ms:.2f} ({100 * ms / before:.1f} %)" for ms in parts(dim).values())])
    return {
        "summary": (
            f"A step on {SIDE} benign + {SIDE} harmful images against the plain Trainer's on the same "
            f"{2 * SIDE}, auto weights; medians of {ROUNDS * (STEPS - 1)} steps taken in turns. Wanted: a ratio of at "
            "most 1.10."
        ),
        "tables": [
            {"title": "Whole step", "columns": ["model", "Trainer, ms", "ours, ms", "ratio"], "rows": table},
            {
                "title": "Parts of the overhead, each alone (in per cent of the plain step)",
                "columns": ["model", "regularizers, ms", "weights by gradient norm, ms", "their backward, ms"],
                "rows": shares,
            },
        ],
    }
