"""The strongest probes of a model by class of attackers: the audit, with the experiment's attackers."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.networks.data import Data
from hf_immunize.attacks.presets import ATTACKERS, PRESET_VERSION, Preset, find_preset
from hf_immunize.audit.report import AuditReport
from hf_immunize.audit.result import AuditResult, Utility
from hf_immunize.audit.run import audit
from hf_immunize.audit.statistics import Summary, of_class, strongest, summarize
from hf_immunize.errors import ArgumentError


# Probes at the classifier's input that are no linear classifier of it.
NOT_LINEAR = ("knn", "mlp")
TASKS = ("harmful", "unseen", "unrelated")
ACCESSES = ("head_input", "any_layer", "fine_tuning")
DEFAULTS: dict[str, Any] = {
    "preset": "quick",
    "attackers": ["ridge", "whitening", "lda", "conjugate_gradient", "gd_line_search", "lbfgs"],
    "seeds": 1,
    "layers": 4,
    "layer_values": 20_000,
}


def settings(spec: dict[str, Any] | None, attackers: list[str] | None) -> dict[str, Any]:
    """The audit's settings of an experiment, completed; `attackers` in place of its own.

    Raises:
        ArgumentError: If an attacker is unknown, or puts public weights back.
    """
    found = {**DEFAULTS, **(spec or {}), **({"attackers": attackers} if attackers else {})}
    if restoring := [name for name in found["attackers"] if name in ATTACKERS and ATTACKERS[name].shares]:
        raise ArgumentError(
            f"Expected probes and fine-tuning, found {', '.join(sorted(restoring))}: whoever has the public weights "
            "has the starting model, whose figures stand beside in every row."
        )
    find_preset(found["preset"]).only(found["attackers"])
    # What a preset looks at differs between versions.
    return found | {"preset_version": PRESET_VERSION}


def preset_of(spec: dict[str, Any]) -> Preset:
    """The budget of the attacks; the same probes on all tasks, so that each is at its worst."""
    chosen = find_preset(spec["preset"]).only(spec["attackers"]).changed(seeds=spec["seeds"])
    return replace(
        chosen,
        benign_attackers=tuple(name for name in chosen.probes),
        max_layers=spec["layers"],
        layer_entries=spec["layer_values"],
        both_precisions=False,
    )


def attack(model: str, data: Data, spec: dict[str, Any], folder: Path) -> AuditReport:
    """Run all attacks on one model; after an interruption, goes on with those that are not done.

    Args:
        model: Folder or Hub id.
        data: Of which harmful, unseen and unrelated images are attacked.
        spec: As `settings` gives them.
        folder: Where outcomes are kept.

    Returns:
        The report, which is in `folder` too.
    """
    if (folder / "audit.json").is_file():
        return AuditReport.load(folder)
    images = {task: (data.load(task, "train"), data.load(task, "test")) for task in TASKS if task in data.paths}
    report = audit(model, **images, preset=preset_of(spec), run_dir=folder, keep_features=2**29, seed=0)
    report.write(folder)
    shutil.rmtree(folder / "features", ignore_errors=True)
    return report


def joined(before: AuditReport, after: AuditReport, names: tuple[str, str], utility: dict[str, Any]) -> AuditReport:
    """One report of attacks on the starting model, run once for all methods, and on the immunized one."""
    data = after.data
    known = ("size", "immunized", "reference", "difference", "interval")
    reference = [replace(one, subject="reference") for one in before.data.outcomes]
    warnings = [one for one in data.warnings if not one.startswith("No reference was given")]
    found = AuditResult(
        **{
            **vars(data),
            "reference": names[0],
            "model": names[1],
            "outcomes": reference + data.outcomes,
            "utility": Utility(**{name: utility[name] for name in known}),
            "seconds": before.data.seconds + data.seconds,
            "warnings": warnings,
            "spectra": [],
            "rir": {},
        }
    )
    return AuditReport(found)


def strongest_by_class(report: AuditReport) -> dict[str, Any]:
    """The strongest attacker of each class on each task, on both models, and the strongest linear probes.

    Returns:
        Task to ``chance``, ``images``, ``classes``, ``linear`` (a linear probe at the classifier's input),
        ``any_layer`` (at any layer, linear), and ``by_class`` (all attackers), each with ``before`` and ``after``.
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
    sides = {
        moment: strongest(of_class(summaries, subject, task, access))
        for moment, subject in (("before", "reference"), ("after", "immunized"))
    }
    if any(one is None for one in sides.values()):
        return None
    return {
        moment: {"accuracy": one.mean, "attacker": one.attacker, "layer": one.layer}
        for moment, one in sides.items()
        if one is not None
    }
