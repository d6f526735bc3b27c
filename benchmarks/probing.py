"""How long first-order probes with an intercept take before and after immunization: rows of a Markdown table.

    python -m benchmarks.probing START IMMUNIZED --benign data/cifar10 --harmful data/stanford_cars_98

Features of both checkpoints, of the training images that are given and the test images that each data set has; the
library's attackers. Steps are to 80 % of what ridge attains above chance on the starting features; the optimizers'
learning rates are tuned. A dozen minutes for a few thousand images on two cores. `--saved_as bfloat16` (or int8)
rounds the immunized weights first; `--saved_as onnx` exports the model and runs it, with the packages onnxscript and
onnxruntime; `--benign_steps 200` trains the whole immunized model on its benign task first. Where benign test images
are of classes that no training image shows, new crops of the training images tell what that costs. `--fine_tuning 3`
adds how many steps the last stage takes, with a new head and so many seeds, to learn the benign task again.
"""

import argparse
import math
import tempfile
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel, Trainer, TrainingArguments

from hf_immunize import relative_immunization_ratio
from hf_immunize.attacks.attacker import Found, Part, ProbeBudget, ProbeData, accuracy
from hf_immunize.attacks.presets import ATTACKERS, find_preset
from hf_immunize.data.images import ImageCollator, ImageRows
from hf_immunize.data.sources import choose, load_image_splits
from hf_immunize.features.extract import extract
from hf_immunize.features.trunk import split_trunk
from hf_immunize.hub.load import load_model
from hf_immunize.vision.head import HeadInput, find_head
from hf_immunize.vision.scope import last_stage


PROBES = ("gd_line_search", "momentum", "adamw", "batchnorm_adamw")


