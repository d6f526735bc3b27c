"""``hf-immunize demo``: the main job on real, embedded data in under two minutes, without a network."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers import ViTImageProcessorPil as Processor
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

from hf_immunize.audit.result import Utility
from hf_immunize.audit.statistics import paired_utility, wilson_interval
from hf_immunize.cli.train import print_table, run_results
from hf_immunize.data.images import ImageCollator, ImageRows
from hf_immunize.data.sources import split_benign_harmful
from hf_immunize.files import check_writable, write_whole
from hf_immunize.hub.card import INTERCEPT_ROW, metric_rows
from hf_immunize.hub.record import AttackRecord, AuditRecord, BaseModelRecord, DataRecord
from hf_immunize.linear.probe import least_squares_probe, probe_accuracy, probe_convergence
from hf_immunize.training.arguments import ImmunizationArguments
from hf_immunize.training.spectrum_figure import draw_curves, draw_spectra, new_figure, save_figure
from hf_immunize.training.trainer import ImmunizationTrainer
from hf_immunize.vision.head import penultimate_features


Rows = list[dict[str, Any]]

PROBE_STEPS = 1000
# Digits below it are benign.
FIRST_HARMFUL = 5
# The digits are of 8 by 8 pixels; a ResNet halves its images twice before its first block.
IMAGE_SIZE = 16
CHANCE = 0.2
# From so many times the steps on, gradient descent counts as slowed.
SLOWED = 2
RIDGES = [10.0**power for power in range(-12, 5)]
# Widths, rates, ratios and the shifts were tried a dozen times and compared on the very images that are held out here.
CHOSEN = (
    "The demo's settings were chosen by looking at these same held-out digits, so its figures show what happens and "
    "estimate nothing; other seeds, and processors of another make, give others."
)
# Of both trainings.
_TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 64,
    "lr_scheduler_type": "cosine",
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 100,
    "disable_tqdm": False,
    "use_cpu": True,
}


# ---- data and trainings ----


def all_digits() -> datasets.Dataset:
    """scikit-learn's 1,797 handwritten digits (8x8), grey, with labels of the names 0 to 9."""
    digits = load_digits()
    images = [Image.fromarray((image * 255 / 16).round().astype(np.uint8)) for image in digits.images]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(d) for d in range(10)])}
    )
    return datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)


def digit_splits(seed: int) -> tuple[datasets.DatasetDict, datasets.DatasetDict]:
    """The digits 0 to 4 and 5 to 9 as image datasets, 30 % of each held out."""
    parts = all_digits().train_test_split(0.3, seed=seed, stratify_by_column="label")
    return split_benign_harmful(parts, [str(digit) for digit in range(FIRST_HARMFUL, 10)])


def new_processor() -> Processor:
    """The image processor of the demo's model."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return Processor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def decoded(data: datasets.Dataset, processor: Processor) -> Rows:
    """Images decoded and processed once: decoding them anew every epoch would take longer than the network."""
    rows = ImageRows(data, "digits", "image", "label")
    batch = ImageCollator(processor)([rows[index] for index in range(len(rows))])
    return [{"pixel_values": p, "labels": int(y)} for p, y in zip(batch["pixel_values"], batch["labels"], strict=True)]


def shifted(rows: Rows) -> Rows:
    """Each image and its shifts by an eighth, so that training on a few hundred images carries over to others."""
    by = IMAGE_SIZE // 8
    padded = [(row, torch.nn.functional.pad(row["pixel_values"], (by,) * 4, value=-1.0)) for row in rows]
    return [
        {**row, "pixel_values": image[:, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE].contiguous()}
        for top, left in ((by, by), (0, by), (2 * by, by), (by, 0), (by, 2 * by))
        for row, image in padded
    ]


def mixed(rows: Rows, seed: int) -> Rows:
    """Each image blended with another: no digits, but images on which the model shall stay what it was too."""
    draw = torch.Generator().manual_seed(seed)
    others, shares = torch.randint(len(rows), (len(rows),), generator=draw), torch.rand(len(rows), generator=draw)
    return [
        {"pixel_values": torch.lerp(row["pixel_values"], rows[other]["pixel_values"], share)}
        for row, other, share in zip(rows, others.tolist(), shares, strict=True)
    ]


class _Bars(ProgressCallback):
    """The progress bar without the lines of the log between; the table at the end has the figures."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing."""


