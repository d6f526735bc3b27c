"""One row: immunize, measure, attack, write. What is finished is not done again; other settings are never reused."""

import platform
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import describe_machine
from examples.experiments import attacks, backbones, measure, tasks, training
from examples.experiments.files import Parts, alone, read_json, write_json
from examples.experiments.settings import Run, differences, digest, plain
from hf_immunize.audit.report import AuditReport
from hf_immunize.errors import ArgumentError, ImmunizationError
from hf_immunize.hub.card import attach_audit
from hf_immunize.hub.collect import software_versions
from hf_immunize.hub.load import CARD_NAME, hash_weights
from hf_immunize.hub.record import RECORD_NAME, read_record


ROW, FAILED, SETTINGS = "row.json", "failed.json", "settings.json"
# Raised when a row of an older form would be misread.
VERSION = 2
CARDS = Path(__file__).resolve().parents[2] / "model_cards"


def run_one(run: Run) -> dict[str, Any]:
    """The row, as it is in the run's folder: made, or gone on with, or there already."""
    images = tasks.prepare(run)
    start, about = backbones.start_model(run, images)
    with alone(run.folder):
        unclaimed, arguments = training.write_arguments(run, images, start)
        settings = plain(
            {
                "version": VERSION,
                "data": images.settings(),
                "start": {"name": about["name"], "weights": weights_of(start)},
                "training": arguments,
                "audit": attacks.settings(run.spec().get("audit"), run.attackers),
            }
        )
        _claim(run, settings)
        file = unclaimed.replace(run.folder / training.ARGUMENTS)
        row = read_json(run.folder / ROW)
        if row is None:
            before = _starting(run, images, start, settings)
            try:
                row = _make(run, images, file, settings, before) | {"start": about}
            except ImmunizationError as error:  # such as a loss that is not finite: a result too
                failure = {"experiment": run.experiment, "command": run.command(), "error": str(error)}
                write_json(run.folder / FAILED, failure | {"date": date.today().isoformat()})
                raise
            write_json(run.folder / ROW, row)
            (run.folder / FAILED).unlink(missing_ok=True)
        else:
            print(f"{run.folder / ROW} is there already, of the same settings.")
        if run.keep_card:
            print(f"Card: {_keep_card(run, row['title'])}")
    return row


def _claim(run: Run, settings: dict[str, Any]) -> None:
    """Make sure that what is in the run's folder is of these settings; refused, all of it is as it was."""
    known = read_json(run.folder / SETTINGS)
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
    write_json(run.folder / SETTINGS, settings)


def weights_of(model: str) -> str:
    """What tells a starting model's weights from others: a digest of them, or the Hub's id."""
    return digest(hash_weights(model)) if Path(model).is_dir() else model


def _starting(run: Run, images: tasks.Data, start: str, settings: dict[str, Any]) -> Path:
    """The folder of what is measured and attacked of the starting model, once for all methods."""
    mark = digest({"data": settings["data"], "start": settings["start"]["weights"], "audit": settings["audit"]})
    folder = run.shared / "before" / f"{run.experiment}-seed{run.seed}-{mark}"
    with alone(folder):
        parts, path = Parts(folder), folder / measure.FEATURES
        parts.run("measuring the starting model", lambda: measure.store_features(start, images, path))
        _attack(parts, "attacks on the starting model", start, images, settings, folder / "audit")
    return folder


def _attack(parts: Parts, name: str, model: str, images: tasks.Data, settings: dict[str, Any], folder: Path) -> None:
    begun = (folder / "outcomes.jsonl").is_file()
    parts.run(name, lambda: attacks.attack(model, images, settings["audit"], folder), resumed=begun)


def _make(run: Run, images: tasks.Data, file: Path, settings: dict[str, Any], before: Path) -> dict[str, Any]:
    folder, parts, shared = run.folder, Parts(run.folder), Parts(before)
    model = folder / "model"
    results = parts.run(
        "training, with measuring before and after",
        lambda: training.train(file, model),
        resumed=training.begun(model),
    )
    shutil.copyfile(model / "spectra.png", folder / "spectra.png")

    def measured() -> dict[str, Any]:
        measure.store_features(str(model), images, folder / measure.FEATURES)
        return measure.compare(before / measure.FEATURES, folder / measure.FEATURES)

    found = parts.run("measuring the immunized model", measured)
    _attack(parts, "attacks on the immunized model", str(model), images, settings, folder / "audit")
    sides = AuditReport.load(before / "audit"), AuditReport.load(folder / "audit")
    report = attacks.joined(*sides, (settings["start"]["name"], run.name), found["utility"])
    parts.run("card", lambda: _finish_card(model, report))
    return {
        "name": run.name,
        "backbone": run.backbone,
        "task": run.task,
        "experiment": run.experiment,
        "title": run.spec()["title"],
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
        "shared": {"name": before.name, "seconds": shared.seconds(), "resumed": shared.resumed()},
        "steps": results["steps"],
        "objective": results["objective"],
        "images": {side: one["images"] for side, one in images.about.items()},
        "sources": {side: one["source"] for side, one in images.about.items()},
        # Of one data set split by image: which of its images were held out, so that splits can be pooled.
        "test_rows": images.about["benign"].get("test_rows"),
        **found,
        "probes": attacks.strongest_by_class(report),
        "warnings": report.data.warnings,
    }


def hardware() -> str:
    """Processor, cores, threads, versions, and the GPU if there is one."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{describe_machine()}, {platform.system()}"


def _finish_card(model: Path, report: AuditReport) -> None:
    """Write what the attacks found into record and card."""
    attach_audit(model, report.for_card())


def _keep_card(run: Run, title: str) -> Path:
    """Copy record, card and figures of a run, without its weights, and name them in the list of all cards."""
    model, place, listing = run.folder / "model", CARDS / run.name, CARDS / "README.md"
    place.mkdir(parents=True, exist_ok=True)
    for file in (CARD_NAME, RECORD_NAME, *read_record(model).figures):
        shutil.copyfile(model / file, place / file)
    known = listing.read_text(encoding="utf-8") if listing.is_file() else "| folder | run |\n|---|---|\n"
    lines = [line for line in known.splitlines() if f"]({run.name}/README.md)" not in line]
    last = max(index for index, line in enumerate(lines) if line.startswith("|"))
    page = "[docs/results/networks.md](../docs/results/networks.md)"
    lines.insert(last + 1, f"| [{run.name}]({run.name}/README.md) | {title}: {page} |")
    listing.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return place / CARD_NAME
