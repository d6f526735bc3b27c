"""Run a method of your own through the audit, and print its row: benign change, what is removed, and cost.

    python -m examples.benchmark --method my_module:my_method --backbone resnet18_cifar10 --task near --data_path data
    python -m examples.benchmark --method runs/mine --backbone digits --task last_five --settings examples/digits.yaml

A method is a function (model, benign, harmful, processor) that returns the model, or the folder of a model immunized
before. The model is the backbone's starting model; the images are the task's training images with their labels. --set
gives it keyword arguments; one that takes any (**arguments) gets the backbone's arguments of training too (steps,
batch size, …), and its images to distil on. Methods of the field are in examples/field_methods.py; backbones and tasks
are those of `python -m examples.experiments list`, or of a file of that form. Rows that are there are not made again,
and what is interrupted goes on: remove the row and its folder where a function has changed.
"""

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, set_seed

from examples.experiments import backbones, measure, tasks
from examples.experiments.files import Parts, alone
from examples.experiments.run import hardware, weights_of
from examples.experiments.settings import Run, digest, parse_changes, plain
from hf_immunize.attacks.presets import ATTACKERS, PRESET_VERSION, Preset, find_preset
from hf_immunize.audit.head_start import costs, find_head_start
from hf_immunize.audit.names import CLASSES, label, share, signed
from hf_immunize.audit.report import AuditReport
from hf_immunize.audit.result import ACCESSES, AuditResult
from hf_immunize.audit.run import audit
from hf_immunize.audit.statistics import of_class, paired_utility, strongest, summarize
from hf_immunize.data.sources import choose
from hf_immunize.errors import ArgumentError, ImmunizationError
from hf_immunize.files import staged_directory
from hf_immunize.vision.loading import load_classifier


