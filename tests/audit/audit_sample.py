"""An audit as it might come out, its outcomes made up, for tests of what is said about them."""

import dataclasses
import math
from functools import cache

import numpy as np

from hf_immunize.audit.report import AuditReport
from hf_immunize.audit.result import AuditResult, FeatureSpectrum, Outcome, TaskSummary, Utility


CHANCE = 0.01
STEPS = [1, 3, 10, 30, 100, 300, 1000, 3000]
LAYERS = ("stem", "stages.1 (pooled)", "stages.2 (flattened)")


def rising(best, half, steps=STEPS, chance=CHANCE):
    """A curve from chance to `best` that is half-way after `half` steps."""
    return [chance + (best - chance) * (1 - math.exp(-math.log(2) * step / half)) for step in steps]


def attack(attacker, access, subject, accuracy, *, seeds=5, task="harmful", layer="classifier", half=None, **kwargs):
    """One attack with its seeds; `half` makes it one that takes steps."""
    noise = np.random.default_rng(0).normal(0, 0.002, seeds)
    outcomes = []
    for seed in range(seeds):
        best = float(np.clip(accuracy + noise[seed], 0, 1))
        curve = rising(best, half) if half else []
        made = {"accuracy": curve[-1] if half else best, "steps": STEPS if half else [], "curve": curve} | kwargs
        made = {"seconds": 1 + 0.1 * seed} | made
        outcomes.append(Outcome(attacker, access, subject, task, layer, seed, "float64", **made))
    return outcomes


def lost(attacker, status, note, *, access="head_input", subject="immunized", layer="classifier", seed=0, **kwargs):
    """A run without a result."""
    return Outcome(attacker, access, subject, "harmful", layer, seed, "float64", status, note, **kwargs)


def probes(subject, accuracy, slow=1.0, **kwargs):
    """The probes at the classifier's input; first-order ones `slow` times slower than on the reference."""
    return [
        *attack("gd_line_search", "head_input", subject, accuracy, half=10 * slow, **kwargs),
        *attack("adamw", "head_input", subject, accuracy, half=8 * max(1, slow**0.2), **kwargs),
        *attack("ridge", "head_input", subject, accuracy, **kwargs),
        *attack("knn", "head_input", subject, CHANCE + 0.6 * (accuracy - CHANCE), **kwargs),
    ]


def layers(subject, accuracy, **kwargs):
    return [
        one
        for index, layer in enumerate(LAYERS)
        for one in attack("ridge", "any_layer", subject, accuracy * (0.4 + 0.3 * index), layer=layer, **kwargs)
    ]


def fine_tuning(subject, accuracy, slow=1.0, **kwargs):
    tuners = (("last_stage", 0.9, 60), ("whole_network", 1.0, 80), ("lora_r8", 0.8, 50), ("bias_only", 0.5, 60))
    return [
        one
        for name, share, half in tuners
        for one in attack(name, "fine_tuning", subject, accuracy * share, half=half * slow, layer=name, **kwargs)
    ]


def make(outcomes, utility=Utility(2000, 0.742, 0.75, -0.008, (-0.019, 0.003)), reference="org/base", **kwargs):  # noqa: B008
    """An audit around these outcomes."""
    tasks = {
        "harmful": TaskSummary("harmful", "Cars-98", 3115, 2000, 98, CHANCE),
        "benign": TaskSummary("benign", "ImageNet samples", 700, 2000, 1000, 0.001),
        "unseen": TaskSummary("unseen", "the other 98 classes", 3000, 2000, 98, CHANCE),
        "unrelated": TaskSummary("unrelated", "digits", 1000, 2000, 10, 0.1),
    }
    used = {"harmful", "benign", *(one.task for one in outcomes)}
    data = {
        "model": "org/immunized-mobilenet",
        "reference": reference,
        "preset": "standard",
        "preset_version": 1,
        "budget": {"steps": 3000, "samples": 3115, "trials": 12},
        "tasks": {name: task for name, task in tasks.items() if name in used},
        "outcomes": outcomes,
        "utility": utility,
        "rir": {
            "rir": 3.2e4,
            "log10_rir": 4.5,
            "harmful_ratio": 3.5e4,
            "benign_ratio": 1.1,
            "bound": None,
            "protocol": "intercept",
        },
        "machine": {"processor": "2 cores", "torch": "2.13.0"},
        "seconds": 271.5,
    }
    return AuditResult(**data | kwargs)


def with_random(ours, floor=0.05, theirs=0.486, **kwargs):
    """Probes at the classifier's input of the immunized model, its reference and random weights."""
    subjects = {"immunized": ours, "reference": theirs, "random": floor}
    return make([one for subject, read in subjects.items() for one in probes(subject, read)], **kwargs)


def sample_data(**kwargs):
    """Immunized at the classifier's input, slowed in fine-tuning by a factor of two, earlier layers as before."""
    head = [*probes("immunized", 0.012), *probes("reference", 0.486)]
    earlier = [*layers("immunized", 0.53), *layers("reference", 0.53)]
    tuned = [*fine_tuning("immunized", 0.51, slow=2), *fine_tuning("reference", 0.52)]
    other = [
        *attack("ridge", "head_input", "immunized", 0.016, task="unseen"),
        *attack("ridge", "head_input", "reference", 0.435, task="unseen"),
        *attack("ridge", "head_input", "immunized", 0.976, task="unrelated"),
        *attack("ridge", "head_input", "reference", 0.98, task="unrelated"),
        *attack("gd_line_search", "head_input", "immunized", 0.72, task="benign", half=9),
        *attack("gd_line_search", "head_input", "reference", 0.73, task="benign", half=10),
    ]
    odd = [lost("momentum", "diverged", "the loss is NaN", seed=seed) for seed in range(5)]
    skipped = lost("ridge", "skipped", "not enough memory: 41 GB", access="any_layer", layer="stem (flattened)")
    kappas = (("reference", "harmful", 5.0), ("reference", "benign", 4.9), ("immunized", "harmful", 9.6))
    spectra = [FeatureSpectrum(subject, task, 3115, 64, decades, False) for subject, task, decades in kappas]
    warnings = ["3 harmful test images are also among the benign training images."]
    data = {"spectra": spectra, "warnings": warnings} | kwargs
    return make([*head, *earlier, *tuned, *other, *odd, skipped], **data)


HOSTILE = "</td></style><script>alert('x')</script><img src=x onerror=alert(1)>\n\"' {{ 7*7 }} {% raw %} javascript:x"


def named_data(name, data):
    """The audit with every string from outside called so."""
    changed = {"attacker": name, "layer": name, "precision": name, "note": name, "settings": {name: name}}
    return dataclasses.replace(
        data,
        **dict.fromkeys(("model", "reference", "preset"), name),
        budget={name: name},
        warnings=[name],
        machine={name: name},
        tasks={task: dataclasses.replace(one, dataset=name) for task, one in data.tasks.items()},
        outcomes=[dataclasses.replace(one, **changed) for one in data.outcomes],
        spectra=[FeatureSpectrum("immunized", "harmful", 10, 2, 0.6, False)],
    )


@cache
def sample_html():
    """The sample's report, drawn once for all tests."""
    return AuditReport(sample_data()).to_html()


@cache
def hostile_html():
    """A report in which every string from outside is hostile."""
    return AuditReport(named_data(HOSTILE, sample_data())).to_html()
