"""The demo's images, and the small model that learns the benign ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed
from transformers import ViTImageProcessorPil as ViTProcessor
from transformers.trainer_callback import ProgressCallback

from hf_immunize.data.data import split_benign_harmful
from hf_immunize.data.images import ImageCollator, ImageRows
from hf_immunize.training.arguments import ImmunizationArguments


HARMFUL_DIGITS = ["5", "6", "7", "8", "9"]
QUIET: dict[str, Any] = {
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 100,
    "disable_tqdm": False,
    "use_cpu": True,
}


def all_digits() -> datasets.Dataset:
    """scikit-learn's 1,797 handwritten digits (8x8), grey, with labels of the names 0 to 9."""
    digits = load_digits()
    images = [Image.fromarray((image * 255 / 16).round().astype(np.uint8)) for image in digits.images]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(d) for d in range(10)])}
    )
    return datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)


def digit_splits(seed: int) -> tuple[datasets.DatasetDict, datasets.DatasetDict]:
    """The digits as image datasets, benign and harmful, 30 % held out.

    Args:
        seed: Seed of the split.

    Returns:
        Benign and harmful, each with "train" and "test".
    """
    parts = all_digits().train_test_split(0.3, seed=seed, stratify_by_column="label")
    return split_benign_harmful(parts, HARMFUL_DIGITS)


def train_benign(folder: Path, benign: dict[str, list[dict[str, Any]]], seed: int) -> ViTForImageClassification:
    """A small ViT trained on the benign digits with a plain Trainer.

    Args:
        folder: For what the Trainer writes.
        benign: Rows to train on and held out.
        seed: Seed of weights and training.

    Returns:
        The model.
    """
    set_seed(seed)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label={digit: str(digit) for digit in range(5)},
        label2id={str(digit): digit for digit in range(5)},
    )
    model = ViTForImageClassification(config)
    # A final LayerNorm maps all images, whatever the task, into one affine plane: with a bias near zero, as short
    # training leaves it, the direction across that plane is almost empty and pins κ of both tasks at the same value.
    # Long-trained ViTs have a bias of the order of one.
    torch.nn.init.normal_(model.vit.layernorm.bias, std=0.5)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=800,
        per_device_train_batch_size=64,
        learning_rate=4e-3,
        warmup_steps=80,
        lr_scheduler_type="cosine",
        seed=seed,
        remove_unused_columns=False,
        **QUIET,
    )
    trainer = Trainer(model, arguments, train_dataset=shifted(benign["train"]), data_collator=ImageCollator())
    bars_only(trainer)
    trainer.train()
    return model


def immunization_arguments(folder: Path, seed: int) -> ImmunizationArguments:
    """The demo's arguments: the paper's objective beside the task's loss; the whole of so small a net moves."""
    return ImmunizationArguments(
        output_dir=str(folder),
        objective="kappa",
        benign_loss="task",
        benign_budget=None,
        trainable="all",
        max_steps=1000,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        warmup_steps=20,
        lr_scheduler_type="cosine",
        seed=seed,
        **QUIET,
    )


def shifted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each image and its shifts by one pixel, so that training on a few hundred images carries over to others.

    Args:
        rows: Rows with "pixel_values" of shape ``(C, H, W)``.

    Returns:
        Five times as many rows.
    """
    padded = [(row, torch.nn.functional.pad(row["pixel_values"], (1, 1, 1, 1), value=-1.0)) for row in rows]
    corners = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
    return [
        {**row, "pixel_values": image[:, top : top + 8, left : left + 8].contiguous()}
        for top, left in corners
        for row, image in padded
    ]


def decoded(data: datasets.Dataset, processor: ViTProcessor) -> list[dict[str, Any]]:
    """Images decoded and processed once: decoding them anew every epoch would take longer than the network."""
    rows = ImageRows(data, "digits", "image", "label")
    batch = ImageCollator(processor)([rows[index] for index in range(len(rows))])
    return [{"pixel_values": p, "labels": int(y)} for p, y in zip(batch["pixel_values"], batch["labels"], strict=True)]


class _Bars(ProgressCallback):
    """The progress bar without the lines of the log between."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing; the table at the end has the figures."""


def bars_only(trainer: Trainer) -> None:
    """Leave the Trainer its progress bar, without the lines of the log between."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bars())