def find_method(text: str) -> Callable[..., Any] | Path:
    """The function of ``module:function``, or the folder of a checkpoint."""
    if Path(text).is_dir():
        return Path(text)
    module, _, name = text.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArgumentError(
            f"Expected a folder or module:function as --method, found {text!r} ({error}). Run from the folder that "
            "holds the module."
        ) from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file, which has one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def find_row(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The row of a file that was made with these settings."""
    return next((row for row in read_rows(path) if row["key"] == key), None)


def find_attackers(given: argparse.Namespace, spec: dict[str, Any]) -> Preset:
    """The preset with the attackers asked for: by default all that do not restore the public weights."""
    # Whoever has the public weights has the reference, whatever the method.
    chosen = find_preset(given.preset)
    names = given.attackers or [name for name in chosen.attackers if not ATTACKERS[name].restores]
    layers = spec.get("audit") or {}
    most = {"max_layers": layers.get("layers"), "layer_entries": layers.get("layer_values")}
    chosen = replace(chosen, **{name: value for name, value in most.items() if value})
    return chosen.only(names).changed(steps=given.attack_steps, seeds=given.attack_seeds)


def make_row(text: str, run: Run, given: argparse.Namespace) -> dict[str, Any]:
    """The row of a method, made, or gone on with, or there already."""
    method, changes = find_method(text), parse_changes(given.set)
    images = tasks.prepare(run)
    start, _ = backbones.start_model(run, images)
    preset = find_attackers(given, run.spec())
    key = plain(
        {
            "method": text if callable(method) else f"{method.name} {weights_of(str(method))}",
            "changes": changes,
            "setting": run.experiment,
            "seed": run.seed,
            "data": digest(images.settings()),
            "start": weights_of(start),
            "training": run.spec()["training"],
            "preset": asdict(preset) | {"version": PRESET_VERSION},
            **({"attack_images": given.attack_images} if given.attack_images else {}),
        }
    )
    if row := find_row(given.rows, key):
        return row
    title = text.rpartition(":")[2] if callable(method) else method.name
    folder = Path(given.output_dir) / f"{run.experiment}-{title}-seed{run.seed}-{digest(key)}"
    with alone(folder):
        parts, model = Parts(folder), folder / "model"
        if callable(method):
            immunized_on = parts.run("immunizing", lambda: immunize(method, start, images, run, changes, model))
        else:
            model, immunized_on = method, None
        before = starting(start, run, images, preset, given.attack_images)
        after = attacked(str(model), images, preset, folder, given.attack_images)
    report = joined(before, after, title)
    row = {"title": title, "key": key, "command": command(text, run, given), "date": date.today().isoformat()}
    row |= {"immunized_on": immunized_on} if immunized_on else {}
    row |= {"hardware": hardware(), "seconds": parts.seconds() | {"audit": round(report.data.seconds, 1)}}
    row |= measures(report)
    with alone(given.rows.parent):
        if made := find_row(given.rows, key):  # by another run, which this one waited for
            return made
        with given.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
    return row


Attacked = tuple[AuditResult, Tensor]  # what attacks found, and which benign test images are named rightly


def attacked(
    model: str, images: tasks.Data, preset: Preset, folder: Path, most: int | None, **reference: Any
) -> Attacked:
    """Attack a model, or go on with it, with so many labelled images at most."""
    train = images.load("harmful", "train")
    train = train.select(choose(len(train), most, 0)) if most else train
    harmful = train, images.load("harmful", "test")
    report = audit(model, harmful=harmful, preset=preset, run_dir=folder / "audit", progress=False, **reference)
    measure.store_features(model, images, folder / measure.FEATURES)
    return report.data, load_file(folder / measure.FEATURES)["benign hits"]


def starting(start: str, run: Run, images: tasks.Data, preset: Preset, most: int | None) -> Attacked:
    """The same attacks on the starting model and on random copies, once for all methods."""
    mark = digest([images.settings(), weights_of(start), asdict(preset), PRESET_VERSION, *([most] if most else [])])
    folder = run.shared / "head_start" / f"{run.experiment}-seed{run.seed}-{mark}"
    with alone(folder):
        return attacked(start, images, preset, folder, most, reference=start)


def joined(before: Attacked, after: Attacked, title: str) -> AuditReport:
    """One report of attacks on random copies, on the starting model and on the immunized one."""
    known = [one for one in before[0].outcomes if one.subject != "immunized"]  # there, the starting model again
    outcomes = [*known, *after[0].outcomes]
    found = replace(before[0], model=title, outcomes=outcomes, utility=paired_utility(after[1], before[1]))
    return AuditReport(replace(found, seconds=after[0].seconds, spectra=[], rir={}))


def immunize(
    method: Callable[..., Any], start: str, images: tasks.Data, run: Run, changes: dict[str, Any], folder: Path
) -> str:
    """Run a function on the starting model, keep what it returns with its image processor; on which machine."""
    set_seed(run.seed)
    arguments, taken = changes, inspect.signature(method).parameters.values()
    if any(one.kind is one.VAR_KEYWORD for one in taken):
        arguments = {**run.spec()["training"], **changes}
        arguments |= {"distillation": images.load("distillation", "train")} if "distillation" in images.paths else {}
    elif unknown := sorted(set(changes) - {one.name for one in taken if one.kind is one.KEYWORD_ONLY}):
        raise ArgumentError(
            f"Expected a method that takes --set {', '.join(unknown)}, found {method}. Let it take that as a keyword."
        )
    processor = AutoImageProcessor.from_pretrained(start)
    sides = [images.load(side, "train") for side in ("benign", "harmful")]
    model = method(load_classifier(start), *sides, processor, **arguments)
    with staged_directory(folder) as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
    return hardware()


def measures(report: AuditReport) -> dict[str, Any]:
    """What a row says: benign accuracy, what is removed by class of access and by attacker, and cost in steps."""
    card = report.for_card()
    return {
        "benign": card["utility"],
        "removed": card["strongest"],
        "attackers": by_attacker(report.data),
        "cost": [asdict(one) for one in costs(report.data)],
        "verdict": report.verdict(),
    }


def by_attacker(data: AuditResult) -> list[dict[str, Any]]:
    """What each attacker reads on all three models, and how much of its own head start is removed."""
    summaries, found = [one for one in summarize(data) if one.task == "harmful"], []
    for access, name in product(ACCESSES, dict.fromkeys(one.attacker for one in summaries)):
        own = [one for one in summaries if (one.attacker, one.access) == (name, access)]
        sides = [strongest(of_class(own, subject, "harmful", access)) for subject in _SUBJECTS]
        if any(one is None for one in sides):
            continue
        one = find_head_start(*sides)  # type: ignore[arg-type]
        row = {"attacker": name, "access": access, "head_start": one.points, "removed": one.removed}
        row |= {subject: side.mean for subject, side in zip(_SUBJECTS, sides, strict=True) if side}
        found.append(row | {"interval": one.removed_interval})
    return plain(found)


_SUBJECTS = ("reference", "immunized", "random")


def command(text: str, run: Run, given: argparse.Namespace) -> str:
    """The command that makes a row, without the local places of data and output."""
    words = [f"python -m examples.benchmark --method {Path(text).name if Path(text).is_dir() else text}"]
    words += [f"--backbone {run.backbone} --task {run.task} --seed {run.seed} --preset {given.preset}"]
    words += [f"--attackers {','.join(given.attackers)}"] if given.attackers else []
    words += [f"--{name} {value}" for name in _BUDGETS if (value := getattr(given, name)) is not None]
    words += [f"--set {change}" for change in given.set]
    words += [f"--settings {'examples/' + Path(run.settings).name}"] if run.settings else []
    return " ".join([*words, "--data_path DATA"])


_BUDGETS = ("attack_steps", "attack_seeds", "attack_images")


def shown(row: dict[str, Any]) -> str:
    """A row for a terminal."""
    benign, key = row["benign"], row["key"]
    ends = " to ".join(signed(end) for end in benign["interval"] or ())
    lines = [f"{row['title']} on {key['setting']}, seed {key['seed']}, preset {key['preset']['name']}:"]
    lines += [f"  benign accuracy: {signed(benign['difference'])} points ({ends})"]
    for access, one in row["removed"].items():
        said = "not tested" if one is None else f"nothing to claim; {label(one['attacker'])} is the strongest"
        if one is not None and one["removed"] is not None:
            low, high = map(share, one["removed_interval"])
            said = f"{share(one['removed'])} removed ({low} to {high}) by {label(one['attacker'])}"
        lines.append(f"  {CLASSES[access]}: {said}")
    spent = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in row["seconds"].items())
    lines.append(f"  cost: {spent}")
    for one in row["cost"]:
        bounds = {"reference": "reference_is_bound", "immunized": "is_bound"}
        before, after = (f"{'> ' * one[bound]}{one[f'{side}_steps']:,.0f}" for side, bound in bounds.items())
        steps = f"{before} → {after} {one['counted']}"
        lines.append(f"    {label(one['attacker'])}, to what it reads from random weights: {steps}")
    return "\n".join(lines)


def parse(words: list[str] | None) -> argparse.Namespace:
    """Flags."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m examples.benchmark", description=__doc__, formatter_class=raw)
    parser.add_argument("--method", nargs="+", required=True, help="module:function, or a folder; several make a grid")
    parser.add_argument("--backbone", nargs="+", required=True, help="starting models")
    parser.add_argument("--task", nargs="+", required=True, help="what is harmful")
    parser.add_argument("--seed", nargs="+", type=int, default=[0], help="decides splits, draws and training")
    parser.add_argument("--preset", default="quick", help="quick, standard or full")
    parser.add_argument("--attackers", type=lambda text: text.split(","), help="some of the preset, with commas")
    parser.add_argument("--attack_steps", type=int, help="of fine-tuning, in place of the preset's")
    parser.add_argument("--attack_seeds", type=int, help="of every attack, in place of the preset's")
    parser.add_argument("--attack_images", type=int, help="labelled images that attackers have; by default all")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an argument of the method")
    parser.add_argument("--data_path", default="data", help="folder of the data sets")
    parser.add_argument("--output_dir", default="runs/benchmark", help="folder of all runs")
    parser.add_argument("--rows", type=Path, help="file of all rows; by default rows.jsonl in --output_dir")
    parser.add_argument("--settings", help="backbones and tasks, in place of examples/experiments/settings.yaml")
    given = parser.parse_args(words)
    given.rows = given.rows or Path(given.output_dir) / "rows.jsonl"
    return given


def main(words: list[str] | None = None) -> int:
    """Make and print every row; 1 where one could not be made, which the others do not depend on."""
    given, failed = parse(words), 0
    places = {"data_path": given.data_path, "output_dir": given.output_dir, "settings": given.settings}
    for backbone, task, seed, text in product(given.backbone, given.task, given.seed, given.method):
        try:
            print(shown(make_row(text, Run(backbone, task, seed=seed, **places), given)), flush=True)
        except ImmunizationError as error:
            failed = 1
            print(f"Error: {text} on {backbone}, {task}, seed {seed}: {error}", file=sys.stderr, flush=True)
    return failed


if __name__ == "__main__":
    sys.path.insert(0, "")  # modules of whoever runs it
    sys.exit(main())
