"""What one run is: a backbone, a task, a method, a seed, and single arguments changed by hand.

Backbones, tasks and the plan are in settings.yaml, or in a file of your own of that form; methods are in methods.py.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from examples.experiments.methods import METHODS
from hf_immunize.errors import ArgumentError
from hf_immunize.training.arguments import ImmunizationArguments


SETTINGS = Path(__file__).parent / "settings.yaml"
# "audit" says which probes, "wanted" what the page calls reached, "published" what the paper's table has.
BACKBONE = {"title", "about", "machine", "start", "benign", "distillation", "training"}
TASK = {"title", "about", "harmful", "unrelated", "audit", "wanted", "published"}
NEEDED = {"title", "start", "benign", "training", "harmful"}
# Set by the run itself.
_TAKEN = {"output_dir", "seed", "data_seed", "resume_from_checkpoint", "overwrite_output_dir", "trunk_cache_dir"}


def load_settings(path: str | Path | None = None) -> dict[str, Any]:
    """Backbones, tasks and plan of a file; by default of `SETTINGS`."""
    path = Path(path or SETTINGS)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ArgumentError(f"Expected a YAML file at {path}, found: {error}.") from error
    for part, known in (("backbones", BACKBONE), ("tasks", TASK)):
        for name, one in found.get(part, {}).items():
            lacking, unknown = sorted(NEEDED & known - set(one)), sorted(set(one) - known)
            if lacking or unknown:
                raise ArgumentError(
                    f"Expected {', '.join(sorted(known))} of {name}, found {unknown}, and {lacking} not."
                )
    return found


def experiment_of(settings: dict[str, Any], backbone: str, task: str) -> dict[str, Any]:
    """A backbone with a task: title, machine, starting model, images, training, audit, what is wanted."""
    for part, name in (("backbones", backbone), ("tasks", task)):
        if name not in settings[part]:
            raise ArgumentError(f"Expected one of the {part} {', '.join(settings[part])}, found {name!r}.")
    one, other = settings["backbones"][backbone], settings["tasks"][task]
    return {
        "machine": "any machine",
        **one,
        **other,
        "title": f"{one['title']} {other['title']}".replace(" ,", ","),
        "about": f"{one.get('about', '')} {other.get('about', '')}",
        "published": other.get("published", {}).get(backbone),
    }


@dataclass
class Run:
    """One row: what is run, from which file of settings, with which places."""

    backbone: str
    task: str
    method: str = "default"
    seed: int = 0
    changes: dict[str, Any] = field(default_factory=dict)
    data_path: str = "data"
    output_dir: str = "runs/experiments"
    settings: str | None = None
    model: str | None = None  # in place of the backbone's
    attackers: list[str] | None = None  # in place of the task's
    keep_card: bool = False
    redo: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ArgumentError(f"Expected a method out of {', '.join(METHODS)}, found {self.method!r}.")
        if wrong := sorted(set(self.changes) - (set(ImmunizationArguments.__dataclass_fields__) - _TAKEN)):
            raise ArgumentError(
                f"Expected --set with names of ImmunizationArguments other than {', '.join(sorted(_TAKEN))}, found "
                f"{', '.join(wrong)}."
            )

    @property
    def experiment(self) -> str:
        """Backbone and task, as in the names of files."""
        return f"{self.backbone}_{self.task}"

    @property
    def name(self) -> str:
        """Of the row, its folder and its card; safe as a file name."""
        changes = [_part(*change) for change in sorted(self.changes.items())]
        return "-".join([self.experiment, self.method, *changes, f"seed{self.seed}"])

    @property
    def folder(self) -> Path:
        """Where everything of this run is."""
        return Path(self.output_dir) / self.name

    @property
    def shared(self) -> Path:
        """Where everything is that several runs need."""
        return Path(self.output_dir) / "shared"

    def spec(self) -> dict[str, Any]:
        """What the settings say of backbone and task."""
        found = experiment_of(load_settings(self.settings), self.backbone, self.task)
        return {**found, "start": {"name": self.model}} if self.model else found

    def command(self) -> str:
        """The command that makes this row, without the local places of data and output."""
        words = [f"python -m examples.experiments run --backbone {self.backbone} --task {self.task}"]
        words += [f"--method {self.method} --seed {self.seed}"]
        words += [f"--set {name}={_word(value)}" for name, value in self.changes.items()]
        words += [f"--attackers {','.join(self.attackers)}"] if self.attackers else []
        words += [f"--settings {Path(self.settings).name}"] if self.settings else []
        return " ".join([*words, "--data_path DATA"])


def planned_runs(path: str | Path | None = None, only: list[str] | None = None, gpu: bool = False) -> list[Run]:
    """The runs of the plan in its order, each once; `only` of some backbones, or all that need no GPU unless `gpu`."""
    settings, runs = load_settings(path), {}
    for entry in settings.get("plan", []):
        pairs = [(backbone, task) for backbone, tasks in entry["runs"].items() for task in tasks]
        for (backbone, task), seed, method, changes in product(
            pairs, entry["seeds"], entry["methods"], entry.get("set", [{}])
        ):
            machine = experiment_of(settings, backbone, task)["machine"]
            if backbone in only if only else gpu or "GPU" not in machine:
                run = Run(backbone, task, method, seed, dict(changes), settings=str(path) if path else None)
                runs.setdefault(run.name, run)
    return list(runs.values())


def describe_changes(changes: dict[str, Any]) -> str:
    """Arguments changed by hand, for people."""
    return ", ".join(f"{name}={_word(value)}" for name, value in sorted(changes.items()))


def _word(value: Any) -> str:
    return "none" if value is None else str(value)


def _part(name: str, value: Any) -> str:
    word = _word(value)
    plain_word = re.sub(r"[^\w.+]", "_", word)
    return f"{name}={plain_word}" if plain_word == word else f"{name}={plain_word[:24]}_{digest(word)[:6]}"


def parse_changes(words: list[str]) -> dict[str, Any]:
    """``["benign_budget=0.05"]`` as names and values, values as in YAML."""
    changes = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ArgumentError(f"Expected --set name=value, found {word!r}.")
        changes[name.strip()] = None if value.lower() == "none" else _number(yaml.safe_load(value))
    return changes


def _number(value: Any) -> Any:
    """YAML reads 1e-4 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def plain(value: Any) -> Any:
    """A value as JSON gives it back, so that two can be compared."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def digest(value: Any) -> str:
    """Eight hexadecimal digits for a plain value."""
    return hashlib.blake2b(json.dumps(plain(value), sort_keys=True).encode(), digest_size=4).hexdigest()


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Names of settings in which two differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            line
            for key in sorted({*one, *other})
            for line in differences(one.get(key), other.get(key), f"{place}.{key}" if place else key)
        ]
    return [] if one == other else [f"{place}: {str(one)[:60]} → {str(other)[:60]}"]