def loaded(folder: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A checkpoint and its image processor; on the GPU, where there is one."""
    model = load_model(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    return model, AutoImageProcessor.from_pretrained(folder)


def through_torch(
    model: PreTrainedModel, rows: torch.utils.data.Dataset, processor: BaseImageProcessor
) -> list[Tensor]:
    """Features, labels and logits of images."""
    batches = list(extract(model, rows, processor, description="images"))
    return [torch.cat([getattr(batch, of).cpu() for batch in batches]) for of in ("features", "labels", "logits")]


class WithFeatures(torch.nn.Module):
    """The classifier's input beside the logits, as outputs of a graph."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        with HeadInput(find_head(self.model)[1]) as captured:
            logits = self.model(pixel_values=pixel_values).logits
        return captured.features, logits


def through_onnx(model: PreTrainedModel, parts: list[ImageRows], processor: BaseImageProcessor) -> list[list[Tensor]]:
    """Features, labels and logits of each part's images by ONNX Runtime, from the model's exported graph."""
    import onnxruntime

    loaders = [torch.utils.data.DataLoader(rows, 64, collate_fn=ImageCollator(processor)) for rows in parts]
    names, found = ["pixel_values"], []
    with tempfile.TemporaryDirectory() as folder:
        file, example = f"{folder}/model.onnx", (next(iter(loaders[0]))["pixel_values"],)
        sizes = {"pixel_values": {0: torch.export.Dim("images")}}
        torch.onnx.export(WithFeatures(model.cpu()).eval(), example, file, input_names=names, dynamic_shapes=sizes)
        session = onnxruntime.InferenceSession(file)
        for loader in loaders:
            read = [
                (*session.run(None, {"pixel_values": one["pixel_values"].numpy()}), one["labels"]) for one in loader
            ]
            features, logits, labels = (
                torch.cat([torch.as_tensor(x) for x in part]) for part in zip(*read, strict=True)
            )
            found.append([features, labels, logits])
    return found


def probe_data(folder: str, source: str, limit: int, onnx: bool = False) -> tuple[ProbeData, Tensor]:
    """Features of a data set's training and test images through a checkpoint, and its own logits of the latter."""
    (model, processor), splits = loaded(folder), load_image_splits(source)
    parts = [
        ImageRows(splits[name].select(choose(len(splits[name]), limit, 0)), name, "image", "label")
        for name in ("train", "test")
    ]
    read = through_onnx(model, parts, processor) if onnx else [through_torch(model, rows, processor) for rows in parts]
    (Z, y, _), (Z_test, y_test, logits) = read
    return ProbeData(Z, y, Z_test, y_test, int(y.max()) + 1), logits


def print_change(what: str, logits: list[Tensor], labels: Tensor) -> None:
    """Accuracy of both checkpoints on some benign images, its change with the interval, and their loss."""
    hits = [(one.argmax(dim=1) == labels).float() for one in logits]
    change = hits[1] - hits[0]
    half = 1.96 * float(change.std()) / math.sqrt(len(change))
    print(f"| benign accuracy, {what} | {hits[0].mean():.1%} | {hits[1].mean():.1%} |")
    print(f"| its change, points | | {100 * float(change.mean()):+.1f} (± {100 * half:.1f}) |")
    losses = [float(F.cross_entropy(one, labels)) for one in logits]
    print(f"| benign loss, {what} | {losses[0]:.3f} | {losses[1]:.3f} |")


def print_benign(data: ProbeData, before: Tensor, after: Tensor, names: list[str]) -> None:
    """Accuracy and loss of both checkpoints' own heads, and the classes whose loss grew most."""
    hits = [float((logits.argmax(dim=1) == data.y_test).float().mean()) for logits in (before, after)]
    old, new = (F.cross_entropy(logits, data.y_test, reduction="none") for logits in (before, after))
    print(f"| benign accuracy | {hits[0]:.1%} | {hits[1]:.1%} |")
    print(f"| benign loss | {float(old.mean()):.3f} | {float(new.mean()):.3f} |")
    grown = torch.zeros(len(names)).index_add(0, data.y_test, (new - old) / len(old))
    if len(names) > 10 and bool(grown.sum() > 0):
        most = grown.topk(10)
        words = ", ".join(names[index] for index in most.indices.tolist())
        print(f"| of that growth {float(most.values.sum() / grown.sum()):.0%} is of | {words} | |")


def print_apart(data: ProbeData, logits: tuple[Tensor, Tensor], names: list[str], apart: list[str]) -> None:
    """Of the test images of some classes, and of the others."""
    chosen = torch.tensor([any(name.endswith(one) for one in apart) for name in names])[data.y_test]
    for what, rows in (("of these classes", chosen), ("of the others", ~chosen)):
        print_change(f"{int(rows.sum())} images {what}", [one[rows] for one in logits], data.y_test[rows])


class Crops(torch.utils.data.Dataset):
    """One crop of each image, of 40 % of its area at least, half of them mirrored."""

    def __init__(self, rows: ImageRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row, draw = self.rows[index], np.random.default_rng((index, len(self.rows)))
        image, side = row["image"].convert("RGB"), math.sqrt(draw.uniform(0.4, 1.0))
        (left, top), (w, h) = draw.uniform(0, 1 - side, 2), image.size
        crop = image.resize(
            image.size, Image.Resampling.BICUBIC, (left * w, top * h, (left + side) * w, (top + side) * h)
        )
        return row | {"image": crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else crop}


def print_crops(checkpoints: tuple[str, str], source: str) -> None:
    """Of new crops of the images that immunization saw."""
    rows = Crops(ImageRows(load_image_splits(source)["train"], "train", "image", "label"))
    read = [through_torch(model, rows, processor) for model, processor in map(loaded, checkpoints)]
    print_change("new crops of training images", [logits for _, _, logits in read], read[0][1])


def print_fine_tuning(checkpoints: tuple[str, str], source: str, limit: int, crops: bool, seeds: int) -> None:
    """Steps of fine-tuning the last stage, with a new head, to within a point of the start's own benign accuracy.

    Where the start does not come back to it, to within a point of where the start comes with every seed, of which the
    first chooses the settings. With `crops` both are measured on new crops of the training images.
    """
    budget, own = replace(find_preset("standard").tuning_budget, evaluations=60), []
    found: list[list[Found]] = []
    for folder in checkpoints:
        (model, processor), splits, sides = loaded(folder), load_image_splits(source), []
        parts = {
            name: ImageRows(splits[name].select(choose(len(splits[name]), limit, 0)), name, "image", "label")
            for name in ("train", "test")
        }
        for rows in (parts["train"], Crops(parts["train"]) if crops else parts["test"]):
            batch = ImageCollator(processor)([rows[index] for index in range(len(rows))])
            sides += [batch["pixel_values"], batch["labels"]]
        # The blocks before the last stage would run in every step.
        split = split_trunk(model, last_stage(model), tuple(sides[0].shape[1:]), eval_modules=[*model.modules()])
        sides[::2] = [
            torch.cat([split.activations(model.eval(), some.to(model.device)).cpu() for some in images.split(32)])
            for images in sides[::2]
        ]
        part = Part(*sides, int(sides[1].max()) + 1)
        with split.replayed(model):
            with torch.no_grad():
                logits = [model(pixel_values=some.to(model.device)).logits.cpu() for some in part.Z_test.split(32)]
            own.append(accuracy(torch.cat(logits), part.y_test))
            found.append([ATTACKERS["last_stage"].run(model, part, budget, 0)])
            chosen = found[-1][0].settings
            found[-1] += [
                ATTACKERS["last_stage"].run(model, part, budget, one, None, chosen) for one in range(1, seeds)
            ]
    goal = min(own[0], *(max(one.curve) for one in found[0])) - 0.01
    print_steps(f"to {goal:.1%}", found, [goal, goal])
    print_steps("to a point below its own accuracy", found, [one - 0.01 for one in own])


def print_steps(what: str, found: list[list[Found]], goals: list[float]) -> None:
    """Of both checkpoints, for every seed."""
    cells = [
        ", ".join(f"{steps_to(one, goal):,.0f} (best {max(one.curve):.1%})" for one in each)
        for each, goal in zip(found, goals, strict=True)
    ]
    print(f"| benign: steps of fine-tuning {what} | {' | '.join(cells)} |".replace("inf", "not reached"), flush=True)


def changed(folder: str, benign: str, saved_as: str, steps: int, rate: float, into: str) -> str:
    """The immunized checkpoint after benign training by a plain Trainer, in the type that it is saved in."""
    model, processor = loaded(folder)
    if steps:
        rows = ImageRows(load_image_splits(benign)["train"], "train", "image", "label")
        size = {"max_steps": steps, "per_device_train_batch_size": 64, "learning_rate": rate}
        quiet = {"report_to": "none", "save_strategy": "no", "remove_unused_columns": False}
        arguments = TrainingArguments(into, **size, **quiet)  # type: ignore[arg-type]
        Trainer(model, arguments, train_dataset=rows, data_collator=ImageCollator(processor)).train()
    if saved_as == "int8":
        round_weights(model)
    model.to(torch.bfloat16 if saved_as == "bfloat16" else torch.float32).save_pretrained(into)
    processor.save_pretrained(into)
    return into


@torch.no_grad()
def round_weights(model: torch.nn.Module) -> None:
    """Every weight becomes one of 255 multiples of its output channel's step: int8, symmetric, in float32."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            step = parameter.flatten(1).abs().amax(dim=1).clamp_min(1e-30) / 127
            step = step.view(-1, *[1] * (parameter.ndim - 1))
            parameter.copy_((parameter / step).round() * step)


def steps_to(found: Found, accuracy: float) -> float:
    """The first step from which on a curve has reached an accuracy."""
    reached = [step for step, value in zip(found.steps, found.curve, strict=True) if value >= accuracy]
    return reached[0] if reached else math.inf


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start")
    parser.add_argument("immunized")
    parser.add_argument("--benign", required=True)
    parser.add_argument("--harmful", required=True)
    parser.add_argument("--limit", type=int, default=3000, help="Images of each part (default: 3000).")
    parser.add_argument("--steps", type=int, default=3000, help="Of optimizers on mini-batches (default: 3000).")
    parser.add_argument("--saved_as", default="float32", choices=("float32", "bfloat16", "int8", "onnx"))
    parser.add_argument("--benign_steps", type=int, default=0, help="Of training on the benign task before probing.")
    parser.add_argument("--benign_rate", type=float, default=1e-4, help="Learning rate of that (default: 1e-4).")
    parser.add_argument("--apart", help="Ends of names of benign classes, with commas, to measure apart.")
    parser.add_argument("--fine_tuning", type=int, default=0, help="Seeds of learning the benign task again, too.")
    given = parser.parse_args(words)
    budget = ProbeBudget(steps=given.steps)
    start, immunized = given.start, given.immunized
    folder = tempfile.TemporaryDirectory()
    if given.saved_as not in ("float32", "onnx") or given.benign_steps:
        immunized = changed(
            immunized, given.benign, given.saved_as, given.benign_steps, given.benign_rate, folder.name
        )
    sides: dict[str, list[ProbeData]] = {}
    for side in ("benign", "harmful"):
        (before, own), (after, now) = (
            probe_data(checkpoint, getattr(given, side), given.limit, exported)
            for checkpoint, exported in ((start, False), (immunized, given.saved_as == "onnx"))
        )
        sides[side] = [before, after]
        if side == "benign":
            names = load_image_splits(given.benign)["test"].features["label"].names
            print_benign(before, own, now, names)
            if given.apart:
                print_apart(before, (own, now), names, given.apart.split(","))
            unseen = set(before.y_test.tolist()) - set(before.y.tolist())
            if unseen:
                print(f"| benign test classes that no training image shows: {len(unseen)} of {len(names)} | | |")
                print_crops((start, immunized), given.benign)
            if given.fine_tuning:
                print_fine_tuning((start, immunized), given.benign, given.limit, bool(unseen), given.fine_tuning)
        ridge = [ATTACKERS["ridge"].run(data, budget, 0).accuracy for data in (before, after)]
        print(f"| {side}: ridge | {ridge[0]:.1%} | {ridge[1]:.1%} |")
        goal = 1 / before.num_classes + 0.8 * (ridge[0] - 1 / before.num_classes)
        for name in PROBES if side == "harmful" else PROBES[:1]:
            found = [ATTACKERS[name].run(data, budget, 0) for data in (before, after)]
            cells = [
                f"{steps_to(one, goal):,.0f} (best {max(one.curve):.1%})".replace("inf", "not reached")
                for one in found
            ]
            print(f"| {side}: steps of {ATTACKERS[name].label} | {' | '.join(cells)} |", flush=True)
    for protocol in ("intercept", "exact"):
        features = {
            f"{side}{end}": data.Z
            for side, pair in sides.items()
            for end, data in zip(("_reference", ""), pair, strict=True)
        }
        print(f"| {protocol} | 1 | {relative_immunization_ratio(**features, protocol=protocol)} |")


if __name__ == "__main__":
    main()
