"""The list of attackers, and the named budgets that run them.

Two audits can be compared only if their preset and its version are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from hf_immunize.attacks import descent, direct, finetune, restore
from hf_immunize.attacks.attacker import Attacker, ProbeBudget, TuningBudget, check_positive
from hf_immunize.errors import ArgumentError


# Raised whenever an attacker, a grid or a budget below changes.
PRESET_VERSION = 2

# Every attacker by its name: what presets, labels, tables and the report read.
ATTACKERS: dict[str, Attacker] = {
    one.name: one for module in (direct, descent, finetune, restore) for one in module.ATTACKERS
}


def find_attacker(name: str) -> Attacker | None:
    """An attacker by its name; ``lora_r<rank>`` has any rank. None where there is no such.

    >>> find_attacker("lora_r4").label
    'LoRA of rank 4'
    """
    if rank := re.fullmatch(r"lora_r([1-9]\d{0,5})", name):
        return ATTACKERS.get(name) or finetune.adapters(int(rank[1]))
    return ATTACKERS.get(name)


_SIZES = ("quick", "standard", "full")


def _members(size: str, access: str, restoring: bool = False) -> tuple[str, ...]:
    """Attackers of a preset."""
    sizes = _SIZES[: _SIZES.index(size) + 1]
    return tuple(
        one.name
        for one in ATTACKERS.values()
        if one.access == access and bool(one.shares) == restoring and one.preset in sizes
    )


@dataclass(frozen=True)
class Preset:
    """A suite of attackers with its budgets.

    Attributes:
        name: "quick", "standard" or "full".
        probes: Attackers at the classifier's input.
        layer_probes: Attackers at earlier layers.
        fine_tuning: Fine-tuning attackers.
        restoring: Attackers that know the public starting weights.
        benign_attackers: Attackers run on the benign and the unrelated task too, for their learning speed.
        probe_seeds: Seeds of probes at the classifier's input.
        layer_seeds: Seeds of probes at earlier layers.
        tuning_seeds: Seeds of fine-tuning; the first one chooses the settings of the others.
        flattened_probes: Attackers at earlier layers without pooling, in the dual form; none: not probed so.
        max_layers: At most so many layers, evenly spaced; the last is among them. Inputs of ReLUs are on top.
        layer_entries: Layers with more values per image are skipped, with a note.
        both_precisions: Whether probes at the classifier's input run in float64 and in float32, or in float64 alone.
            Features in half precision are read in float32, which holds them to the last bit.
        random: Whether a random initialisation is attacked too.
        probe_budget: Budget of each probe.
        tuning_budget: Budget of each fine-tuning attack.
    """

    name: str
    probes: tuple[str, ...]
    layer_probes: tuple[str, ...]
    fine_tuning: tuple[str, ...]
    restoring: tuple[str, ...]
    benign_attackers: tuple[str, ...]
    probe_seeds: int
    layer_seeds: int
    tuning_seeds: int
    flattened_probes: tuple[str, ...]
    max_layers: int
    layer_entries: int
    both_precisions: bool
    random: bool
    probe_budget: ProbeBudget
    tuning_budget: TuningBudget

    def __post_init__(self) -> None:
        names = ("probe_seeds", "layer_seeds", "tuning_seeds", "max_layers", "layer_entries")
        check_positive("{name} of a preset", **{name: getattr(self, name) for name in names})
        check_attackers([*self.attackers, *self.benign_attackers])

    @property
    def attackers(self) -> tuple[str, ...]:
        """All of them, each once."""
        each = (*self.probes, *self.layer_probes, *self.flattened_probes, *self.fine_tuning, *self.restoring)
        return tuple(dict.fromkeys(each))

    def describe(self) -> dict[str, Any]:
        """The budget as plain values, for the report and for the run's fingerprint."""
        return asdict(self)

    def changed(self, *, seconds: float | None = None, steps: int | None = None, seeds: int | None = None) -> Preset:
        """The same attackers with another budget, and another name, since reports of it compare only with their like.

        `steps` are those of fine-tuning and of probes on mini-batches; the search for settings keeps its share.

        >>> find_preset("quick").changed(steps=50).name
        'quick, changed'
        """
        check_positive("a budget of {name}", seconds=seconds, steps=steps, seeds=seeds)
        if seconds is steps is seeds is None:
            return self
        probes, tuning = self.probe_budget, self.tuning_budget
        if seconds is not None:
            probes, tuning = replace(probes, seconds=seconds), replace(tuning, seconds=seconds)
        if steps is not None:
            probes = replace(probes, steps=steps)
            trial_steps = max(1, round(tuning.trial_steps * steps / tuning.steps))
            tuning = replace(tuning, steps=steps, trial_steps=trial_steps)
        return replace(
            self,
            name=f"{self.name}, changed",
            probe_budget=probes,
            tuning_budget=tuning,
            probe_seeds=seeds or self.probe_seeds,
            layer_seeds=seeds or self.layer_seeds,
            tuning_seeds=seeds or self.tuning_seeds,
        )

    def only(self, attackers: Iterable[str]) -> Preset:
        """The same budgets for some of the attackers; at earlier layers only those that the preset has there."""
        chosen = set(attackers)
        check_attackers(chosen)
        every = [name for name in dict.fromkeys((*ATTACKERS, *sorted(chosen))) if name in chosen]
        found = [(name, attacker) for name in every if (attacker := find_attacker(name))]
        tuned = [(name, attacker) for name, attacker in found if attacker.access == "fine_tuning"]
        return replace(
            self,
            probes=tuple(name for name, attacker in found if attacker.access == "head_input"),
            layer_probes=tuple(name for name in self.layer_probes if name in chosen),
            flattened_probes=tuple(name for name in self.flattened_probes if name in chosen),
            fine_tuning=tuple(name for name, attacker in tuned if not attacker.shares),
            restoring=tuple(name for name, attacker in tuned if attacker.shares),
            benign_attackers=tuple(name for name in self.benign_attackers if name in chosen),
        )


