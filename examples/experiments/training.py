"""The immunization of one run by `hf-immunize train`: its arguments, the training itself, what is kept of it."""

import shutil
from pathlib import Path
from typing import Any

import yaml

from examples.experiments.methods import METHODS
from examples.experiments.settings import Run, digest, plain
from examples.experiments.tasks import Data
from hf_immunize.cli.train import parse_arguments, run_train
from hf_immunize.training.arguments import ImmunizationArguments, Method
from hf_immunize.training.checkpoints import last_whole_checkpoint


ARGUMENTS, UNCLAIMED = "train.yaml", "_unclaimed-train.yaml"
# What decides the weights that come out, beside the method's own settings.
DECISIVE = ("trainable", "freeze_batchnorm", "head_module", "harmful_batch_size", "distillation_batch_size")
DECISIVE += ("cache_trunk", "max_steps", "num_train_epochs", "per_device_train_batch_size", "max_grad_norm", "optim")
DECISIVE += ("gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "optim_args")
DECISIVE += ("warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "bf16", "fp16", "seed")


def write_arguments(run: Run, data: Data, start: str) -> tuple[Path, dict[str, Any]]:
    """Write the file of arguments for `hf-immunize train`, and say what they come to, defaults included.

    The file is put in place once it is known that the folder holds no run of other settings.
    """
    values = {**run.spec()["training"], **METHODS[run.method], **run.changes}
    paths = {"model": start, "benign": data.paths["benign"], "harmful": data.paths["harmful"]}
    distills = values.get("benign_loss", Method.benign_loss) != "task"
    if distills and "distillation" in data.paths:
        paths["distillation"] = data.paths["distillation"]
    whole = {**paths, "output_dir": str(run.folder / "model"), "seed": run.seed, "report_to": "none", **values}
    if values.get("cache_trunk", "no") != "no":
        whole["trunk_cache_dir"] = str(_trunk(run, values, data, start))
    file = run.folder / UNCLAIMED
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f"# hf-immunize train --config {ARGUMENTS}\n"
        + yaml.safe_dump({name: "none" if value is None else value for name, value in whole.items()}),
        encoding="utf-8",
    )
    _, args = parse_arguments(["--config", str(file)])
    return file, decisive(args) | {"distillation": distills and "distillation" in data.paths}


def _trunk(run: Run, values: dict[str, Any], data: Data, start: str) -> Path:
    """The stored trunk's folder, the same for all runs that would store the same, so that none rewrites another's."""
    names = ("cache_trunk", "trainable", "head_module", "per_device_train_batch_size")
    alike = {name: values.get(name) for name in names} | {"start": start, "seed": run.seed}
    alike |= {"loss": values.get("benign_loss"), "data": data.settings()}
    return run.shared / "trunk" / f"{run.experiment}-seed{run.seed}-{digest(alike)}"


def decisive(args: ImmunizationArguments) -> dict[str, Any]:
    """Every setting that decides the result."""
    names = [*Method.__dataclass_fields__, *(name for name in DECISIVE if hasattr(args, name))]
    return plain({name: getattr(args, name) for name in names})


def train(file: Path, folder: Path) -> dict[str, Any]:
    """Immunize, going on at the last whole checkpoint; returns what `hf-immunize train` writes into results.json."""
    words = ["--config", str(file)]
    if begun(folder):
        words += ["--resume_from_checkpoint", "True"]
    results = run_train(words)
    for spent in folder.glob("checkpoint-*"):
        shutil.rmtree(spent, ignore_errors=True)
    return results


def begun(folder: Path) -> bool:
    """Whether an interrupted training left a checkpoint to go on from."""
    return last_whole_checkpoint(str(folder))[0] is not None
