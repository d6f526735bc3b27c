"""The kinds of things an audit can find."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hf_immunize.audit.speed import StepsRatio
from hf_immunize.audit.summaries import Summary


class Kind(str, Enum):
    """What a finding says; the value is the word for it."""

    BROKEN = "broken"
    MAYBE_BROKEN = "possibly broken"
    SERIOUS_DROP = "serious drop"
    MAYBE_SERIOUS = "possible serious drop"
    UTILITY_KEPT = "benign accuracy kept"
    UTILITY_UNKNOWN = "benign accuracy not compared"
    NO_UTILITY = "no benign accuracy to keep"
    NO_REFERENCE = "no reference"
    NOTHING_STOPPED = "nothing is stopped"
    NOT_TESTED = "not tested"
    NOTHING_TO_PROTECT = "inconclusive: nothing to protect"
    INCONCLUSIVE = "inconclusive"
    PREVENTED = "prevented"
    REDUCED = "reduced"
    NOT_PREVENTED = "not prevented"
    WITHHELD = "no claim"
    ONE_LAYER_AWAY = "one layer away"
    SLOWED = "slowed"
    MAYBE_SLOWED = "perhaps slowed"
    NOT_SLOWED = "not slowed"
    SPEED_UNKNOWN = "speed not distinguishable"
    NO_STEPS_NEEDED = "slowed but not prevented"
    AT_RANDOM = "no more than random weights give"
    TASK_LOST = "another task suffers"
    MAYBE_TASK_LOST = "another task may suffer"
    BENIGN_SLOWED = "benign probing is slowed"
    MAYBE_BENIGN_SLOWED = "benign probing may be slowed"
    RATIO = "conditioning"
    DIVERGED = "diverged"
    SKIPPED = "skipped"
    OUT_OF_BUDGET = "out of budget"
    FEW_SEEDS = "too few seeds"


GOOD = frozenset({Kind.PREVENTED, Kind.REDUCED, Kind.SLOWED, Kind.AT_RANDOM, Kind.UTILITY_KEPT})
BAD = frozenset(
    {Kind.BROKEN, Kind.SERIOUS_DROP, Kind.NOTHING_STOPPED, Kind.NOT_PREVENTED, Kind.ONE_LAYER_AWAY}
    | {Kind.NOT_SLOWED, Kind.NO_STEPS_NEEDED, Kind.TASK_LOST, Kind.BENIGN_SLOWED}
)
# What the strongest attacker of a class reads, one of these for each class.
CLASS_KINDS = frozenset(
    {Kind.NOT_TESTED, Kind.NOTHING_TO_PROTECT, Kind.INCONCLUSIVE, Kind.PREVENTED, Kind.REDUCED, Kind.NOT_PREVENTED}
    | {Kind.WITHHELD}
)
# What is said of the released classifier's benign accuracy, and where that forbids any claim of resistance.
UTILITY_KINDS = frozenset(
    {Kind.BROKEN, Kind.MAYBE_BROKEN, Kind.SERIOUS_DROP, Kind.MAYBE_SERIOUS, Kind.UTILITY_KEPT}
    | {Kind.UTILITY_UNKNOWN, Kind.NO_UTILITY}
)
WITHHOLDING = frozenset({Kind.BROKEN, Kind.MAYBE_BROKEN, Kind.UTILITY_UNKNOWN, Kind.NO_UTILITY})
# What is not said of a model that may be broken, or whose benign accuracy nobody compared.
CLAIMS = frozenset({Kind.PREVENTED, Kind.REDUCED})
SIDE_CLAIMS = frozenset({Kind.SLOWED, Kind.AT_RANDOM, Kind.RATIO})


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        kind: What it says.
        access: Class of attackers, or "".
        task: Task that was attacked.
        worst: The strongest attack on the immunized model.
        reference: The strongest of the same attacks on the reference.
        other: Another attack that the finding compares with: the class before, or random weights.
        attacks: Attacks it is about.
        ratios: Ratios of steps it is about.
        reason: Why it is so, a clause; or "".
    """

    kind: Kind
    access: str = ""
    task: str = "harmful"
    worst: Summary | None = None
    reference: Summary | None = None
    other: Summary | None = None
    attacks: tuple[Summary, ...] = ()
    ratios: tuple[StepsRatio, ...] = ()
    reason: str = ""

    @property
    def tone(self) -> str:
        """Whether it speaks for the immunization, against it, or neither: "good", "bad" or "neutral"."""
        return "good" if self.kind in GOOD else "bad" if self.kind in BAD else "neutral"
