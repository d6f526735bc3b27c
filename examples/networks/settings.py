"""What one run is: an experiment (a YAML file), a method, a seed, and single settings changed by hand."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from examples.networks.methods import METHODS
from hf_immunize.errors import ArgumentError
from hf_immunize.training.arguments import ImmunizationArguments


EXPERIMENTS = Path(__file__).parent / "experiments"
# "audit" says which probes, "wanted" what the page calls reached, "published" what the paper's table has.
KEYS = {"title", "about", "model", "benign", "harmful", "distillation", "unrelated", "training", "audit"}
KEYS |= {"wanted", "published", "machine"}
# Set by the run itself.
_TAKEN = {"output_dir", "seed", "data_seed", "resume_from_checkpoint", "overwrite_output_dir", "trunk_cache_dir"}


@dataclass
class Run:
    """One row.

    Attributes:
        experiment: Name of a file in ``experiments/``.
        method: Key of `METHODS`.
        seed: Decides splits, classes and draws.
        changes: Arguments changed by ``--set``, name to value.
        data_path: Folder of the data sets.
        output_dir: Folder of all runs.
        model: Folder or Hub name of a model in place of the experiment's.
        attackers: Probes in place of the experiment's.
        keep_card: Whether card and record go to ``model_cards/``.
        redo: Whether a row or an unfinished run of other settings is thrown away.
    """

    experiment: str
    method: str = "default"
    seed: int = 0
    changes: dict[str, Any] = field(default_factory=dict)
    data_path: str = "data"
    output_dir: str = "runs/networks"
    model: str | None = None
    attackers: list[str] | None = None
    keep_card: bool = False
    redo: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ArgumentError(f"Expected a method out of {', '.join(METHODS)}, found {self.method!r}.")
        if self.changes is None:
            self.changes = {}
        if isinstance(self.changes, list):
            self.changes = parse_changes(self.changes)
        check_changes(self.changes)

    @property
    def name(self) -> str:
        """Of the row, its folder and its card."""
        return run_name(self.experiment, self.method, self.seed, self.changes)

    @property
    def folder(self) -> Path:
        """Where everything of this run is."""
        return Path(self.output_dir) / self.name

    def command(self) -> str:
        """The command that makes this row, without the local places of data and output."""
        words = ["python -m examples.networks run", f"--experiment {Path(self.experiment).name}"]
        words += [f"--method {self.method}"]
        words += [f"--seed {self.seed}", *(f"--set {name}={_word(value)}" for name, value in self.changes.items())]
        words += [f"--attackers {','.join(self.attackers)}"] if self.attackers else []
        words += ["--data_path DATA"]
        return " ".join(words)


def run_name(experiment: str, method: str, seed: int, changes: dict[str, Any]) -> str:
    """The name of a row, which is safe as a file name."""
    return "-".join(
        [Path(experiment).stem, method, *(_part(*change) for change in sorted(changes.items())), f"seed{seed}"]
    )


def describe_changes(changes: dict[str, Any]) -> str:
    """Settings changed by hand, for people."""
    return ", ".join(f"{name}={_word(value)}" for name, value in sorted(changes.items()))


def _word(value: Any) -> str:
    return "none" if value is None else str(value)


def _part(name: str, value: Any) -> str:
    word = _word(value)
    plain = re.sub(r"[^\w.+]", "_", word)
    return f"{name}={plain}" if plain == word else f"{name}={plain[:24]}_{digest(word)[:6]}"


def parse_changes(words: list[str]) -> dict[str, Any]:
    """``["benign_budget=0.05"]`` as names and values, values as in YAML.

    Raises:
        ArgumentError: If a word has no ``=``.
    """
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


def check_changes(changes: dict[str, Any]) -> None:
    """Refuse what is no argument, or what the run sets by itself."""
    known = set(ImmunizationArguments.__dataclass_fields__) - _TAKEN
    if wrong := sorted(set(changes) - known):
        raise ArgumentError(
            f"Expected --set with names of ImmunizationArguments other than {', '.join(sorted(_TAKEN))}, found "
            f"{', '.join(wrong)}."
        )


def experiment_names() -> list[str]:
    """Of all files in ``experiments/``."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


def load_experiment(name: str) -> dict[str, Any]:
    """What an experiment's file says; a path of one's own file does as well.

    Raises:
        ArgumentError: If there is none, or it has unknown parts.
    """
    path = Path(name) if name.endswith(".yaml") else EXPERIMENTS / f"{name}.yaml"
    if not path.is_file():
        raise ArgumentError(f"Expected an experiment out of {', '.join(experiment_names())}, found {name!r}.")
    spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    lacking, unknown = {"model", "benign", "harmful", "training"} - set(spec), set(spec) - KEYS
    if lacking or unknown:
        raise ArgumentError(f"{path.name}: lacking {sorted(lacking)}, unknown {sorted(unknown)}.")
    return spec


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
