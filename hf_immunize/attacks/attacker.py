"""One attack: its name, what it may spend, how it runs, and what it found."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from hf_immunize.errors import ArgumentError


@dataclass(frozen=True)
class Attacker:
    """One attacker. Its module lists it in ``ATTACKERS``; presets, labels, tables and the report read that list."""

    name: str  # in commands and files
    label: str  # in reports
    access: Literal["head_input", "fine_tuning"]  # what it has: the features at the classifier's input, or the weights
    closed_form: bool  # takes no gradient steps, which ill-conditioning slows
    # (ProbeData, ProbeBudget, seed) for features, (model, Part, TuningBudget, seed) with head_module and chosen for
    # fine-tuning, ({share: ProbeData}, ProbeBudget, seed) where there are shares.
    run: Callable[..., Found]
    preset: str = "full"  # the smallest that runs it: "quick", "standard" or "full"
    where: str = ""  # what it trains, with access to the weights
    shares: tuple[float, ...] = ()  # of the public starting weights; the audit makes the features of each mixture


@dataclass(frozen=True)
class Found:
    """What one attack found; `Outcome` has the meaning of the fields."""

    accuracy: float | None
    steps: list[int] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    trials: int = 1
    status: str = "done"
    note: str = ""
    validation: float | None = None  # by which the settings were chosen, where it is known


@dataclass(frozen=True)
class ProbeBudget:
    """What one probe may spend, tuning included."""

    descent_steps: int = 10_000  # of gradient descent with exact line search, each over all data
    iterations: int = 100  # of conjugate gradient; a third as many of L-BFGS for each penalty
    steps: int = 300  # of optimizers on mini-batches; half as many for each learning rate tried
    batch_size: int = 128
    # Multiples of a natural learning rate on features scaled to a mean square of 1.
    rates: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)
    ridge_decades: int = 18  # below σ_max² that the strengths of ridge reach
    validation_fraction: float = 0.2  # of the training images, on which settings are chosen
    # Wall-clock time of an attack on mini-batches, half of it for the search of its settings; None: no limit. Closed
    # forms, solvers and neighbours run to their end.
    seconds: float | None = None

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("descent_steps", "iterations", "steps", "batch_size")}
        check_positive("{name} of probes", **counts, seconds=self.seconds)


@dataclass(frozen=True)
class TuningBudget:
    """What one fine-tuning attack may spend."""

    steps: int = 300
    trial_steps: int = 100  # of each setting tried
    batch_size: int = 32
    optimizers: dict[str, tuple[float, ...]] | None = None  # to the learning rates tried
    max_images: int = 5000
    max_test_images: int = 2000
    evaluations: int = 8  # along the way
    # As of probes; copying the model, and the one pass through a frozen part, come on top.
    seconds: float | None = None

    def __post_init__(self) -> None:
        names = ("steps", "trial_steps", "batch_size", "max_images", "max_test_images", "evaluations", "seconds")
        check_positive("{name} of fine-tuning", **{name: getattr(self, name) for name in names})


# More steps or seeds than this never end, and their numbers fill all memory before the first.
_MOST, _MOST_SEEDS = 100_000_000, 10_000


def check_positive(what: str, **numbers: Any) -> None:
    """Refuse numbers of a budget that are not positive, or not whole; seconds may be fractions."""
    for name, value in numbers.items():
        if value is None:
            continue
        seconds = name == "seconds"
        kinds, most = ((int, float), math.inf) if seconds else ((int,), _MOST_SEEDS if "seeds" in name else _MOST)
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value <= most or value == math.inf:
            whole = "" if seconds else f", a whole number up to {most:,}"
            raise ArgumentError(f"Expected {what.format(name=name)} above 0{whole}, found {value!r}.")


def guarded(attack: Callable[[], Found]) -> Found:
    """Run an attack; if memory runs out or its decomposition fails, that is what it found."""
    try:
        return attack()
    except torch.linalg.LinAlgError as error:
        return Found(None, status="diverged", note=f"the decomposition failed: {str(error).splitlines()[0]}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        return Found(None, status="skipped", note=f"not enough memory: {str(error).partition(chr(10))[0]}")