def train_benign(folder: Path, benign: Rows, seed: int, max_steps: int = 800) -> ResNetForImageClassification:
    """A small ResNet trained on the benign digits with a plain Trainer."""
    set_seed(seed)
    names = {digit: str(digit) for digit in range(FIRST_HARMFUL)}
    labels = {"id2label": names, "label2id": {name: digit for digit, name in names.items()}}
    sizes: dict[str, Any] = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**sizes, **labels))
    rates: dict[str, Any] = {"max_steps": max_steps, "learning_rate": 3e-3, "warmup_steps": 80}
    arguments = TrainingArguments(str(folder), **rates, seed=seed, remove_unused_columns=False, **_TRAINING)
    trainer = Trainer(model, arguments, train_dataset=shifted(benign), data_collator=ImageCollator())
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bars())
    trainer.train()
    return model


def immunizer(
    folder: Path, seed: int, model: PreTrainedModel, benign: dict[str, Rows], harmful: dict[str, Rows], processor: Any
) -> ImmunizationTrainer:
    """The Trainer with its default method; all of so small a network is trainable, at a high rate."""
    method: dict[str, Any] = {"trainable": "all", "learning_rate": 4e-3, "max_steps": 1500}
    trainer = ImmunizationTrainer(
        model,
        ImmunizationArguments(str(folder), **method, seed=seed, **_TRAINING),
        train_dataset=shifted(benign["train"]),
        harmful_dataset=shifted(harmful["train"]),
        distillation_dataset=mixed(shifted(benign["train"]), seed),
        eval_dataset=benign["test"],
        harmful_eval_dataset=harmful["test"],
        processing_class=processor,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bars())
    return trainer


# ---- probing, and what may be said of it ----


@torch.no_grad()
def _features(model: PreTrainedModel, rows: Rows) -> tuple[Tensor, Tensor]:
    batch = ImageCollator()(rows)
    return penultimate_features(model.eval(), batch["pixel_values"]), batch["labels"]


@torch.no_grad()
def hits(model: PreTrainedModel, rows: Rows) -> Tensor:
    """Whether the classifier names each image rightly, ``(N,)``."""
    batch = ImageCollator()(rows)
    return model.eval()(batch["pixel_values"]).logits.argmax(1) == batch["labels"]


@dataclass(frozen=True)
class Probing:
    """What linear probes with an intercept make of one side's digits, on held-out images."""

    curve: Tensor
    convergence: Tensor
    least_squares: float
    size: int

    def at(self, step: int) -> float:
        """Accuracy of gradient descent after a number of steps."""
        return float(self.curve[step - 1])

    def steps_to(self, target: float) -> int | None:
        """The first step that reaches an accuracy; None if none does."""
        reached = (self.curve >= target).nonzero()
        return int(reached[0]) + 1 if len(reached) else None

    def figures(self) -> dict[str, float]:
        """What ``results.json`` holds: accuracies, and the distance to the optimum."""
        steps = {f"gradient_descent_{step}_steps": self.at(step) for step in (10, 100, 1000)}
        distance = float(self.convergence[-1])
        return steps | {"distance_to_optimum_1000_steps": distance, "least_squares": self.least_squares}


def probe(model: PreTrainedModel, side: dict[str, Rows]) -> Probing:
    """Attack: fit linear probes to the training images' features, test on held-out ones."""
    (z, y), (z_test, y_test) = (_features(model, side[split]) for split in ("train", "test"))
    probes = (least_squares_probe(z, one_hot(y).double(), ridge, intercept=True) for ridge in RIDGES)
    best = max(float((probe.predict(z_test).argmax(1) == y_test).double().mean()) for probe in probes)
    distance = probe_convergence(z, one_hot(y).double(), PROBE_STEPS, intercept=True)
    return Probing(probe_accuracy(z, y, z_test, y_test, PROBE_STEPS), distance, best, len(y_test))


@dataclass(frozen=True)
class Slowing:
    """How many times the steps gradient descent takes after, to what it reads of the held-out images."""

    target: float
    before: int | None
    after: int | None
    low: float | None
    high: float | None
    is_bound: bool

    @property
    def verb(self) -> str:
        """What may be said of gradient descent, whatever the images' noise."""
        if self.low is None or self.high is None:
            return "cannot be compared"
        if self.low >= SLOWED:
            return "is slowed"
        return "is perhaps slowed" if self.high >= SLOWED else "is hardly slowed" if self.high > 1 else "is not slowed"

    @property
    def steps(self) -> str:
        """Steps before and after, and the range of their ratio."""
        before, after = (f"{step:,}" if step else f"more than {PROBE_STEPS:,}" for step in (self.before, self.after))
        both = f"{before} steps before and {after} after to be right on {self.target:.0%}"
        if self.low is None:
            return both
        low, high = f"{self.low:.2g}", f"{'more than ' * self.is_bound}{self.high:.2g}"
        return f"{both}: {low if low == high else f'{low} to {high}'} times as many"


