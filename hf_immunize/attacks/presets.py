"""Named budgets of attackers. Two audits can be compared only if their preset and its version are the same."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from hf_immunize.errors import ArgumentError


# Raised whenever an attacker, a grid or a budget below changes.
PRESET_VERSION = 2


@dataclass(frozen=True)
class ProbeBudget:
    """What one probe may spend, tuning included.

    Attributes:
        descent_steps: Steps of gradient descent with exact line search (each over all data).
        iterations: Iterations of conjugate gradient; a third as many of L-BFGS for each penalty, which starts where
            the last one ended.
        steps: Steps of optimizers on mini-batches; half as many for each learning rate tried.
        batch_size: Images in a mini-batch.
        rates: Learning rates tried, as multiples of a natural one on features scaled to a mean square of 1:
            ``C/λ_max(ZᵀZ/N)`` for SGD and momentum (C classes), 0.01 for Adam and AdamW.
        ridge_decades: How many decades below ``σ_max²`` the ridge strengths reach.
        validation_fraction: Part of the training images on which settings are chosen; the attack is then run anew on
            all of them.
        seconds: Wall-clock time of an attack on mini-batches (SGD to AdamW, the network), half of it for the search
            of its settings, shared among these; its steps and rates then end early. None: as long as its steps take.
            Closed forms, solvers and neighbours run whole.
    """

    descent_steps: int = 10_000
    iterations: int = 100
    steps: int = 300
    batch_size: int = 128
    rates: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)
    ridge_decades: int = 18
    validation_fraction: float = 0.2
    seconds: float | None = None

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("descent_steps", "iterations", "steps", "batch_size")}
        _check_positive("{name} of probes", **counts, seconds=self.seconds)


@dataclass(frozen=True)
class TuningBudget:
    """What one fine-tuning attack may spend.

    Attributes:
        steps: Steps of the attack with the settings chosen.
        trial_steps: Steps of each setting tried.
        batch_size: Images in a batch.
        optimizers: Optimizer to the learning rates tried.
        max_images: Training images at most.
        max_test_images: Test images at most.
        evaluations: How often accuracy is measured along the way.
        seconds: Wall-clock time of an attack, half of it for the search of its settings, shared among these; its steps
            and rates then end early. Copying the model, and the one pass through a frozen part, come on top. None: as
            long as its steps take.
    """

    steps: int = 300
    trial_steps: int = 100
    batch_size: int = 32
    optimizers: dict[str, tuple[float, ...]] | None = None
    max_images: int = 5000
    max_test_images: int = 2000
    evaluations: int = 8
    seconds: float | None = None

    def __post_init__(self) -> None:
        names = ("steps", "trial_steps", "batch_size", "max_images", "max_test_images", "evaluations", "seconds")
        _check_positive("{name} of fine-tuning", **{name: getattr(self, name) for name in names})


def _check_positive(what: str, **numbers: Any) -> None:
    for name, value in numbers.items():
        kinds, most = (
            ((int, float), math.inf) if name == "seconds" else ((int,), _MOST_SEEDS if "seeds" in name else _MOST)
        )
        if value is None:
            continue
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value <= most or value == math.inf:
            whole = "" if name == "seconds" else f", a whole number up to {most:,}"
            raise ArgumentError(f"Expected {what.format(name=name)} above 0{whole}, found {value!r}.")


# More steps or seeds than this never end, and their numbers fill all memory before the first.
_MOST, _MOST_SEEDS = 100_000_000, 10_000

_PROBES = (
    "ridge",
    "whitening",
    "lda",
    "conjugate_gradient",
    "gd_line_search",
    "sgd",
    "momentum",
    "adam",
    "adamw",
    "batchnorm_adamw",
    "lbfgs",
    "logistic_regression",
    "knn",
    "mlp",
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
        tuning_seeds: Seeds of fine-tuning.
        flattened_probes: Attackers at earlier layers without pooling, in the dual form; none: not probed so.
        max_layers: At most so many layers, evenly spaced; the last is among them. What enters rectifiers is on top.
        layer_entries: Layers with more values an image are skipped, with a note.
        both_precisions: Whether probes at the classifier's input run in float64 and in float32, or in float64 alone.
            Features of a checkpoint in half precision are read in float32, which holds them to the last bit: there
            are no decompositions in half precision, and an attacker would gain nothing by them.
        random: Whether a random initialisation is attacked too.
        probe_budget: Budget of each probe.
        tuning_budget: Budget of each fine-tuning attack; the first seed chooses the settings of the others.
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
        _check_positive("{name} of a preset", **{name: getattr(self, name) for name in names})

    def describe(self) -> dict[str, Any]:
        """The budget as plain values, for the report and for the run's fingerprint."""
        return asdict(self)

    def changed(self, *, seconds: float | None = None, steps: int | None = None, seeds: int | None = None) -> Preset:
        """The same attackers with another budget; its name says so, since reports of it compare with their like only.

        Args:
            seconds: Of each attack that trains step by step; see `ProbeBudget` and `TuningBudget`.
            steps: Of fine-tuning and of probes on mini-batches; the search for settings takes the same part as before.
            seeds: Of every attack.

        Returns:
            The changed preset; itself where nothing is given.

        Raises:
            ArgumentError: If a number is not positive, or steps or seeds are not whole.

        Example:
            >>> find_preset("quick").changed(steps=50).name
            'quick, changed'
        """
        _check_positive("a budget of {name}", seconds=seconds, steps=steps, seeds=seeds)
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

    def only(self, attackers: list[str] | tuple[str, ...]) -> Preset:
        """The same budgets for some of the attackers.

        Args:
            attackers: Names out of `ALL_ATTACKERS`.

        Returns:
            The smaller preset. Probes that are named run at the classifier's input; at earlier layers too where the
            preset has them there.

        Raises:
            ArgumentError: If a name is unknown.
        """
        unknown = sorted(set(attackers) - set(ALL_ATTACKERS))
        if unknown:
            raise ArgumentError(f"Expected attackers out of {', '.join(ALL_ATTACKERS)}, found {', '.join(unknown)}.")
        chosen = set(attackers)
        return replace(
            self,
            probes=tuple(name for name in _PROBES if name in chosen),
            layer_probes=tuple(name for name in self.layer_probes if name in chosen),
            flattened_probes=tuple(name for name in self.flattened_probes if name in chosen),
            fine_tuning=tuple(name for name in FINE_TUNING if name in chosen),
            restoring=tuple(name for name in RESTORING if name in chosen),
            benign_attackers=tuple(name for name in self.benign_attackers if name in chosen),
        )


