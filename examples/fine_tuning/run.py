"""One row: immunize, measure, attack, write. What is finished is not done again; other settings are never reused."""

import shutil
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainerCallback, default_data_collator

from examples.fine_tuning import attacks
from examples.fine_tuning.candidates import CANDIDATES
from examples.fine_tuning.settings import Run, load
from examples.fine_tuning.training import INNER_RATE, INNER_STEPS, CandidateTrainer
from examples.networks import data, measure, models
from examples.networks.files import Parts, read_json, write_json
from examples.networks.run import alone, claim, hardware, weights_of
from examples.networks.settings import digest, plain
from hf_immunize import ImmunizationArguments
from hf_immunize.files import staged_directory
from hf_immunize.hub.collect import software_versions
from hf_immunize.training.checkpoints import last_whole_checkpoint


ROW = "row.json"
VERSION = 1
# The same for all candidates, which say themselves what they add to it, or put in its place.
METHOD = {"objective": "concentration", "benign_budget": 0.03}


def run_one(run: Run) -> dict[str, Any]:
    """Make one row, or go on with it, or return it if it is there.

    Args:
        run: Which one.

    Returns:
        The row, as it is in the run's folder.

    Raises:
        ArgumentError: If the folder holds a run of other settings, and `Run.redo` is not set.
    """
    spec, networks = load(run.experiment)
    shared = Path(run.shared)
    with alone(shared):
        images = data.prepare(networks, str(spec["networks"]), run.seed, run.data_path, shared)
    start, about = models.start_model(networks["model"], images, run.seed, shared)
    with alone(run.folder):
        settings = _settings(run, spec, images, start)
        claim(run, settings)
        row = read_json(run.folder / ROW)
        if row is None:
            row = _make(run, spec, images, start, settings) | {"start": about}
            write_json(run.folder / ROW, row)
        else:
            print(f"{run.folder / ROW} is there already, of the same settings.")
    return row


def _settings(run: Run, spec: dict[str, Any], images: data.Data, start: str) -> dict[str, Any]:
    candidate = CANDIDATES[run.candidate]
    found = {
        "version": VERSION,
        "data": images.settings(),
        "start": weights_of(start),
        "candidate": {**asdict(candidate), "title": "", "about": ""},
        "inner": [INNER_STEPS, INNER_RATE],
        "scope": spec["scopes"][candidate.scope],
        "layers": spec["layers"],
        "rectifiers": spec["rectifiers"],
        "training": {**spec["training"], **run.training},
        "attacks": spec["attacks"],
        "method": _method(run),
    }
    return plain(found)


def _method(run: Run) -> dict[str, Any]:
    """The settings that decide: those given, and the library's defaults as they are now."""
    defaults = {name: field.default for name, field in ImmunizationArguments.__dataclass_fields__.items()}
    defaults |= METHOD | run.training
    names = ("objective", "benign_loss", "feature_distillation_weight", "benign_budget", "budget_measure")
    return {name: str(defaults[name]) for name in (*names, "budget_holdout", "freeze_batchnorm")}


def arguments_of(run: Run, spec: dict[str, Any], folder: Path) -> ImmunizationArguments:
    """The Trainer's arguments: the run's own over those of the experiment, over those of all candidates."""
    given = {**METHOD, **spec["training"], **run.training}
    scope = spec["scopes"][CANDIDATES[run.candidate].scope]
    return ImmunizationArguments(str(folder), trainable=scope, seed=run.seed, report_to="none", **given)


