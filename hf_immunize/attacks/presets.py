"""The list of attackers, and the named budgets that run them.

Two audits can be compared only if their preset and its version are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from hf_immunize.attacks import finetune, probes
from hf_immunize.attacks.attacker import Attacker, ProbeBudget, TuningBudget
from hf_immunize.errors import ArgumentError
from hf_immunize.spectra.checks import check_count


# Raised whenever an attacker, a grid or a budget below changes.
PRESET_VERSION = 7

# Every attacker by its name: what presets, labels, tables and the report read.
ATTACKERS: dict[str, Attacker] = {one.name: one for module in (probes, finetune) for one in module.ATTACKERS}


def check_attackers(names: Iterable[str]) -> None:
    """Refuse names that are no attacker's."""
    if unknown := sorted(name for name in names if name not in ATTACKERS):
        raise ArgumentError(f"Expected attackers out of {', '.join(ATTACKERS)}, found {', '.join(unknown)}.")


@dataclass(frozen=True)
class Preset:
    """A suite of attackers with its budgets."""

    name: str
    probes: tuple[str, ...]  # at the classifier's input
    fine_tuning: tuple[str, ...]
    restoring: tuple[str, ...]  # those that know the public starting weights
    layer_probes: tuple[str, ...]  # at earlier layers
    max_layers: int  # evenly spaced, the last among them; inputs of ReLUs are on top
    layer_entries: int  # layers with more values per image are skipped, with a note
    probe_budget: ProbeBudget
    tuning_budget: TuningBudget
    flattened_probes: tuple[str, ...] = ("ridge",)  # at earlier layers without pooling, in the dual form
    # Those run on the benign and the unrelated task too, for their learning speed.
    benign_attackers: tuple[str, ...] = ("gd_line_search", "adamw", "ridge", "lora_r8")
    probe_seeds: int = 5
    layer_seeds: int = 3
    tuning_seeds: int = 3  # the first one chooses the settings of the others
    random_copies: int = 3  # with random weights, each attacked with a seed of its own; the first chooses the settings

    def __post_init__(self) -> None:
        check_attackers([*self.attackers, *self.benign_attackers])

    @property
    def attackers(self) -> tuple[str, ...]:
        """All of them, each once."""
        each = (*self.probes, *self.layer_probes, *self.flattened_probes, *self.fine_tuning, *self.restoring)
        return tuple(dict.fromkeys(each))

    def changed(self, *, steps: int | None = None, seeds: int | None = None) -> Preset:
        """The same attackers with another budget, and another name, since reports of it compare only with their like.

        `steps` are those of fine-tuning and of probes on mini-batches; the search for settings keeps its share.
        """
        for name, count in (("steps", steps), ("seeds", seeds)):
            if count is not None:
                check_count(count, name)
        changed = self if steps is seeds is None else replace(self, name=f"{self.name}, changed")
        if steps is not None:
            tuning = self.tuning_budget
            trial_steps = max(1, round(tuning.trial_steps * steps / tuning.steps))
            tuning = replace(tuning, steps=steps, trial_steps=trial_steps)
            changed = replace(changed, probe_budget=replace(self.probe_budget, steps=steps), tuning_budget=tuning)
        if seeds is not None:
            changed = replace(changed, probe_seeds=seeds, layer_seeds=seeds, tuning_seeds=seeds, random_copies=seeds)
        return changed

    def only(self, attackers: Iterable[str]) -> Preset:
        """The same budgets for some of the attackers; at earlier layers only those that the preset has there."""
        chosen = set(attackers)
        check_attackers(chosen)
        kept: dict[str, Any] = {
            name: tuple(one for one in getattr(self, name) if one in chosen)
            for name in ("layer_probes", "flattened_probes", "benign_attackers")
        }
        return replace(self, **_by_access(one for one in ATTACKERS.values() if one.name in chosen), **kept)


def _by_access(attackers: Iterable[Attacker]) -> dict[str, Any]:
    """Names of attackers by the fields of a preset that they stand in."""
    found: dict[str, tuple[str, ...]] = {"probes": (), "fine_tuning": (), "restoring": ()}
    for one in attackers:
        place = "probes" if one.access == "head_input" else "restoring" if one.restores else "fine_tuning"
        found[place] += (one.name,)
    return found


_SIZES = ("quick", "standard", "full")


def _preset(name: str, **options: Any) -> Preset:
    sizes = _SIZES[: _SIZES.index(name) + 1]
    return Preset(name, **_by_access(one for one in ATTACKERS.values() if one.preset in sizes), **options)


PRESETS = {
    "quick": _preset(
        "quick",
        layer_probes=("ridge",),
        max_layers=6,
        layer_entries=20_000,
        probe_budget=ProbeBudget(steps=150, batch_size=64),
        tuning_budget=TuningBudget(
            steps=100,
            trial_steps=25,
            optimizers={"adamw": (3e-4, 3e-3), "sgd": (1e-2,)},
            max_images=1000,
            max_test_images=500,
            evaluations=4,
        ),
        probe_seeds=3,
    ),
    "standard": _preset(
        "standard",
        layer_probes=("ridge", "lda"),
        max_layers=8,
        layer_entries=50_000,
        probe_budget=ProbeBudget(),
        tuning_budget=TuningBudget(
            trial_steps=60,
            optimizers={"adamw": (1e-4, 3e-4, 1e-3), "sgd": (1e-3, 1e-2)},
            max_images=4000,
            max_test_images=1000,
        ),
    ),
    "full": _preset(
        "full",
        layer_probes=("ridge", "whitening", "lda", "lbfgs", "adamw", "gd_line_search"),
        max_layers=64,
        layer_entries=400_000,
        probe_budget=ProbeBudget(
            descent_steps=100_000, iterations=500, steps=2000, rates=(0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
        ),
        tuning_budget=TuningBudget(
            steps=1500,
            trial_steps=300,
            optimizers={"adamw": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3), "adam": (1e-4, 1e-3), "sgd": (1e-3, 1e-2, 1e-1)},
            max_images=20_000,
            evaluations=12,
            max_test_images=5000,
        ),
        flattened_probes=("ridge", "lbfgs"),
        benign_attackers=("gd_line_search", "sgd", "adamw", "ridge", "lbfgs", "lora_r8"),
    ),
}


def find_preset(name: str) -> Preset:
    """A preset by its name."""
    if name not in PRESETS:
        raise ArgumentError(f"Expected a preset out of {', '.join(PRESETS)}, found {name!r}.")
    return PRESETS[name]
