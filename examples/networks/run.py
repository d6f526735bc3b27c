"""One row: immunize, measure, attack, write. What is finished is not done again; other settings are never reused."""

import platform
import shutil
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from benchmarks.common import describe_machine
from examples.networks import data, measure, models, probes, training, trials
from examples.networks.cards import finish_card, keep_card
from examples.networks.files import Parts, read_json, write_json
from examples.networks.settings import Run, differences, digest, load_experiment, plain
from hf_immunize.errors import ArgumentError, ImmunizationError
from hf_immunize.hub.collect import software_versions
from hf_immunize.hub.weights import hash_weights


ROW, FAILED = "row.json", "failed.json"
# Raised when a row of an older form would be misread.
VERSION = 1


@trials.known()
def run_one(run: Run) -> dict[str, Any]:
    """Make one row, or go on with it, or return it if it is there.

    Args:
        run: Which one.

    Returns:
        The row, as it is in the run's folder.

    Raises:
        ArgumentError: If the folder holds a run of other settings, and `Run.redo` is not set.
    """
    spec = load_experiment(run.experiment)
    if run.model is not None:
        spec = {**spec, "model": {"name": run.model}}
    attacks = probes.settings(spec.get("audit"), run.attackers)
    shared = Path(run.output_dir) / "shared"
    experiment = Path(run.experiment).stem
    with alone(shared):
        images = data.prepare(spec, experiment, run.seed, run.data_path, shared)
    start, about = models.start_model(spec["model"], images, run.seed, shared)
    with alone(run.folder):
        unclaimed, arguments = training.write_arguments(run, spec, images, start)
        settings = {
            "version": VERSION,
            "data": images.settings(),
            "start": {"name": about["name"], "weights": weights_of(start)},
            "training": arguments,
            "audit": attacks,
        }
        settings = plain(settings)
        claim(run, settings)
        file = unclaimed.replace(run.folder / training.ARGUMENTS)
        row = read_json(run.folder / ROW)
        if row is None:
            before = _before(start, images, attacks, shared, f"{experiment}-seed{run.seed}")
            try:
                row = _make(run, spec, images, start, file, settings, before)
            except ImmunizationError as error:  # such as a loss that is not finite: a result too
                failure = {"experiment": experiment, "command": run.command(), "error": str(error)}
                write_json(run.folder / FAILED, failure | {"date": date.today().isoformat()})
                raise
            row["start"] = about
            write_json(run.folder / ROW, row)
            (run.folder / FAILED).unlink(missing_ok=True)
        else:
            print(f"{run.folder / ROW} is there already, of the same settings.")
        if run.keep_card:
            print(f"Card: {keep_card(run.folder / 'model', run.name, spec['title'])}")
    return row


def claim(run: Any, settings: dict[str, Any]) -> None:
    """Make sure that what is in the run's folder is of these settings.

    Raises:
        ArgumentError: If it is of others, and `Run.redo` is not set; all of it is then as it was.
    """
    known = read_json(run.folder / "settings.json")
    if known is not None and known != settings:
        if not run.redo:
            (run.folder / training.UNCLAIMED).unlink(missing_ok=True)
            raise ArgumentError(
                f"Expected {run.folder} to hold a run of these settings, found others: "
                f"{'; '.join(differences(known, settings)[:8])}. --redo throws it away and runs anew; another "
                "--output_dir keeps both."
            )
        for path in run.folder.iterdir():
            if path.name not in (".lock", training.UNCLAIMED):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(run.folder / "settings.json", settings)


def weights_of(model: str) -> str:
    """What tells a starting model's weights from others: their SHA-256, or the Hub's id."""
    if not Path(model).is_dir():
        return model
    return digest(hash_weights(model))


def _before(start: str, images: data.Data, attacks: dict[str, Any], shared: Path, name: str) -> dict[str, Any]:
    """What is measured and attacked of the starting model, once for all methods."""
    mark = digest({"data": images.settings(), "start": weights_of(start), "audit": attacks})
    folder = shared / "before" / f"{name}-{mark}"
    with alone(folder):
        parts = Parts(folder)

        def features() -> None:
            measure.features_of(start, images, folder / "features.safetensors")

        parts.run("measuring the starting model", features)
        begun = (folder / "audit" / "outcomes.jsonl").is_file()
        parts.run(
            "attacks on the starting model",
            lambda: bool(probes.attack(start, images, attacks, folder / "audit")),
            resumed=begun,
        )
    return {"folder": folder, "seconds": parts.seconds(), "resumed": parts.resumed()}


def _make(
    run: Run,
    spec: dict[str, Any],
    images: data.Data,
    start: str,
    file: Path,
    settings: dict[str, Any],
    before: dict[str, Any],
) -> dict[str, Any]:
    folder, parts = run.folder, Parts(run.folder)
    model = folder / "model"
    results = parts.run(
        "training, with measuring before and after",
        lambda: training.train(file, model),
        resumed=training.begun(model),
    )
    shutil.copyfile(model / "spectra.png", folder / "spectra.png")

    def measured() -> dict[str, Any]:
        sides = (
            measure.features_of(start, images, before["folder"] / "features.safetensors"),
            measure.features_of(str(model), images, folder / "features.safetensors"),
        )
        return {"ratios": measure.ratios(*sides), "utility": measure.utility(*sides)}

    found = parts.run("measuring the immunized model", measured)
    begun = (folder / "audit" / "outcomes.jsonl").is_file()
    parts.run(
        "attacks on the immunized model",
        lambda: bool(probes.attack(str(model), images, settings["audit"], folder / "audit")),
        resumed=begun,
    )
    report = probes.joined(
        probes.AuditReport.load(before["folder"] / "audit"),
        probes.AuditReport.load(folder / "audit"),
        (Path(start).name, run.name),
        found["utility"],
    )
    parts.run("card", lambda: finish_card(model, report))
    return {
        "name": run.name,
        "experiment": Path(run.experiment).stem,
        "title": spec["title"],
        "method": run.method,
        "changes": run.changes,
        "seed": run.seed,
        "command": run.command(),
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "versions": software_versions(),
        "settings": settings,
        "seconds": parts.seconds(),
        "resumed": parts.resumed(),
        "shared": {"name": before["folder"].name, "seconds": before["seconds"], "resumed": before["resumed"]},
        "steps": results["steps"],
        # What "auto" came to.
        "objective": results["objective"],
        "images": {side: one["images"] for side, one in images.about.items()},
        "sources": {side: one["source"] for side, one in images.about.items()},
        # Of one data set split by image: which of its images were held out, so that splits can be pooled.
        "test_rows": images.about["benign"].get("test_rows"),
        **found,
        "probes": probes.strongest_by_class(report),
        "warnings": report.data.warnings,
    }


def hardware() -> str:
    """Processor, cores, threads, versions, and the GPU if there is one."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{describe_machine()}, {platform.system()}"


@contextmanager
def alone(folder: Path) -> Any:
    """Hold a folder that another run may be writing."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"Waiting for another run that works in {folder} …", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
