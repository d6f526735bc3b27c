"""The audit as judge: linear probes at every layer, and fine-tuning of the last stage, by adapters, of everything."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.networks.data import Data
from examples.networks.probes import joined
from hf_immunize.attacks.attacker import TuningBudget
from hf_immunize.attacks.presets import Preset, find_preset
from hf_immunize.audit.report import AuditReport
from hf_immunize.audit.result import AuditResult
from hf_immunize.audit.run import audit
from hf_immunize.audit.statistics import Summary, deviations, of_class, steps_ratios, strongest, summarize


# Linear, at the classifier's input; ridge at the other layers.
PROBES = ["ridge", "lda", "gd_line_search", "lbfgs"]
TUNERS = ("last_stage", "lora_r4", "lora_r8", "lora_r32", "whole_network")
HALF = 0.5


def preset_of(spec: dict[str, Any]) -> Preset:
    """The attackers' budget."""
    budget = {"optimizers": {name: tuple(rates) for name, rates in spec["optimizers"].items()}}
    budget |= {name: spec[name] for name in ("steps", "trial_steps", "max_images", "max_test_images", "evaluations")}
    seeds = dict.fromkeys(("probe_seeds", "layer_seeds", "tuning_seeds"), spec["seeds"])
    return replace(
        find_preset("quick").only(PROBES),
        name="fine-tuning",
        layer_probes=("ridge",),
        flattened_probes=("ridge",),
        fine_tuning=tuple(spec.get("tuners", TUNERS)),
        benign_attackers=("ridge",),
        max_layers=spec["layers"],
        layer_entries=spec["layer_values"],
        tuning_budget=TuningBudget(**budget),
        **seeds,
    )


def attack(model: str, data: Data, spec: dict[str, Any], folder: Path) -> AuditReport:
    """Run all attacks on one model; after an interruption, goes on with those that are not done.

    Args:
        model: Folder.
        data: Of which harmful and unrelated images are attacked.
        spec: The experiment's ``attacks``.
        folder: Where outcomes are kept.

    Returns:
        The report, which is in `folder` too.
    """
    if (folder / "audit.json").is_file():
        return AuditReport.load(folder)
    images = {task: (data.load(task, "train"), data.load(task, "test")) for task in ("harmful", "unrelated")}
    report = audit(model, **images, preset=preset_of(spec), run_dir=folder, **_limits(spec))
    report.write(folder)
    return report


def _limits(spec: dict[str, Any]) -> dict[str, Any]:
    limit = {"max_images": spec["max_probe_images"]} if spec.get("max_probe_images") else {}
    return {"keep_features": 0, "seed": 0, **limit}


def look_before_rectifiers(model: str, data: Data, spec: dict[str, Any], folder: Path) -> AuditReport:
    """Ridge at every layer and at what enters the rectifiers, of the harmful task alone.

    Args:
        model: Folder.
        data: As in `attack`.
        spec: As in `attack`.
        folder: Where outcomes are kept.

    Returns:
        The report, which is in `folder` too.
    """
    if (folder / "audit.json").is_file():
        return AuditReport.load(folder)
    preset = replace(preset_of(spec), probes=("ridge",), fine_tuning=())
    images = (data.load("harmful", "train"), data.load("harmful", "test"))
    report = audit(model, harmful=images, preset=preset, run_dir=folder, **_limits(spec))
    report.write(folder)
    return report


def found(
    sides: tuple[AuditReport, AuditReport],
    rectifiers: tuple[AuditReport, AuditReport],
    utility: dict[str, Any],
    first_third: list[str],
) -> dict[str, Any]:
    """What the attacks read before and after.

    Args:
        sides: Of the starting model and of the immunized one.
        rectifiers: Likewise, with what enters rectifiers.
        utility: Benign accuracy of both.
        first_third: Names of layers in the first third of the network.

    Returns:
        ``chance``, ``head``, ``later`` (outputs of layers from the second third on), ``entering`` (what enters
        rectifiers there), ``any_layer``, ``unrelated``, each with the strongest probe before and after; ``tuning``:
        attacker to accuracies, curves, steps to half of what the starting model gives above chance, and signed
        deviation.
    """
    data = joined(*sides, ("start", "immunized"), utility).data
    summaries = [one for one in summarize(data) if one.access != "fine_tuning" and not _enters(one)]
    early = tuple(f"{name}{end}" for name in first_third for end in (" ", "."))
    later = [one for one in summaries if not one.layer.removeprefix("input of ").startswith(early)]
    looked = summarize(joined(*rectifiers, ("start", "immunized"), utility).data)
    entering = [one for one in looked if _enters(one) and not one.layer.removeprefix("input of ").startswith(early)]
    return {
        "chance": data.tasks["harmful"].chance,
        "images": [data.tasks["harmful"].train_size, data.tasks["harmful"].test_size],
        "head": _both(summaries, "harmful", "head_input"),
        "later": _both(later, "harmful", "any_layer"),
        "entering": _both(entering, "harmful", "any_layer") if entering else None,
        "any_layer": _both([*summaries, *looked], "harmful", "any_layer"),
        "unrelated": _both(summaries, "unrelated", "head_input"),
        "tuning": _tuning(data),
    }


def _enters(one: Summary) -> bool:
    """Whether it reads what enters a rectifier."""
    return one.layer.startswith("input of ") and "activation" in one.layer


def _both(summaries: list[Summary], task: str, access: str) -> dict[str, Any]:
    sides = {}
    for moment, subject in (("before", "reference"), ("after", "immunized")):
        best = strongest(of_class(summaries, subject, task, access))
        assert best is not None, "closed forms are always done"
        sides[moment] = {"accuracy": best.mean, "attacker": best.attacker, "layer": best.layer}
    return sides


def _tuning(data: AuditResult) -> dict[str, Any]:
    tuned = [one for one in summarize(data) if one.access == "fine_tuning" and one.task == "harmful"]
    ratios = {one.attacker: one for one in steps_ratios(data) if one.access == "fine_tuning" and one.share == HALF}
    signed = {one.attacker: one.signed for one in deviations(data)}
    sides: dict[str, Any] = {}
    for one in tuned:
        moment = {"reference": "before", "immunized": "after"}[one.subject]
        runs = [
            {"seed": run.seed, "steps": run.steps, "curve": run.curve, "settings": run.settings}
            for run in data.outcomes
            if (run.attacker, run.subject, run.task) == (one.attacker, one.subject, "harmful")
        ]
        sides.setdefault(one.attacker, {})[moment] = {"accuracy": one.mean, "diverged": one.diverged, "runs": runs}
    for attacker, side in sides.items():
        ratio = ratios.get(attacker)
        side["half"] = ratio and {
            "before": ratio.reference,
            "after": ratio.immunized,
            "ratio": ratio.ratio,
            "is_bound": ratio.is_bound,
        }
        side["deviation"] = signed.get(attacker)
    return sides
