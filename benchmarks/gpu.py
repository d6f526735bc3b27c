"""Training steps on a GPU: ViT-B/16 and ResNet-50 sized models, bf16, 256 benign + 256 harmful images.

Time and peak memory against the plain Trainer's step on the same 512 images, and how often the host waits for the
device within a step, counted in a profile. Without a GPU the rows stay empty.
"""

import copy
import tempfile
import time
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import Dataset
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.training_step import ASKED, TASK, PlainTrainer
from hf_immunize import ImmunizationArguments, ImmunizationTrainer
from hf_immunize.vision.scope import modules_in_eval, select_trainable


SIDE, SIZE, STEPS, ROUNDS = 256, 224, 8, 3
WANTED_TIME, WANTED_MEMORY = 1.03, 1.05
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
VARIANTS = {**ASKED, "imma": TASK | {"objective": "imma"}}
COLUMNS = ["model", "step", "ms", "ratio", "wanted", "peak memory, GiB", "ratio", "wanted", "waits of the host a step"]


class Images(Dataset):
    """A few random images, again and again."""

    def __init__(self, count: int, size: int, seed: int, kept: int = 64) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.pixels, self.count = torch.randn(min(count, kept), 3, size, size, generator=generator), count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index % len(self.pixels)], "labels": index % 10}


class Clock(TrainerCallback):
    """Seconds of every step but the first two, the device's work included; a profile of the last."""

    def __init__(self, device: torch.device, last: int) -> None:
        self.device, self.last = device, last
        self.seconds: list[float] = []
        self.waits = 0
        self.profile: Any = None

    def _done(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def on_step_begin(self, args, state, control, **kwargs):
        self._done()
        if state.global_step + 1 == self.last and self.device.type == "cuda":
            self.profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self.profile.__enter__()
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if self.profile is not None:
            # Closed before the clock waits itself.
            self.profile.__exit__(None, None, None)
            self.waits = sum(one.count for one in self.profile.key_averages() if one.key in WAITS)
            return
        self._done()
        if state.global_step > 2:
            self.seconds.append(time.perf_counter() - self.started)


def models() -> dict[str, torch.nn.Module]:
    """Of these sizes, with random weights."""
    torch.manual_seed(0)
    return {
        "ViT-B/16": ViTForImageClassification(ViTConfig(num_labels=10)),
        "ResNet-50": ResNetForImageClassification(ResNetConfig(num_labels=10)),
    }


def steps(
    model: torch.nn.Module, options: dict[str, Any] | None, device: torch.device, side: int, size: int, count: int
) -> dict[str, float]:
    """Median seconds, peak bytes and waits of a step; of the plain Trainer where there are no options."""
    model, clock = copy.deepcopy(model), Clock(device, count)
    quiet: dict[str, Any] = {
        "max_steps": count,
        "learning_rate": 1e-4,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "bf16": device.type == "cuda",
        "use_cpu": device.type == "cpu",
    }
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder:
        if options is None:
            arguments = TrainingArguments(folder, per_device_train_batch_size=2 * side, **quiet)
            plain = PlainTrainer(model, arguments, train_dataset=Images(2 * side * count, size, 1), callbacks=[clock])
            plain.still = modules_in_eval(model, select_trainable(model, "last_stage"))
            plain.train()
        else:
            ImmunizationTrainer(
                model,
                ImmunizationArguments(folder, per_device_train_batch_size=side, **quiet, **options),
                train_dataset=Images(side * count, size, 1),
                harmful_dataset=Images(side * count, size, 2),
                callbacks=[clock],
            ).train()
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"seconds": median(clock.seconds), "memory": memory, "waits": clock.waits}


def compare(
    built: dict[str, torch.nn.Module], device: torch.device, side: int, size: int, count: int, rounds: int
) -> list[list[str]]:
    """Rows of the table, each variant's rounds taken in turns with the plain Trainer's."""
    table = []
    for name, model in built.items():
        found: dict[str, list[dict[str, float]]] = {variant: [] for variant in ("plain", *VARIANTS)}
        for _ in range(rounds):
            for variant, taken in found.items():
                taken.append(steps(model, VARIANTS.get(variant), device, side, size, count))
        plain = {key: median(one[key] for one in found["plain"]) for key in ("seconds", "memory")}
        for variant, taken in found.items():
            seconds, memory = (median(one[key] for one in taken) for key in ("seconds", "memory"))
            asked = variant in ASKED
            table.append(
                [
                    name,
                    variant,
                    f"{1e3 * seconds:.1f}",
                    f"{seconds / plain['seconds']:.3f}",
                    f"≤ {WANTED_TIME}" if asked else "",
                    f"{memory / 2**30:.2f}" if memory else "",
                    f"{memory / plain['memory']:.3f}" if memory else "",
                    f"≤ {WANTED_MEMORY}" if asked else "",
                    f"{max(one['waits'] for one in taken):.0f}" if memory else "",
                ]
            )
    return table


def run() -> dict[str, Any]:
    """The table; empty without a GPU."""
    setting = (
        f"{SIDE} benign + {SIDE} harmful images of {SIZE} px in bf16 against the plain Trainer's step on the same "
        f"{2 * SIDE}, the last stage moving, BatchNorm frozen, auto weights, the task's own benign loss; medians of "
        f"{ROUNDS} rounds of {STEPS - 3} steps taken in turns, and the waits of the host in one profiled step."
    )
    if not torch.cuda.is_available():
        empty = [[name, variant, *[""] * 7] for name in ("ViT-B/16", "ResNet-50") for variant in ("plain", *VARIANTS)]
        return {
            "summary": f"No GPU was at hand: nothing is measured, and the rows are empty. {setting}",
            "tables": [{"title": "A step on a GPU", "columns": COLUMNS, "rows": empty}],
        }
    device = torch.device("cuda")
    table = compare(models(), device, SIDE, SIZE, STEPS, ROUNDS)
    return {
        "summary": f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}. {setting}",
        "tables": [{"title": "A step on a GPU", "columns": COLUMNS, "rows": table}],
    }