def check_attackers(names: Iterable[str]) -> None:
    """Refuse names that are no attacker's."""
    if unknown := sorted(name for name in names if find_attacker(name) is None):
        raise ArgumentError(f"Expected attackers out of {', '.join(ATTACKERS)}, found {', '.join(unknown)}.")


def _preset(name: str, **options: Any) -> Preset:
    return Preset(
        name,
        probes=_members(name, "head_input"),
        fine_tuning=_members(name, "fine_tuning"),
        restoring=_members(name, "fine_tuning", restoring=True),
        layer_seeds=3,
        tuning_seeds=3,
        **options,
    )


PRESETS = {
    "quick": _preset(
        "quick",
        layer_probes=("ridge",),
        benign_attackers=("gd_line_search", "adamw", "ridge", "lora_r8"),
        probe_seeds=3,
        flattened_probes=("ridge",),
        max_layers=6,
        layer_entries=20_000,
        both_precisions=False,
        random=False,
        probe_budget=ProbeBudget(steps=150, batch_size=64),
        tuning_budget=TuningBudget(
            steps=100,
            trial_steps=25,
            optimizers={"adamw": (3e-4, 3e-3), "sgd": (1e-2,)},
            max_images=1000,
            max_test_images=500,
            evaluations=4,
        ),
    ),
    "standard": _preset(
        "standard",
        layer_probes=("ridge", "lda"),
        benign_attackers=("gd_line_search", "adamw", "ridge", "lora_r8"),
        probe_seeds=5,
        flattened_probes=("ridge",),
        max_layers=8,
        layer_entries=50_000,
        both_precisions=True,
        random=False,
        probe_budget=ProbeBudget(),
        tuning_budget=TuningBudget(
            steps=300,
            trial_steps=60,
            optimizers={"adamw": (1e-4, 3e-4, 1e-3), "sgd": (1e-3, 1e-2)},
            max_images=4000,
            max_test_images=1000,
        ),
    ),
    "full": _preset(
        "full",
        layer_probes=("ridge", "whitening", "lda", "lbfgs", "adamw", "gd_line_search"),
        benign_attackers=("gd_line_search", "sgd", "adamw", "ridge", "lbfgs", "lora_r8"),
        probe_seeds=5,
        flattened_probes=("ridge", "lbfgs"),
        max_layers=64,
        layer_entries=400_000,
        both_precisions=True,
        random=True,
        probe_budget=ProbeBudget(
            descent_steps=100_000, iterations=500, steps=2000, rates=(0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
        ),
        tuning_budget=TuningBudget(
            steps=1500,
            trial_steps=300,
            optimizers={
                "adamw": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
                "adam": (1e-4, 1e-3),
                "sgd": (1e-3, 1e-2, 1e-1),
            },
            max_images=20_000,
            max_test_images=5000,
            evaluations=12,
        ),
    ),
}


def find_preset(name: str) -> Preset:
    """A preset by its name.

    >>> find_preset("quick").probe_seeds
    3
    """
    if name not in PRESETS:
        raise ArgumentError(f"Expected a preset out of {', '.join(PRESETS)}, found {name!r}.")
    return PRESETS[name]
