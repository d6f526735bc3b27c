"""Arguments of immunization, on top of those of the Trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_immunize.errors import ArgumentError
from hf_immunize.training.objectives import OBJECTIVES


@dataclass
class ImmunizationArguments(TrainingArguments):
    """`transformers.TrainingArguments` plus what immunization needs.

    > [!NOTE]
    > These defaults differ from `TrainingArguments`: `remove_unused_columns=False` (pairs of images have no columns to
    > compare with the model's signature), `logging_nan_inf_filter=False` (it would log a loss of NaN as 0.0 while the
    > weights are lost), and `dataloader_drop_last=True` (κ of a short last batch is another quantity, and undefined
    > for one image).

    > Parameters that control what is minimized

    Args:
        objective: "kappa" (the paper's: benign loss + R_well of benign + R_ill of harmful features) or "r_ill" (its
            baseline without R_well).
        benign_weight: Weight of the benign regularizer: a number, or "auto" to balance its gradient on the features
            against the benign loss's in every step.
        harmful_weight: Weight of the harmful regularizer, likewise.
        auto_weight_ratio: With "auto", the norm of each regularizer's gradient on the features, relative to that of
            the benign loss's. More immunizes faster and costs more benign accuracy.
        scale_free: Take the regularizers of H·D/tr(H), so that they do not reward shrinking or growing features.

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
        image_column_name: Column of images (or of pixel values), where it cannot be found without help.
        label_column_name: Column of labels, likewise.

    Raises:
        ArgumentError: If an option has an impossible value.

    Example:
        >>> args = ImmunizationArguments(output_dir="runs/x", objective="kappa", harmful_weight=10.0, report_to="none")
        >>> args.harmful_weight, args.benign_weight
        (10.0, 'auto')
    """

    objective: str = field(
        default="kappa", metadata={"help": "What is minimized beside the benign loss: " + ", ".join(OBJECTIVES) + "."}
    )
    benign_weight: str = field(
        default="auto", metadata={"help": "Weight of the benign regularizer: a number, or 'auto' (by gradient norm)."}
    )
    harmful_weight: str = field(
        default="auto", metadata={"help": "Weight of the harmful regularizer: a number, or 'auto' (by gradient norm)."}
    )
    auto_weight_ratio: float = field(
        default=0.3,
        metadata={"help": "With 'auto': norm of a regularizer's gradient on features over that of the benign loss's."},
    )
    scale_free: bool = field(
        default=False, metadata={"help": "Take the regularizers of H*D/tr(H), which ignores the features' scale."}
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
    image_column_name: str | None = field(default=None, metadata={"help": "Column of images, if there are several."})
    label_column_name: str | None = field(default=None, metadata={"help": "Column of labels, if there are several."})

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
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise ArgumentError(f"Expected objective= out of {', '.join(OBJECTIVES)}, found {self.objective!r}.")
        self.benign_weight = _weight("benign_weight", self.benign_weight)  # type: ignore[assignment]
        self.harmful_weight = _weight("harmful_weight", self.harmful_weight)  # type: ignore[assignment]
        ratio = _number(self.auto_weight_ratio)
        if not ratio >= 0:
            raise ArgumentError(
                f"Expected auto_weight_ratio= of at least 0, found {self.auto_weight_ratio}. "
                "Typical values lie between 0.1 and 1."
            )
        self.auto_weight_ratio = ratio
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
