"""The second epoch of MobileNetV2's last stage with a cached trunk against the same epoch on images.

`ImmunizationTrainer` at its defaults but for the number of images; full-size MobileNetV2 with random weights, on which
speed does not depend. An epoch is what lies between `on_epoch_begin` and `on_epoch_end`, data loading included: images
that are ready as tensors, which favours the run on images, and JPEG files that are decoded, resized and cropped.
"""

import io
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, TrainerCallback
from transformers import MobileNetV2ImageProcessorPil as Processor

from hf_immunize import ImmunizationArguments, ImmunizationTrainer


SIZE = 160
SIDE = 32
IMAGES = 64
ROUNDS = 2
KINDS = ("no", "float32")


class EpochClock(TrainerCallback):
    """Seconds of every epoch, by the clock and of this process's processor time."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.processor: list[float] = []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter(), time.process_time()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.started[0])
        self.processor.append(time.process_time() - self.started[1])


def model() -> MobileNetV2ForImageClassification:
    torch.manual_seed(0)
    built = MobileNetV2ForImageClassification(
        MobileNetV2Config(num_labels=1000, tf_padding=False, layer_norm_eps=1e-5)
    )
    # With the statistics of an untrained BatchNorm, features vanish, and R_ill of them is infinite.
    norms = [module for module in built.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        built.train()(pixel_values=torch.randn(8, 3, SIZE, SIZE))
    return built


def processor() -> Processor:
    return Processor(
        do_resize=True,
        size={"shortest_edge": round(SIZE * 256 / 224)},
        do_center_crop=True,
        crop_size={"height": SIZE, "width": SIZE},
    )


def photographs(seed: int) -> datasets.Dataset:
    """JPEG files of 500 × 375 pixels, smooth as photographs are."""
    generator = np.random.default_rng(seed)
    encoded = []
    for _ in range(IMAGES):
        rough = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        file = io.BytesIO()
        rough.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG")
        encoded.append({"bytes": file.getvalue(), "path": None})
    return datasets.Dataset.from_dict(
        {"image": encoded, "labels": list(range(IMAGES))},
        features=datasets.Features({"image": datasets.Image(), "labels": datasets.Value("int64")}),
    )


def tensors(seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"pixel_values": torch.randn(3, SIZE, SIZE, generator=generator), "labels": label} for label in range(IMAGES)
    ]


def epochs(kind: str, benign: Any, harmful: Any) -> tuple[EpochClock, float, int]:
    """Seconds of two epochs, of all before the first, and bytes on disk."""
    clock = EpochClock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = ImmunizationArguments(
            folder,
            num_train_epochs=2,
            per_device_train_batch_size=SIDE,
            learning_rate=1e-5,
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            use_cpu=True,
            cache_trunk=kind,
        )
        trainer = ImmunizationTrainer(
            model(),
            arguments,
            train_dataset=benign,
            harmful_dataset=harmful,
            processing_class=processor(),
            callbacks=[clock],
        )
        start = time.perf_counter()
        trainer.train()
        before = time.perf_counter() - start - sum(clock.seconds)
        size = sum(file.stat().st_size for file in Path(folder, "_trunk").rglob("*.arrow"))
    return clock, before, size


def run() -> dict[str, Any]:
    table = []
    for name, make in (("tensors", tensors), ("JPEG files", photographs)):
        benign, harmful = make(1), make(2)
        found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in KINDS}
        sizes = {}
        for _ in range(ROUNDS):  # in turns, so that a slow minute of the machine falls on all
            for kind in KINDS:
                clock, before, sizes[kind] = epochs(kind, benign, harmful)
                found[kind].append((clock.seconds[1], clock.processor[1], before))
        best = {kind: [min(values) for values in zip(*found[kind], strict=True)] for kind in KINDS}
        for kind, (wall, processor_time, before) in best.items():
            times = f"{best['no'][0] / wall:.1f}", f"{best['no'][1] / processor_time:.1f}"
            size = f"{sizes[kind] / (2 * IMAGES) / 1000:.1f}"
            table.append(
                [name, kind, f"{wall:.2f}", times[0], f"{processor_time:.2f}", times[1], f"{before:.1f}", size]
            )
    return {
        "summary": (
            f"Second epoch of MobileNetV2's last stage, {SIZE} px, {IMAGES} benign and {IMAGES} harmful images in "
            f"steps of {SIDE} + {SIDE}; best of {ROUNDS} runs taken in turns. Wanted: at least 5 times as fast. "
            'What comes before the first epoch is paid once: finding where the trunk ends, running it ("no" does not).'
        ),
        "tables": [
            {
                "title": "Cached trunk",
                "columns": [
                    "images",
                    "cache_trunk",
                    "second epoch, s",
                    "times",
                    "CPU, s",
                    "times",
                    "before, s",
                    "kB an image",
                ],
                "rows": table,
            }
        ],
    }
