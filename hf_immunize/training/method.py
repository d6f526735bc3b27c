"""What is minimized, and how its parts are weighed against each other."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from hf_immunize.errors import ArgumentError
from hf_immunize.training.distillation import MOST_OF_AN_IMAGE
from hf_immunize.training.objectives import INSIDE, LABELLED, OBJECTIVES
from hf_immunize.training.weighting import WeightRule


BENIGN_LOSSES = ("distillation", "task", "both")
BUDGET_MEASURES = ("total_variation", "kl", "loss")


@dataclass(frozen=True)
class Method:
    """The settings of `ImmunizationStep`; the same for the Trainer, the callback and a bare loop.

    `ImmunizationArguments` explains each of them.

    Raises:
        ArgumentError: If a setting has an impossible value, or two contradict each other.

    Example:
        >>> Method(objective="kappa", benign_loss="task", benign_budget=None).needs_start
        False
    """

    objective: str = "auto"
    benign_loss: str = "distillation"
    feature_distillation_weight: float = 5.0
    benign_budget: float | None = 0.05
    budget_measure: str = "total_variation"
    budget_holdout: float = 0.1
    benign_weight: str | float = "auto"
    harmful_weight: str | float = "auto"
    auto_weight_ratio: float = 0.3
    auto_weight_averaging: float = 0.9
    auto_weight_bound: float = 3.0
    weight_warmup_steps: int = 0
    scale_free: bool = False
    queue_size: int = 0

    def __post_init__(self) -> None:
        for name, value in _normalized(self).items():
            object.__setattr__(self, name, value)

    @property
    def needs_start(self) -> bool:
        """Whether the starting model is run beside the trained one."""
        return self.benign_loss != "task" or self.benign_budget is not None

    @property
    def needs_labels(self) -> bool:
        """Whether benign images need labels."""
        return self.benign_loss != "distillation" or (self.benign_budget is not None and self.budget_measure == "loss")

    @property
    def needs_harmful_labels(self) -> bool:
        """Whether harmful images need labels."""
        return self.objective in LABELLED

    @property
    def looks_inside(self) -> bool:
        """Whether the objective looks at what enters rectifiers, where the part that moves has some."""
        # Beside the task's loss alone nothing tells how much those terms may weigh; see `_normalized`.
        return self.objective in INSIDE and not (self.benign_loss == "task" and self.harmful_weight == "auto")

    @property
    def rule(self) -> WeightRule:
        """The part that decides the weights."""
        return WeightRule(
            benign=self.benign_weight,
            harmful=self.harmful_weight,
            ratio=self.auto_weight_ratio,
            averaging=self.auto_weight_averaging,
            bound=self.auto_weight_bound,
            warmup_steps=self.weight_warmup_steps,
            budget=self.benign_budget,
        )

    @classmethod
    def of(cls, settings: Any) -> Method:
        """The method that an object with fields of these names describes, such as `ImmunizationArguments`."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


