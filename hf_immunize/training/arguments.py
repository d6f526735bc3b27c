"""Arguments of immunization, on top of those of the Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_immunize.data.pairs import BatchSizes
from hf_immunize.errors import ArgumentError
from hf_immunize.features.cache import DTYPES
from hf_immunize.training.distillation import MAX_TV_PER_IMAGE
from hf_immunize.training.objectives import DEFAULT, OBJECTIVES


# Old to new names of objectives.
RENAMED = {"silence": "dead_relu", "auto": DEFAULT, "subspace": DEFAULT}
# Options that do not see that the trunk's modules are replaced while the rest runs.
TRUNK_OBSTACLES = ("torch_compile", "fsdp", "deepspeed")
BENIGN_LOSSES = ("distillation", "task", "both")


@dataclass(frozen=True)
class Method:
    """The settings of `ImmunizationStep`; the same for the Trainer, the callback and a bare loop.

    `ImmunizationArguments` explains each of them.

    Raises:
        ArgumentError: If a setting has an impossible value, or two contradict each other.

    Example:
        >>> Method(objective="kappa", benign_loss="task").needs_start
        False
    """

    objective: str = DEFAULT
    benign_loss: str = "distillation"
    feature_distillation_weight: float = 20.0
    benign_budget: float | None = None
    benign_weight: str | float = "auto"
    harmful_weight: str | float = "auto"
    auto_weight_ratio: float = 0.3
    scale_free: bool = False

    def __post_init__(self) -> None:
        for name, known in {"objective": tuple(OBJECTIVES), "benign_loss": BENIGN_LOSSES}.items():
            value = getattr(self, name)
            if value in RENAMED:
                raise ArgumentError(f"Expected {name}={RENAMED[value]!r}, the new name of {value!r}. Use that.")
            if value not in known:
                raise ArgumentError(f"Expected {name}= out of {', '.join(known)}, found {value!r}.")
        for name, (holds, expected) in _NUMBERS.items():
            given = getattr(self, name)
            if given == "auto" and name.endswith("_weight"):
                continue
            if name == "benign_budget" and str(given).lower() == "none":
                object.__setattr__(self, name, None)
                continue
            number = _number(given)
            if not holds(number):
                raise ArgumentError(f"Expected {name}= {expected}, found {given!r}.")
            object.__setattr__(self, name, number)

    @property
    def needs_start(self) -> bool:
        """Whether the starting model is run in addition to the trained one."""
        return self.benign_loss != "task" or self.benign_budget is not None

    @property
    def needs_labels(self) -> bool:
        """Whether benign images need labels."""
        return self.benign_loss != "distillation"

    @property
    def needs_harmful_labels(self) -> bool:
        """Whether harmful images need labels."""
        return OBJECTIVES[self.objective].needs_harmful_labels

    @classmethod
    def of(cls, settings: Any) -> Method:
        """The method that an object with fields of these names describes, such as `ImmunizationArguments`."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