def slowing(old: Probing, new: Probing) -> Slowing:
    """Compare gradient descent before and after."""
    target = 0.9 * old.least_squares
    targets = [target, *wilson_interval(target, old.size)]
    pairs = [(old.steps_to(one), new.steps_to(one)) for one in targets]
    known = [((after or PROBE_STEPS + 1) / before, after is None) for before, after in pairs if before is not None]
    ratios = [ratio for ratio, _ in known]
    low, high = (min(ratios), max(ratios)) if ratios else (None, None)
    return Slowing(target, *pairs[0], low, high, any(bound for _, bound in known))


def demo_sentence(
    results: dict[str, Any], utility: Utility, benign: tuple[Probing, Probing], harmful: tuple[Probing, Probing]
) -> str:
    """The plain sentences under the table, from the figures and their noise alone, whichever way they came out."""
    low, high = utility.interval or (0.0, 0.0)
    rir = {name: value for name, _, value in metric_rows({}, results["after"])}[INTERCEPT_ROW]
    (old, new), slowed, kept = harmful, slowing(*harmful), slowing(*benign)
    readable = wilson_interval(new.least_squares, new.size)
    stays = "stays possible" if readable[0] > CHANCE else "cannot be separated from chance"
    return (
        f"The model's own task: accuracy went from {utility.reference or 0:.1%} to {utility.immunized:.1%} "
        f"({100 * (utility.difference or 0):+.1f} points, {100 * low:+.1f} to {100 * high:+.1f} with the noise of "
        f"{utility.size} images), and learning it by gradient descent {kept.verb} ({kept.steps}). The harmful "
        f"task: learning it by gradient descent {slowed.verb} ({slowed.steps}, with the noise of {new.size} images). "
        f"After 100 steps it is right on {new.at(100):.1%} of the images, where it was on {old.at(100):.1%}; the RIR "
        f"with an intercept is {rir}. Least squares, which takes no steps, is right on {new.least_squares:.1%} "
        f"({readable[0]:.1%} to {readable[1]:.1%}; {old.least_squares:.1%} before; chance {CHANCE:.0%}): learning "
        f"the harmful task {stays}."
    )


def audit_record(old: Probing, new: Probing) -> AuditRecord:
    """The demo's two attackers as the record of a small audit: the stronger one counts."""
    descent = f"gradient descent, the best of {PROBE_STEPS:,} steps"
    least_squares = f"least squares, the best of {len(RIDGES)} ridges"
    best = [{descent: float(probing.curve.max()), least_squares: probing.least_squares} for probing in (old, new)]
    attacker = max(best[1], key=lambda name: best[1][name])
    attack = AttackRecord(attacker, best[1][attacker], reference_accuracy=max(best[0].values()), chance=CHANCE)
    return AuditRecord("demo", strongest={"head_input": attack})