def _normalized(method: Method) -> dict[str, Any]:
    """All settings, checked, with numbers as numbers."""
    for name, known in (
        ("objective", tuple(OBJECTIVES)),
        ("benign_loss", BENIGN_LOSSES),
        ("budget_measure", BUDGET_MEASURES),
    ):
        if getattr(method, name) not in known:
            raise ArgumentError(f"Expected {name}= out of {', '.join(known)}, found {getattr(method, name)!r}.")
    if method.objective == "silence" and method.benign_loss == "task" and method.harmful_weight == "auto":
        raise ArgumentError(
            f"Expected benign_loss='distillation' or 'both' with objective={method.objective!r}, found 'task': its "
            "terms inside the network are weighed against staying near the starting model. Change it, or give "
            "harmful_weight= as a number."
        )
    budget: Any = method.benign_budget
    if isinstance(budget, str) and budget.lower() == "none":
        budget = None
    if budget is not None:
        budget = _number(budget)
        if not budget > 0:
            raise ArgumentError(
                f"Expected benign_budget= above 0 or None, found {method.benign_budget!r}. 0.05 is a good "
                "start; None lets auto_weight_ratio decide."
            )
        if method.budget_measure == "total_variation" and budget >= MOST_OF_AN_IMAGE:
            raise ArgumentError(
                f"Expected benign_budget= below {MOST_OF_AN_IMAGE} with budget_measure='total_variation', found "
                f"{method.benign_budget!r}: an image counts {MOST_OF_AN_IMAGE} at most, so that nothing would hold "
                "the weights. Lower it (0.05 is a good start), or take budget_measure='kl'."
            )
    holdout = _number(method.budget_holdout)
    if not 0 <= holdout <= 0.5:
        raise ArgumentError(
            f"Expected budget_holdout= between 0 and 0.5, found {method.budget_holdout}. 0 measures the budget on the "
            "images that are trained on, which underrates it where these are few."
        )
    ratio = _number(method.auto_weight_ratio)
    if not ratio >= 0:
        raise ArgumentError(
            f"Expected auto_weight_ratio= of at least 0, found {method.auto_weight_ratio}. "
            "Typical values lie between 0.1 and 1."
        )
    averaging, bound = _number(method.auto_weight_averaging), _number(method.auto_weight_bound)
    if not 0 <= averaging < 1:
        raise ArgumentError(
            f"Expected auto_weight_averaging= between 0 and 1, found {method.auto_weight_averaging}. 0.9 averages "
            "over about ten steps; 0 takes each step's own norm."
        )
    if not bound >= 1:
        raise ArgumentError(f"Expected auto_weight_bound= of at least 1, found {method.auto_weight_bound}.")
    feature_weight = _number(method.feature_distillation_weight)
    if not feature_weight >= 0:
        raise ArgumentError(
            f"Expected feature_distillation_weight= of at least 0, found {method.feature_distillation_weight}."
        )
    warmup, queue = whole_number(method.weight_warmup_steps), whole_number(method.queue_size)
    if warmup is None or queue is None or min(warmup, queue) < 0:
        raise ArgumentError(
            "Expected weight_warmup_steps= and queue_size= as whole numbers of at least 0, found "
            f"{method.weight_warmup_steps} and {method.queue_size}."
        )
    if queue and method.needs_harmful_labels:
        raise ArgumentError(
            f"Expected queue_size=0 with objective={method.objective!r}, which needs labels beside all features, "
            f"found {method.queue_size}."
        )
    return {
        "benign_budget": budget,
        "budget_holdout": holdout,
        "auto_weight_ratio": ratio,
        "auto_weight_averaging": averaging,
        "auto_weight_bound": bound,
        "feature_distillation_weight": feature_weight,
        "weight_warmup_steps": warmup,
        "queue_size": queue,
        "benign_weight": _weight("benign_weight", method.benign_weight),
        "harmful_weight": _weight("harmful_weight", method.harmful_weight),
    }


def whole_number(value: Any) -> int | None:
    """A whole number, also from text (YAML takes 1e3 for text); None for all else.

    Args:
        value: As a user gave it.

    Returns:
        The number.

    Example:
        >>> whole_number(8), whole_number("1e3"), whole_number(2.5), whole_number("many")
        (8, 1000, None, None)
    """
    number = _number(value)
    return int(number) if math.isfinite(number) and number == int(number) else None


def _weight(name: str, value: str | float) -> str | float:
    """A weight as the number it stands for, or "auto"."""
    if value == "auto":
        return value
    number = _number(value)
    if not number >= 0:
        raise ArgumentError(
            f"Expected {name}= 'auto' or a number of at least 0, found {value!r}. 'auto' is a good start."
        )
    return number


def _number(value: Any) -> float:
    """A finite number, also from text (YAML takes 3e-1 for text); NaN for all else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan
