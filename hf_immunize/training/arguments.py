"""Arguments of immunization, on top of those of the Trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from hf_immunize.data.pairs import BatchSizes
from hf_immunize.errors import ArgumentError
from hf_immunize.training.cached_trunk import check_trunk_arguments
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


# Metrics of an evaluation that are better when they are small; the Trainer knows this of losses alone.
_LOWER_IS_BETTER = ("benign_log10_kappa", "benign_ratio", "harmful_rank", "harmful_effective_rank")


@dataclass
class ImmunizationArguments(TrainingArguments):
    """`transformers.TrainingArguments` plus what immunization needs.

    > [!NOTE]
    > These defaults differ from `TrainingArguments`: `remove_unused_columns=False` (pairs of images have no columns to
    > compare with the model's signature), `logging_nan_inf_filter=False` (it would log a loss of NaN as 0.0 while the
    > weights are lost), and `dataloader_drop_last=True` (κ of a short last batch is another quantity, and undefined
    > for one image). `load_best_model_at_end` needs a `metric_for_best_model`. Without `greater_is_better`, a metric
    > such as "benign_log10_kappa", of which less is better, is taken so.

    > Parameters that control what is minimized

    Args:
        objective: "auto" ("silence" where the part that moves has such a rectifier, unless the first batch, of 32
            images a side or more, shows that the model hardly tells harmful from benign images; else "concentration";
            beside `benign_loss` "task" always the latter, unless `harmful_weight` is a number; the record says which),
            "silence" (the last rectifier, ReLU or ReLU6, that no shortcut bypasses is switched off on harmful images:
            where that succeeds, nothing is left to read behind it; what enters it is still there, and BatchNorm with
            the statistics of the batch brings it back),
            "concentration" (harmful features towards one direction, a bound on κ from the top pair alone),
            "kappa" (the paper's: R_well of benign + R_ill of harmful features), or one of the paper's baselines:
            "r_ill" (without R_well), "opt_kappa" (log κ itself), "imma" (bi-level on the head; needs harmful labels).
        benign_loss: "distillation" (logits and features stay those of the starting model; needs no labels), "task"
            (the model's own loss), or "both". With "distillation" and "both" the starting model is run beside the
            trained one, which costs a forward pass over the benign images.
        feature_distillation_weight: Weight of the relative squared feature error beside the logits' divergence.
        benign_budget: How far the benign side may move: a multiplier on both weights rises while the running measure
            is below it and falls while it is above; where harmful images are nearly silenced, both weights fade and
            the multiplier stays. None: the weights follow `auto_weight_ratio`. With
            ``objective="kappa", benign_loss="task", benign_budget=None`` and two numbers as weights, the paper's
            training.
        budget_measure: What the budget is in: "total_variation" (half the sum of absolute differences between the
            starting model's probabilities and the present ones, mean over images, each of which counts 0.2 at most:
            the few benign images that show what is harmful shall not use up the budget of all), "kl" (divergence from
            the starting model's predictions, in nats; single images can outweigh hundreds in its mean) or "loss" (rise
            of the benign task's loss over the starting model's).
        budget_holdout: Part of the benign training images on which the budget is measured and which are not trained
            on, since a few hundred images are soon known by heart. With fewer than 8 of them, or 0, it is measured on
            the images that are trained on.
        benign_weight: Weight of the benign regularizer: a number, or "auto" to give its gradient on the features the
            same size whatever its own.
        harmful_weight: Weight of the harmful regularizer, likewise.
        auto_weight_ratio: With "auto" and no budget, the norm of each regularizer's gradient on the features, relative
            to that of the benign loss's. More immunizes faster and costs more benign accuracy.
        auto_weight_averaging: Share of the past in running means (gradient norms, the budget's measure).
        auto_weight_bound: The benign loss's gradient norm counts at most this many times its smallest running mean, so
            that a benign loss driven up by the weights does not drive them further.
        weight_warmup_steps: Steps over which all weights rise from zero.
        scale_free: Take the regularizers of H·D/tr(H), so that they do not reward shrinking or growing features.
        queue_size: Recent features, in rows, to which a batch's are added before the regularizers are taken; 0 for
            none. It estimates the population's κ where a batch holds fewer images than the features' dimensions.

    > Parameters that control what moves

    Args:
        trainable: "last_stage" (the deepest blocks, what follows them, and the head), "all", or a regular expression
            on parameter names.
        freeze_batchnorm: Keep all BatchNorm running statistics, which makes one forward pass over benign and harmful
            images together exact. If False, benign batches update them and harmful ones never do.
        head_module: Name of the classifier module, where it cannot be found without help.
        pooling: For a bare backbone (`AutoModel`): what its new linear head sees, "head_input", "pooler", "cls" or
            "mean"; see `hf_immunize.vision.bare.with_linear_head`. The head has the config's ``num_labels``.

    > Parameters that control the data

    Args:
        harmful_batch_size: Harmful images a device and step; by default `per_device_train_batch_size`.
        distillation_batch_size: Images of the distillation set a device and step; by default half of it.
        image_column_name: Column of images (or of pixel values), where it cannot be found without help.
        label_column_name: Column of labels, likewise.

    > Parameters that control the cached trunk

    Args:
        cache_trunk: "float32" or "float16" to compute what is frozen before the part that moves once, keep it on disk
            in this type, and train on that; "no" to compute it in each step. Evaluation always runs the whole model.
        trunk_cache_dir: Folder for it, of one run at a time; by default ``_trunk`` in `output_dir`, which no push to
            the Hub takes along.

    Raises:
        ArgumentError: If an option has an impossible value.

    Example:
        >>> args = ImmunizationArguments(output_dir="runs/x", objective="kappa", harmful_weight=10.0, report_to="none")
        >>> args.harmful_weight, args.benign_weight
        (10.0, 'auto')
    """

    objective: str = field(
        default=Method.objective,
        metadata={"help": "What is minimized beside the benign loss: " + ", ".join(OBJECTIVES) + "."},
    )
    benign_loss: str = field(
        default=Method.benign_loss,
        metadata={
            "help": "What keeps the benign task: 'distillation' of the starting model, the 'task' loss, 'both'."
        },
    )
    feature_distillation_weight: float = field(
        default=Method.feature_distillation_weight,
        metadata={"help": "Weight of the relative squared feature error beside the divergence of logits."},
    )
    benign_budget: str | None = field(  # a number or None, which only text can say on the command line
        default=Method.benign_budget,  # type: ignore[assignment]
        metadata={"help": "How far the benign side may move; a multiplier holds it. A number, or 'none'."},
    )
    budget_measure: str = field(
        default=Method.budget_measure,
        metadata={"help": "What it is in: 'total_variation' or 'kl' to the starting model, or rise of the 'loss'."},
    )
    budget_holdout: float = field(
        default=Method.budget_holdout,
        metadata={"help": "Part of the benign images that is kept from training, to measure the budget on."},
    )
    benign_weight: str = field(
        default="auto", metadata={"help": "Weight of the benign regularizer: a number, or 'auto' (by gradient norm)."}
    )
    harmful_weight: str = field(
        default="auto", metadata={"help": "Weight of the harmful regularizer: a number, or 'auto' (by gradient norm)."}
    )
    auto_weight_ratio: float = field(
        default=Method.auto_weight_ratio,
        metadata={"help": "With 'auto': norm of a regularizer's gradient on features over that of the benign loss's."},
    )
    auto_weight_averaging: float = field(
        default=Method.auto_weight_averaging, metadata={"help": "Share of the past in running means, in [0, 1)."}
    )
    auto_weight_bound: float = field(
        default=Method.auto_weight_bound,
        metadata={"help": "The benign gradient norm counts at most this many times its smallest running mean."},
    )
    weight_warmup_steps: int = field(
        default=Method.weight_warmup_steps, metadata={"help": "Steps over which all weights rise from zero."}
    )
    scale_free: bool = field(
        default=Method.scale_free, metadata={"help": "Take the regularizers of H*D/tr(H), which ignores their scale."}
    )
    queue_size: int = field(
        default=Method.queue_size, metadata={"help": "Recent features that join each batch's, in rows; 0 for none."}
    )
    trainable: str = field(
        default="last_stage", metadata={"help": "What moves: 'last_stage', 'all', or a regex on parameter names."}
    )
    freeze_batchnorm: bool = field(default=True, metadata={"help": "Keep all BatchNorm running statistics."})
    head_module: str | None = field(
        default=None, metadata={"help": "Name of the classifier module, where it cannot be found without help."}
    )
    pooling: str | None = field(
        default=None,
        metadata={"help": "For a bare backbone: what its new head sees; head_input, pooler, cls or mean."},
    )
    harmful_batch_size: int | None = field(
        default=None, metadata={"help": "Harmful images a device and step; by default as many as benign ones."}
    )
    distillation_batch_size: int | None = field(
        default=None, metadata={"help": "Images of the distillation set a device and step; half the benign ones."}
    )
    image_column_name: str | None = field(default=None, metadata={"help": "Column of images, if there are several."})
    label_column_name: str | None = field(default=None, metadata={"help": "Column of labels, if there are several."})
    cache_trunk: str = field(
        default="no", metadata={"help": "Compute the frozen trunk once, keep it on disk: 'no', 'float16', 'float32'."}
    )
    trunk_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of the cached trunk; by default _trunk in output_dir."}
    )

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Pairs of images have no columns to compare with the model's signature."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Filter NaN and infinite losses out of the log. Off, so that they are seen."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Drop a short last training batch, whose kappa is another quantity."}
    )

    def __post_init__(self) -> None:
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            raise ArgumentError(
                "Expected metric_for_best_model= with load_best_model_at_end=True, found none: the Trainer would take "
                "eval_loss, which is of the benign task and least before anything is immunized. Set "
                "metric_for_best_model='log10_rir', say, and bound what benign accuracy may lose by "
                "BenignUtilityCallback."
            )
        best = self.metric_for_best_model or ""
        if vars(self).get("greater_is_better") is None and best.endswith(_LOWER_IS_BETTER):
            self.greater_is_better = False
        super().__post_init__()
        if getattr(self, "train_sampling_strategy", "random") not in ("random", "sequential"):
            raise ArgumentError(
                f"Expected train_sampling_strategy= 'random' or 'sequential', found {self.train_sampling_strategy!r}: "
                "images have no lengths to group them by. Leave it at its default."
            )
        method = Method.of(self)
        for setting in fields(Method):  # numbers, where the command line or YAML gave text
            setattr(self, setting.name, getattr(method, setting.name))
        for name in ("harmful_batch_size", "distillation_batch_size"):
            size = getattr(self, name)
            if size is not None:
                setattr(self, name, whole_number(size))
                if (getattr(self, name) or 0) < 1:
                    raise ArgumentError(f"Expected {name}= as a whole number of at least 1 or None, found {size!r}.")
        check_trunk_arguments(self)
        if self.bf16_full_eval or self.fp16_full_eval:
            raise ArgumentError(
                "Expected evaluation in full precision, found bf16_full_eval or fp16_full_eval: κ of half-precision "
                "features is mostly rounding noise. Use bf16=True or fp16=True, which trains in mixed precision."
            )
        if self.remove_unused_columns:
            raise ArgumentError(
                "Expected remove_unused_columns=False, found True: it would drop the columns of benign and harmful "
                "images before they are paired. Leave it at its default."
            )

    @property
    def batch_sizes(self) -> BatchSizes:
        """Rows of each side that one process takes in a micro-batch."""
        benign = self.train_batch_size
        return BatchSizes(
            benign=benign,
            harmful=self.harmful_batch_size or benign,
            distillation=self.distillation_batch_size or max(1, benign // 2),
            held_out=max(1, benign // 8),
        )