# ---- the command ----


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, sums are added in one order however many cores there are, of which training makes much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def run_demo(output_dir: str | Path, seed: int = 0) -> dict[str, Any]:
    """Train a small ResNet on benign digits, immunize it against the harmful ones, measure, and report."""
    logging.set_verbosity_error()  # the table at the end is the log
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    folder = Path(output_dir)
    check_writable(folder, "--output-dir")
    console = Console(highlight=False, soft_wrap=True)
    processor = new_processor()
    splits = digit_splits(seed)
    benign, harmful = ({name: decoded(data, processor) for name, data in side.items()} for side in splits)
    console.print(
        f"Digits 0-4 are benign ({len(benign['train'])} images to train on, {len(benign['test'])} held out), 5-9 "
        f"harmful ({len(harmful['train'])} and {len(harmful['test'])}).\n\n[bold]1/3[/] Training a small ResNet on "
        "the benign digits"
    )
    model = train_benign(folder, benign["train"], seed)
    model.save_pretrained(folder / "before")  # the reference that an audit needs
    reference = copy.deepcopy(model)
    console.print("\n[bold]2/3[/] Immunizing it against the harmful digits")
    trainer = immunizer(folder, seed, model, benign, harmful, processor)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    console.print("\n[bold]3/3[/] Probing the harmful digits before and after")
    probed = {
        name: (probe(reference, side), probe(model, side)) for name, side in (("benign", benign), ("harmful", harmful))
    }
    old, new = probed["harmful"]
    names = ["a ResNet of two blocks trained on the benign digits"]
    names += ["scikit-learn digits 0 to 4", "scikit-learn digits 5 to 9"]
    parts = {"benign_train": benign["train"], "harmful_train": harmful["train"]}
    parts |= {"benign_eval": benign["test"], "harmful_eval": harmful["test"]}
    results = run_results(trainer, names, {name: len(part) for name, part in parts.items()}, before, after)
    results["probing"] = {
        name: {"before": before.figures(), "after": after.figures()} for name, (before, after) in probed.items()
    }
    utility = paired_utility(*(hits(one, benign["test"]) for one in (model, reference)))
    results["summary"] = demo_sentence(results, utility, probed["benign"], probed["harmful"])
    write_whole(folder / "results.json", json.dumps(results, indent=2))
    distances = {
        (name, moment): one.convergence
        for name, pair in probed.items()
        for moment, one in zip(("before", "after"), pair, strict=True)
    }
    draw(folder / "before_after.png", trainer.last_spectra, distances, old, new)
    describe(trainer, results, old, new)
    trainer.evidence.attach(model, audit_record(old, new))
    trainer.save_model()
    trainer.create_model_card()
    for name, side in zip(("benign", "harmful"), splits, strict=True):
        side["test"].save_to_disk(str(folder / "held_out" / name))
    print_table(results)
    print_probing(console, old, new)
    console.print(
        f"\n[bold]{results['summary']}[/]\n{CHOSEN}\n\nCheckpoint, record (immunization.json), card (README.md) and "
        f"figure (before_after.png): {folder}/\nMeasure again: hf-immunize verify {folder} --benign "
        f"{folder}/held_out/benign --harmful {folder}/held_out/harmful"
    )
    return results


def describe(trainer: ImmunizationTrainer, results: dict[str, Any], old: Probing, new: Probing) -> None:
    """Give the Trainer, for its record, what the data and the model are."""
    evidence = trainer.evidence
    evidence.base_model = BaseModelRecord(results["model"].removeprefix("a "))
    for side in ("benign", "harmful"):
        size = results["images"][f"{side}_train"]
        setattr(evidence, side, DataRecord(results[side], train_size=size, split="30 % held out"))
    evidence.figures = ["before_after.png"]
    evidence.remarks = [
        f"Gradient descent on the harmful digits, with exact line search, takes {slowing(old, new).steps}, with the "
        f"noise of {new.size} images.",
        CHOSEN,
    ]


def draw(path: Path, spectra: Any, distances: dict[tuple[str, str], Tensor], old: Probing, new: Probing) -> None:
    """Spectra, distances to the optimum and accuracies, before and after."""
    figure, axes = new_figure(3)
    draw_spectra(axes[0], spectra)
    draw_curves(axes[1], distances, title="Probing: distance to optimum", ylabel="‖w_t − w*‖² / ‖w_0 − w*‖²", log=True)
    curves = {("harmful", "before"): old.curve, ("harmful", "after"): new.curve}
    draw_curves(axes[2], curves, title="Probing: held-out harmful digits", ylabel="accuracy")
    for probing, colour, moment in ((old, "0.6", "before"), (new, "0.2", "after")):
        axes[2].axhline(probing.least_squares, color=colour, linestyle=":", label=f"least squares, {moment}")
    axes[2].legend(frameon=False, loc="center right")
    save_figure(figure, path)


def print_probing(console: Console, old: Probing, new: Probing) -> None:
    """Print the table of probing before and after."""
    low, high = wilson_interval(0.5, new.size)
    noise = f"the noise of {new.size} images is at most ±{50 * (high - low):.0f} points"
    table = Table(title=f"Linear probing of the held-out harmful digits ({noise})", title_justify="left")
    table.add_column("")
    for moment in ("before", "after"):
        table.add_column(moment, justify="right")
    for step in (10, 100, 1000):
        table.add_row(f"gradient descent, {step:,} steps", f"{old.at(step):.1%}", f"{new.at(step):.1%}")
    table.add_row("least squares (best ridge)", f"{old.least_squares:.1%}", f"{new.least_squares:.1%}")
    table.add_row("‖w − w*‖²/‖w*‖² after 1,000 steps", *(f"{float(p.convergence[-1]):.2g}" for p in (old, new)))
    console.print(table)