def _make(run: Run, spec: dict[str, Any], images: data.Data, start: str, settings: dict[str, Any]) -> dict[str, Any]:
    before = _before(run, spec, images, start)
    parts, model = Parts(run.folder), run.folder / "model"
    working = run.folder / "_training"
    parts.run("training", lambda: train(run, spec, images, start, model), resumed=working.is_dir())
    shutil.rmtree(working, ignore_errors=True)

    def measured() -> dict[str, Any]:
        sides = (
            measure.features_of(start, images, before / "features.safetensors"),
            measure.features_of(str(model), images, run.folder / "features.safetensors"),
        )
        return {"ratios": measure.ratios(*sides), "utility": measure.utility(*sides)}

    found = parts.run("measuring the immunized model", measured)
    begun = (run.folder / "audit" / "outcomes.jsonl").is_file()
    parts.run(
        "attacks on the immunized model",
        lambda: bool(attacks.attack(str(model), images, spec["attacks"], run.folder / "audit")),
        resumed=begun,
    )
    parts.run(
        "probes before rectifiers",
        lambda: bool(
            attacks.look_before_rectifiers(str(model), images, spec["attacks"], run.folder / "before_rectifiers")
        ),
    )
    reports = [
        tuple(attacks.AuditReport.load(folder / name) for folder in (before, run.folder))
        for name in ("audit", "before_rectifiers")
    ]
    return {
        "name": run.name,
        "experiment": Path(run.experiment).stem,
        "candidate": run.candidate,
        "changes": run.training,
        "seed": run.seed,
        "command": run.command(),
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "versions": software_versions(),
        "settings": settings,
        "seconds": parts.seconds(),
        "resumed": parts.resumed(),
        "shared_seconds": Parts(before).seconds(),
        "test_rows": images.about["benign"].get("test_rows"),
        **found,
        "attacks": attacks.found(*reports, found["utility"], spec["first_third"]),
    }


def _before(run: Run, spec: dict[str, Any], images: data.Data, start: str) -> Path:
    """The folder of what is measured and attacked of the starting model, once for all candidates."""
    mark = digest({"data": images.settings(), "start": weights_of(start), "attacks": spec["attacks"]})
    folder = Path(run.output_dir) / "before" / f"{Path(run.experiment).stem}-seed{run.seed}-{mark}"
    with alone(folder):
        parts = Parts(folder)
        parts.run(
            "measuring the starting model",
            lambda: bool(measure.features_of(start, images, folder / "features.safetensors")),
        )
        begun = (folder / "audit" / "outcomes.jsonl").is_file()
        parts.run(
            "attacks on the starting model",
            lambda: bool(attacks.attack(start, images, spec["attacks"], folder / "audit")),
            resumed=begun,
        )
        parts.run(
            "probes before rectifiers",
            lambda: bool(attacks.look_before_rectifiers(start, images, spec["attacks"], folder / "before_rectifiers")),
        )
    return folder


class InMemory(Dataset):
    """Images in memory with their labels."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index].float(), "labels": int(self.labels[index])}


class Progress(TrainerCallback):
    """Says now and then how the training goes, in a line."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print figures of interest."""
        shown = {k: v for k, v in (logs or {}).items() if isinstance(v, float) and not k.startswith("train_")}
        print(state.global_step, {k: float(f"{v:.3g}") for k, v in shown.items()}, flush=True)


def train(run: Run, spec: dict[str, Any], images: data.Data, start: str, folder: Path) -> dict[str, Any]:
    """Immunize; after an interruption, goes on at the last whole checkpoint.

    Args:
        run: Which candidate.
        spec: The experiment.
        images: Benign, harmful and distillation images.
        start: The starting model.
        folder: Where the immunized model goes.

    Returns:
        The last logged figures.
    """
    processor = AutoImageProcessor.from_pretrained(start)
    model = AutoModelForImageClassification.from_pretrained(start)
    sides = {
        side: InMemory(*models.pixels_of(images.load(side, "train"), processor))
        for side in ("benign", "harmful", "distillation")
    }
    candidate = CANDIDATES[run.candidate]
    working = run.folder / "_training"
    args = arguments_of(run, spec, working)
    trainer = CandidateTrainer(
        candidate,
        spec["layers"],
        spec["rectifiers"],
        model,
        args,
        train_dataset=sides["benign"],
        harmful_dataset=sides["harmful"],
        distillation_dataset=sides["distillation"],
        # With a collator of one's own, harmful images keep the labels that inner attackers need.
        data_collator=default_data_collator,
        callbacks=[Progress()],
    )
    checkpoint, _ = last_whole_checkpoint(str(working))
    trainer.train(resume_from_checkpoint=checkpoint)
    with staged_directory(folder) as staging:
        trainer.model.save_pretrained(staging)
        processor.save_pretrained(staging)
    return {k: v for k, v in trainer.state.log_history[-2].items() if isinstance(v, (int, float))}