FINE_TUNING = ("last_stage", "whole_network", "bias_only", "lora_r2", "lora_r8", "lora_r32")
RESTORING = ("restore_swap", "restore_interpolation")
ALL_ATTACKERS = (*_PROBES, *FINE_TUNING, *RESTORING)

PRESETS = {
    "quick": Preset(
        name="quick",
        probes=("ridge", "whitening", "lda", "conjugate_gradient", "gd_line_search", "adamw", "lbfgs", "knn", "mlp"),
        layer_probes=("ridge",),
        fine_tuning=("last_stage", "whole_network", "lora_r8"),
        restoring=RESTORING,
        benign_attackers=("gd_line_search", "adamw", "ridge", "lora_r8"),
        probe_seeds=3,
        layer_seeds=3,
        tuning_seeds=3,
        flattened_probes=("ridge",),
        max_layers=6,
        layer_entries=20_000,
        both_precisions=False,
        random=False,
        probe_budget=ProbeBudget(descent_steps=10_000, steps=150, batch_size=64, rates=(0.01, 0.1, 1.0, 10.0, 100.0)),
        tuning_budget=TuningBudget(
            steps=100,
            trial_steps=25,
            optimizers={"adamw": (3e-4, 3e-3), "sgd": (1e-2,)},
            max_images=1000,
            max_test_images=500,
            evaluations=4,
        ),
    ),
    "standard": Preset(
        name="standard",
        probes=_PROBES,
        layer_probes=("ridge", "lda"),
        fine_tuning=("last_stage", "whole_network", "bias_only", "lora_r8"),
        restoring=RESTORING,
        benign_attackers=("gd_line_search", "adamw", "ridge", "lora_r8"),
        probe_seeds=5,
        layer_seeds=3,
        tuning_seeds=3,
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
    "full": Preset(
        name="full",
        probes=_PROBES,
        layer_probes=("ridge", "whitening", "lda", "lbfgs", "adamw", "gd_line_search"),
        fine_tuning=FINE_TUNING,
        restoring=RESTORING,
        benign_attackers=("gd_line_search", "sgd", "adamw", "ridge", "lbfgs", "lora_r8"),
        probe_seeds=5,
        layer_seeds=3,
        tuning_seeds=3,
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

    Args:
        name: "quick", "standard" or "full".

    Returns:
        The preset.

    Raises:
        ArgumentError: If there is none of that name.

    Example:
        >>> find_preset("quick").probe_seeds
        3
    """
    if name not in PRESETS:
        raise ArgumentError(f"Expected a preset out of {', '.join(PRESETS)}, found {name!r}.")
    return PRESETS[name]
