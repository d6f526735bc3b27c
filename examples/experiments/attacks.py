"""The strongest probes of a model by class of attackers: the audit, with the experiment's attackers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.experiments.tasks import Data
from hf_immunize.attacks.presets import ATTACKERS, PRESET_VERSION, find_preset
from hf_immunize.audit.report import AuditReport
from hf_immunize.audit.result import Utility
from hf_immunize.audit.run import audit
from hf_immunize.audit.statistics import Summary, of_class, strongest, summarize
from hf_immunize.errors import ArgumentError


# Probes at the classifier's input that are no linear classifier of it.
NOT_LINEAR = ("knn", "mlp")
TASKS = ("harmful", "unseen", "unrelated")
ACCESSES = ("head_input", "any_layer", "fine_tuning")
DEFAULTS: dict[str, Any] = {
    "preset": "quick",
    "attackers": ["ridge", "whitening", "lda", "gd_line_search", "lbfgs"],
    "seeds": 1,
    "layers": 4,
    "layer_values": 20_000,
}


def settings(spec: dict[str, Any] | None, attackers: list[str] | None) -> dict[str, Any]:
    """The audit's settings of a task, completed; `attackers` in place of its own."""
    found = {**DEFAULTS, **(spec or {}), **({"attackers": attackers} if attackers else {})}
    if restoring := [name for name in found["attackers"] if name in ATTACKERS and ATTACKERS[name].restores]:
        raise ArgumentError(
            f"Expected probes and fine-tuning, found {', '.join(sorted(restoring))}: whoever has the public weights "
            "has the starting model, whose figures are in every row."
        )
    find_preset(found["preset"]).only(found["attackers"])
    # What a preset looks at differs between versions.
    return found | {"preset_version": PRESET_VERSION}


def attack(model: str, data: Data, spec: dict[str, Any], folder: Path) -> None:
    """Run all attacks on one model and keep the report; after an interruption, go on with those that are not done."""
    if (folder / "audit.json").is_file():
        return
    chosen = find_preset(spec["preset"]).only(spec["attackers"]).changed(seeds=spec["seeds"])
    # The same probes on all tasks, so that each is at its worst.
    chosen = replace(
        chosen,
        benign_attackers=tuple(chosen.probes),
        max_layers=spec["layers"],
        layer_entries=spec["layer_values"],
    )
    images = {task: (data.load(task, "train"), data.load(task, "test")) for task in TASKS if task in data.paths}
    audit(model, **images, preset=chosen, run_dir=folder, seed=0).write(folder)


def joined(before: AuditReport, after: AuditReport, names: tuple[str, str], utility: dict[str, Any]) -> AuditReport:
    """One report of attacks on the starting model, run once for all methods, and on the immunized one."""
    known = ("size", "immunized", "reference", "difference", "interval")
    found = replace(
        after.data,
        reference=names[0],
        model=names[1],
        outcomes=[*(replace(one, subject="reference") for one in before.data.outcomes), *after.data.outcomes],
        utility=Utility(**{name: utility[name] for name in known}),
        seconds=before.data.seconds + after.data.seconds,
        spectra=[],
        rir={},
    )
    return AuditReport(found)


def strongest_by_class(report: AuditReport) -> dict[str, Any]:
    """Task to chance, sizes, and the strongest attackers before and after.

    `linear` is of linear probes at the classifier's input, `any_layer` of those at any layer, `by_class` of all.
    """
    summaries, found = summarize(report.data), {}
    linear = [one for one in summaries if one.access != "fine_tuning" and one.attacker not in NOT_LINEAR]
    for name, task in report.data.tasks.items():
        found[name] = {
            "chance": task.chance,
            "images": [task.train_size, task.test_size],
            "classes": task.num_classes,
            "linear": _both(linear, name, "head_input"),
            "any_layer": _both(linear, name, "any_layer"),
            "by_class": {access: _both(summaries, name, access) for access in ACCESSES},
        }
    return found


def _both(summaries: list[Summary], task: str, access: str) -> dict[str, Any] | None:
    """None where nothing of the class was tried, or none of it was done."""
    found = {}
    for moment, subject in (("before", "reference"), ("after", "immunized")):
        one = strongest(of_class(summaries, subject, task, access))
        if one is None:
            return None
        found[moment] = {"accuracy": one.mean, "attacker": one.attacker, "layer": one.layer}
    return found
