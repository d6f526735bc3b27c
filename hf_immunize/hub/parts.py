"""The parts of ``immunization.json``, each documented where it is defined; `ImmunizationRecord` joins them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from hf_immunize.hub.schema import Count, Log10, Log10Kappa, Range, Seed, Share, Size
from hf_immunize.spectra.conditioning import Conditioning


ACCESS = ("head_input", "any_layer", "fine_tuning")
# What a later version wrote and this one does not know.
Unknown = dict[str, Any]


@dataclass
class BudgetRecord:
    """What became of the benign budget (``benign_budget``).

    Attributes:
        limit: The budget.
        measure: What it is in: "total_variation", "kl" or "loss".
        spent: How far the benign side had moved, as a running mean over the last steps.
        weight: The multiplier on the regularizers' weights over its value at the start.
    """

    limit: float
    measure: str
    spent: float
    weight: float
    unknown: Unknown = field(default_factory=dict, repr=False)

    @property
    def exceeded(self) -> bool:
        """Whether more was spent than the swing of the multiplier around the budget explains."""
        return self.spent > 1.25 * self.limit


@dataclass
class MethodRecord:
    """How the checkpoint was made.

    Attributes:
        objective: Name of what was minimized, such as "kappa".
        trainable: What moved: "last_stage", "all", or a regular expression on parameter names.
        steps: Optimizer steps.
        seed: Seed of the run.
        benign_weight, harmful_weight: Weights of the regularizers: numbers, or "auto" (by gradient norm).
        freeze_batchnorm: Whether BatchNorm statistics stayed as they were.
        settings: All further settings of the objective and its weights, by the names of `ImmunizationArguments`.
        budget: What became of the benign budget, where there was one.
    """

    objective: str
    trainable: str
    steps: Count
    seed: Seed
    benign_weight: float | str | None = None
    harmful_weight: float | str | None = None
    freeze_batchnorm: bool | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    budget: BudgetRecord | None = None
    unknown: Unknown = field(default_factory=dict, repr=False)


@dataclass
class BaseModelRecord:
    """The model before immunization.

    Attributes:
        name: Id on the Hub, or the last part of a local path.
        revision: Branch, tag or commit.
        on_hub: Whether `name` is an id on the Hub.
    """

    name: str
    revision: str | None = None
    on_hub: bool = False
    unknown: Unknown = field(default_factory=dict, repr=False)


@dataclass
class DataRecord:
    """One task's data.

    Attributes:
        name: What the data are called; an id on the Hub where `on_hub`.
        on_hub: Whether `name` is an id on the Hub.
        revision: Its commit.
        split: Its split that was measured on.
        classes: Names of the classes, where they were chosen out of a larger set.
        fingerprint: The `datasets` fingerprint of what was measured on.
        train_size: Images trained on.
        size: Images measured on, N.
        checksum: Of the pixel values measured on, in whatever order, after the image processor (see `Measurement`).
        held_out_fraction, held_out_seed: How the images measured on were held out of the training split (see
            `hf_immunize.data.splits`); None where they are a split or a source of their own.
        train_sketch, sketch: By which to know images trained on and measured on again, whatever they are called (see
            `hf_immunize.data.identity`).
    """

    name: str
    on_hub: bool = False
    revision: str | None = None
    split: str | None = None
    classes: list[str] | None = None
    fingerprint: str | None = None
    train_size: Count | None = None
    size: Count | None = None
    checksum: float | None = None
    held_out_fraction: float | None = None
    held_out_seed: int | None = None
    train_sketch: str | None = None
    sketch: str | None = None
    unknown: Unknown = field(default_factory=dict, repr=False)


@dataclass
class ConditioningRecord:
    """Conditioning of ``ZᵀZ`` over all images measured on (see `Conditioning`), Z the classifier's inputs.

    Attributes:
        log10_kappa: Decimal logarithm of κ, or of the bound from below where `is_bound`.
        rank: Numerical rank of Z.
        num_samples: N. With N < D the number describes the sample, not the task.
        dim: D.
        effective_rank: exp of the entropy of the normalized singular values.
        is_bound: Whether the rank fell below the reference's.
        reference_rank: That rank.
        sigma_max, sigma_min, cutoff: Largest singular value of Z, smallest above the rank rule's threshold, and that.
    """

    log10_kappa: Log10Kappa
    rank: Count
    num_samples: Count
    dim: Count
    effective_rank: Size | None = None
    is_bound: bool = False
    reference_rank: Count | None = None
    sigma_max: Size | None = None
    sigma_min: Size | None = None
    cutoff: Size | None = None
    unknown: Unknown = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, conditioning: Conditioning) -> ConditioningRecord:
        """What a record keeps of a measured conditioning."""
        names = [item.name for item in fields(cls) if item.name != "unknown"]
        return cls(**{name: getattr(conditioning, name) for name in names})

    def conditioning(self) -> Conditioning:
        """The conditioning this was taken from; NaN where the record does not know a number."""
        log_kappa = self.log10_kappa * math.log(10.0)
        numbers = (self.effective_rank, self.sigma_max, self.sigma_min, self.cutoff)
        effective_rank, sigma_max, sigma_min, cutoff = (math.nan if x is None else x for x in numbers)
        return Conditioning(
            kappa=math.exp(min(log_kappa, 709.0)),
            log_kappa=log_kappa,
            rank=self.rank,
            num_samples=self.num_samples,
            dim=self.dim,
            effective_rank=effective_rank,
            sigma_max=sigma_max,
            sigma_min=sigma_min,
            cutoff=cutoff,
            is_bound=self.is_bound,
            reference_rank=self.reference_rank,
        )


@dataclass
class SideRecord:
    """Conditioning of one task's features through the model before immunization and after.

    Attributes:
        before: Through the reference weights.
        after: Through the weights beside the record.
    """

    before: ConditioningRecord | None = None
    after: ConditioningRecord | None = None
    unknown: Unknown = field(default_factory=dict, repr=False)


@dataclass
class RatioRecord:
    """The relative immunization ratio under one protocol (see `relative_immunization_ratio`).

    Attributes:
        log10_rir: Decimal logarithm of RIR (of its mean over groups); None where it is undetermined.
        log10_harmful_ratio: Of its part (i).
        log10_benign_ratio: Of its part (ii).
        bound: What RIR is of the true value: None (itself), "lower", "upper" or "undetermined".
        relative_std: Standard deviation over groups, divided by the mean.
        num_groups, group_size, seed: How the groups were drawn.
    """

    log10_rir: Log10 | None
    log10_harmful_ratio: Log10 | None = None
    log10_benign_ratio: Log10 | None = None
    bound: str | None = None
    relative_std: Annotated[float, Range(0, 1000)] | None = None
    num_groups: Annotated[int, Range(1, 10_000)] | None = None
    group_size: Annotated[int, Range(2, 10_000_000)] | None = None
    seed: Annotated[int, Range(-(2**63), 2**64 - 1)] | None = None
    unknown: Unknown = field(default_factory=dict, repr=False)


@dataclass
class MetricRecord:
    """The benign task's metric on the images measured on.

    Attributes:
        name: Such as "accuracy".
        after: Through the weights beside the record.
        before: Through the starting weights, where they were evaluated.
        precision: Mixed precision of the evaluation: "no", "bf16" or "fp16".
    """

    name: str
    after: float
    before: float | None = None
    precision: str | None = None
    unknown: Unknown = field(default_factory=dict, repr=False)


@dataclass
class AttackRecord:
    """The strongest attacker of one kind of access, on the harmful task's held-out images.

    Attributes:
        attacker: Its name.
        accuracy: What it reaches on the immunized model, between 0 and 1.
        reference_accuracy: What the strongest of its kind reaches on the model before immunization.
        chance: Accuracy of always naming the most frequent class.
        layer: Where it probes, or what it fine-tunes.
    """

    attacker: str
    accuracy: Share
    reference_accuracy: Share | None = None
    chance: Share | None = None
    layer: str | None = None
    unknown: Unknown = field(default_factory=dict, repr=False)


@dataclass
class AuditRecord:
    """What an audit found, in short.

    Attributes:
        preset: Which attackers and budgets.
        preset_version: Raised whenever the preset changes.
        strongest: By access: "head_input", "any_layer", "fine_tuning"; what is absent was not attacked.
        utility: Benign accuracy, as the audit measured it.
        verdict: What the audit's report says, in sentences; names of data in them are the user's own.
    """

    preset: str
    preset_version: Count = 1
    strongest: dict[str, AttackRecord | None] = field(default_factory=dict)
    utility: dict[str, Any] | None = None
    verdict: list[str] = field(default_factory=list)
    unknown: Unknown = field(default_factory=dict, repr=False)
