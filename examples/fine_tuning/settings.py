"""What one run is: an experiment (a YAML file), a candidate, a seed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from examples.fine_tuning.candidates import CANDIDATES
from examples.networks.settings import load_experiment
from hf_immunize.errors import ArgumentError


EXPERIMENTS = Path(__file__).parent / "experiments"
KEYS = {"title", "about", "networks", "scopes", "layers", "rectifiers", "first_third", "training", "attacks", "wanted"}


@dataclass
class Run:
    """One row.

    Attributes:
        experiment: Name of a file in ``experiments/``, or a file.
        candidate: Key of `CANDIDATES`.
        seed: Decides splits, starting model, draws.
        training: Arguments of the training changed by hand.
        data_path: Folder of the data sets.
        output_dir: Folder of all runs.
        shared: Folder of images and starting models, which the experiments on networks use too.
        redo: Whether a run of other settings is thrown away.
    """

    experiment: str
    candidate: str = "concentration"
    seed: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    data_path: str = "data"
    output_dir: str = "runs/fine_tuning"
    shared: str = "runs/networks/shared"
    redo: bool = False

    def __post_init__(self) -> None:
        if self.candidate not in CANDIDATES:
            raise ArgumentError(f"Expected a candidate out of {', '.join(CANDIDATES)}, found {self.candidate!r}.")

    @property
    def name(self) -> str:
        """Of the row and its folder."""
        changes = [f"{name}={value}" for name, value in sorted(self.training.items())]
        return "-".join([Path(self.experiment).stem, self.candidate, *changes, f"seed{self.seed}"])

    @property
    def folder(self) -> Path:
        """Where everything of this run is."""
        return Path(self.output_dir) / self.name

    def command(self) -> str:
        """The command that makes this row, without the local places of data and output."""
        changes = "".join(f" --set {name}={value}" for name, value in self.training.items())
        return (
            f"python -m examples.fine_tuning run --experiment {Path(self.experiment).name} --candidate "
            f"{self.candidate} --seed {self.seed}{changes} --data_path DATA"
        )


def experiment_names() -> list[str]:
    """Of all files in ``experiments/``."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


def load(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """An experiment here, and the one on networks from which it has its images and its starting model.

    Raises:
        ArgumentError: If there is none, or it has unknown parts.
    """
    path = Path(name) if name.endswith(".yaml") else EXPERIMENTS / f"{name}.yaml"
    if not path.is_file():
        raise ArgumentError(f"Expected an experiment out of {', '.join(experiment_names())}, found {name!r}.")
    spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    if set(spec) != KEYS:
        raise ArgumentError(f"{path.name}: lacking {sorted(KEYS - set(spec))}, unknown {sorted(set(spec) - KEYS)}.")
    networks = str(spec["networks"])
    return spec, load_experiment(str(path.parent / networks) if networks.endswith(".yaml") else networks)