def _number(value: Any) -> float:
    """A finite number, also from text (YAML takes 3e-1 for text); NaN for all else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


# Number to what it must satisfy (NaN satisfies nothing), and how that is said.
_WEIGHT = (lambda x: x >= 0, "'auto' or a number of at least 0")
_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    # What one image counts at most would never spend a budget as large.
    "benign_budget": (lambda x: 0 < x < MAX_TV_PER_IMAGE, f"above 0 and below {MAX_TV_PER_IMAGE:g}, or None"),
    "auto_weight_ratio": (lambda x: x >= 0, "of at least 0 (typically 0.1 to 1)"),
    "feature_distillation_weight": (lambda x: x >= 0, "of at least 0"),
    "benign_weight": _WEIGHT,
    "harmful_weight": _WEIGHT,
}

# Metrics of an evaluation that are better when they are small; the Trainer knows this of losses alone.
_LOWER_IS_BETTER = ("benign_log10_kappa", "benign_ratio", "harmful_rank", "harmful_effective_rank")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ImmunizationArguments(TrainingArguments):
    """`transformers.TrainingArguments` plus what immunization needs.

    > [!NOTE]
    > These defaults differ from `TrainingArguments`: 1,000 steps unless `num_train_epochs` is given;
    > `per_device_train_batch_size=32`, since what is minimized is a statistic of the batch;
    > `learning_rate=3e-4` with `warmup_steps=20` and a cosine schedule (a final rate near zero heals what larger steps
    > cost the benign side); `remove_unused_columns=False` (pairs of images have no columns to compare with the model's
    > signature); `logging_nan_inf_filter=False` (it would log a loss of NaN as 0.0 while the weights are lost); and
    > `dataloader_drop_last=True` (κ of a short last batch is another quantity, and undefined for one image).
    > `load_best_model_at_end` needs a `metric_for_best_model`. Without `greater_is_better`, a metric such as
    > "benign_log10_kappa", of which less is better, is taken so.

    > Parameters that control what is minimized

    Args:
        objective: "time" (harmful features vary in two directions and hardly outside them, which is what slows a
            probe, and benign features vary evenly; on convolutional networks and on transformers), "concentration"
            (harmful features towards one direction, a bound on κ from the top pair alone), "dead_relu" (the last ReLU
            or ReLU6 that no shortcut bypasses is deactivated on harmful images: where that succeeds, nothing is left
            to read after it; what enters it is still there, and κ of the benign features grows), "kappa" (the paper's:
            R_well of benign + R_ill of harmful features), or one of the paper's baselines: "r_ill" (without R_well),
            "opt_kappa" (log κ itself), "imma" (bi-level on the head; needs harmful labels).
        benign_loss: "distillation" (logits and features stay those of the starting model, which costs a forward pass
            over the benign images, and no labels), "task" (the model's own loss), or "both".
        feature_distillation_weight: Weight of the relative squared feature error beside the logits' divergence.
        benign_budget: How far the benign side may move, as the total variation between the starting model's
            probabilities and the present ones (mean over a batch's images, each of which counts 0.2 at most: the few
            benign images that show what is harmful shall not use up the budget of all). All regularizers are
            multiplied by the part of it that is not spent. None: no limit but the benign loss.
        benign_weight, harmful_weight: Weight of each side's regularizer: a number, or "auto": 0.2 for "time" and
            "dead_relu", whose terms are logarithms; for others what gives its gradient on the features the same size
            whatever its own. Less moves the benign side less, and immunizes less.
        auto_weight_ratio: The norm of that gradient, relative to that of the benign loss's.
        scale_free: Take the regularizers of H·D/tr(H), so that they do not reward shrinking or growing features.

    > Parameters that control what is trainable, the data, and the cached trunk

    Args:
        trainable: "last_stage" (the deepest blocks, what follows them, and the head), "all", or a regular expression
            on parameter names.
        freeze_batchnorm: Keep all BatchNorm running statistics, which makes one forward pass over benign and harmful
            images together exact. If False, benign batches update them and harmful ones never do.
        head_module: Name of the classifier module, where it cannot be found without help.
        pooling: For a bare backbone (`AutoModel`): what its new linear head sees, "head_input", "pooler", "cls" or
            "mean"; see `hf_immunize.vision.bare.with_linear_head`. The head has the config's ``num_labels``.
        harmful_batch_size: Harmful images a device and step; by default `per_device_train_batch_size`.
        distillation_batch_size: Images of the distillation set a device and step; by default half of it.
        image_column_name, label_column_name: Columns, where they cannot be found without help.
        cache_trunk: "float32" or "float16" to compute what is frozen before the trainable part once, keep it on disk
            in this type, and train on that; "no" to compute it in each step. Evaluation always runs the whole model.
        trunk_cache_dir: Folder for it, of one run at a time, which all machines share; by default ``_trunk`` in
            `output_dir`, which no push to the Hub takes along.

    Raises:
        ArgumentError: If an option has an impossible value.

    Example:
        >>> args = ImmunizationArguments(output_dir="runs/x", objective="kappa", harmful_weight=10.0, report_to="none")
        >>> args.harmful_weight, args.benign_weight
        (10.0, 'auto')
    """

    objective: str = _option(DEFAULT, f"What is minimized in addition to the benign loss: {', '.join(OBJECTIVES)}.")
    benign_loss: str = _option("distillation", f"What keeps the benign task: {', '.join(BENIGN_LOSSES)}.")
    feature_distillation_weight: float = _option(20.0, "Weight of the feature error next to the logits' divergence.")
    benign_budget: str | None = _option(None, "Most that benign predictions may move (total variation), or 'none'.")
    benign_weight: str = _option("auto", "Weight of the benign regularizer: a number, or 'auto'.")
    harmful_weight: str = _option("auto", "Weight of the harmful regularizer: a number, or 'auto'.")
    auto_weight_ratio: float = _option(0.3, "With 'auto': target ratio of gradient norms, regularizer to benign loss.")
    scale_free: bool = _option(False, "Regularize H*D/tr(H), not H = Z^T Z: the features' scale has no effect.")
    trainable: str = _option("last_stage", "What is trainable: 'last_stage', 'all', or a regex on parameter names.")
    freeze_batchnorm: bool = _option(True, "Keep all BatchNorm running statistics.")
    head_module: str | None = _option(None, "Name of the classifier module, where it cannot be found without help.")
    pooling: str | None = _option(None, "For a bare backbone: what its head sees; head_input, pooler, cls or mean.")
    harmful_batch_size: int | None = _option(None, "Harmful images per device and step; by default as many as benign.")
    distillation_batch_size: int | None = _option(None, "Distillation images per device and step; by default half.")
    image_column_name: str | None = _option(None, "Column of images, if there are several.")
    label_column_name: str | None = _option(None, "Column of labels, if there are several.")
    cache_trunk: str = _option("no", "Compute the frozen trunk once, keep it on disk: 'no', 'float16', 'float32'.")
    trunk_cache_dir: str | None = _option(None, "Folder of the cached trunk; by default _trunk in output_dir.")
    max_steps: int = _option(-1, "Optimizer steps; by default 1,000, unless num_train_epochs is given.")
    num_train_epochs: float | None = _option(None, "Epochs over the benign images, in place of steps.")
    per_device_train_batch_size: int = _option(32, "Benign images per device and step; 8 tell little about kappa.")
    learning_rate: float = _option(3e-4, "Highest learning rate.")
    lr_scheduler_type: str = _option("cosine", "Schedule of the learning rate.")
    warmup_steps: float = _option(20, "Steps (below 1: a share of all) over which the learning rate rises.")
    remove_unused_columns: bool = _option(False, "Leave it off: it would drop the images.")
    logging_nan_inf_filter: bool = _option(False, "Hide NaN and infinite losses in the log. Off: you see them.")
    dataloader_drop_last: bool = _option(True, "Drop a short last training batch: its kappa is not comparable.")

    def __post_init__(self) -> None:
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            raise ArgumentError(
                "Expected metric_for_best_model= with load_best_model_at_end=True, found none: the Trainer would take "
                "eval_loss, which is least before anything is immunized. Set it to 'log10_rir', say, and bound what "
                "benign accuracy may lose by BenignUtilityCallback."
            )
        if self.num_train_epochs is None:
            self.max_steps = self.max_steps if self.max_steps > 0 else 1000
            self.num_train_epochs = 3.0
        best = self.metric_for_best_model or ""
        if vars(self).get("greater_is_better") is None and best.endswith(_LOWER_IS_BETTER):
            self.greater_is_better = False
        super().__post_init__()
        if self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ArgumentError(
                f"Expected hub_strategy= 'end' or 'every_save', found {self.hub_strategy.value!r}: what a run resumes "
                "from holds paths of this machine. Keep checkpoints on disk."
            )
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
                if not (_number(size) >= 1 and _number(size) % 1 == 0):
                    raise ArgumentError(f"Expected {name}= as a whole number of at least 1 or None, found {size!r}.")
                setattr(self, name, int(_number(size)))
        if self.cache_trunk is False:  # the "no" of YAML
            self.cache_trunk = "no"
        if self.cache_trunk not in ("no", *DTYPES):
            raise ArgumentError(f"Expected cache_trunk= out of no, {', '.join(DTYPES)}, found {self.cache_trunk!r}.")
        found = [name for name in TRUNK_OBSTACLES if getattr(self, name)]
        if self.cache_trunk != "no" and found:
            raise ArgumentError(
                f"Expected cache_trunk='{self.cache_trunk}' without {found[0]}, found both: the trunk's modules are "
                f"replaced while the rest runs, which {found[0]} does not see. Leave out one of them."
            )
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
        )
