"""Callbacks for any `transformers.Trainer`: stop before benign accuracy is lost, or when RIR is reached.

They decide by ``state.log_history`` alone, which every checkpoint holds: a resumed run decides as one that was not
stopped, and several of one class do not disturb each other.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_immunize.errors import ArgumentError, CheckpointError
from hf_immunize.training.checkpoints import History, best_checkpoint, by_step, check_restorable, load_weights
from hf_immunize.training.distributed import any_process, broadcast_from_main


_ELSEWHERE = "another process found the reason in its own metrics"
logger = logging.get_logger(__name__)


def benign_drops(history: History, metric: str = "eval_accuracy", baseline: float | None = None) -> dict[int, float]:
    """How many points benign accuracy lies below its starting value, by step; infinite where it is NaN."""
    values = by_step(history, metric)
    for value in values.values():
        if value < 0 or value > 1:
            raise ArgumentError(f"Expected {metric} between 0 and 1, found {value:g}. Have it computed as a fraction.")
    start = next(iter(values.values()), math.nan) if baseline is None else baseline
    # The last digits of a difference of fractions are rounding: 0.90 - 0.88 is no more than two points.
    drops = {step: round((start - value) * 100.0, 9) for step, value in values.items()}
    return {step: math.inf if math.isnan(drop) else drop for step, drop in drops.items()}


def rir_successes(history: History, target: float, metric: str = "eval_log10_rir") -> dict[int, bool]:
    """Whether RIR is known to have reached a target, by step: below an upper bound, the true one may lie under it."""
    uppers = by_step(history, metric.removesuffix("log10_rir") + "rir_is_upper_bound")
    found = by_step(history, metric)
    return {step: value >= math.log10(target) and not uppers.get(step) for step, value in found.items()}


class _EvaluationCallback(TrainerCallback):
    """Looks at evaluations during training; all processes decide alike."""

    def __init__(self, metric: str) -> None:
        self.metric = _with_prefix(metric)
        self._training = self._lacks = False

    def _reason(self, state: TrainerState) -> str | None:
        """Why to stop after the last evaluation, None to go on."""
        raise NotImplementedError

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if args.eval_strategy == "no":
            raise ArgumentError(
                f"Expected evaluations for {type(self).__name__} to look at, found eval_strategy='no'. "
                "Set eval_strategy='steps' or 'epoch'."
            )
        self._training, self._lacks = True, False
        reason = self._reason(state)
        if any_process(reason is not None, args.device):
            control.should_training_stop = True
            _warn(state, f"This run was already at its end, and stops after one more step: {reason or _ELSEWHERE}.")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not self._training:
            return
        # With several evaluation sets, a later one may have it: only the next step shows.
        self._lacks = not by_step(state.log_history, self.metric)
        reason = self._reason(state)
        if any_process(reason is not None, args.device):
            if not control.should_training_stop:
                _warn(state, f"Stopping at step {state.global_step}: {reason or _ELSEWHERE}.")
            control.should_training_stop = True

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._lacks:
            found = sorted({key for entry in state.log_history for key in entry if key.startswith("eval_")})
            raise ArgumentError(
                f"Expected {self.metric} in the evaluations for {type(self).__name__}, found {', '.join(found)}. "
                "Name one of these, or have it computed: by compute_metrics=, RIR by ImmunizationTrainer."
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._training = False  # evaluations that follow are not looked at


class BenignUtilityCallback(_EvaluationCallback):
    """Stop when benign accuracy falls more than a number of points below its starting value, or go back as well.

    The starting value is the first evaluation in training: set ``eval_on_start=True``, or pass it as ``baseline``.
    ``action="restore"`` loads, at the end of training, the best checkpoint within the limit by
    ``metric_for_best_model``, without it the latest. It must have been evaluated at its step: save as often as you
    evaluate. ``state.best_model_checkpoint`` names it, and the log history gets ``{"returned_to_step": …}``. A run
    that is resumed beyond the limit takes one step.

    Args:
        max_drop_points: Percentage points of accuracy that may be lost.
        metric: The benign accuracy, as the log calls it, with or without ``eval_``.
        action: "stop" or "restore".
        baseline: The starting value, a fraction as the metric; by default the first evaluation.

    Raises:
        ArgumentError: For impossible values; without evaluations, their metric or, to restore, checkpoints.
        CheckpointError: At the end of training, where there is no checkpoint to go back to.

    Example:
        >>> callback = BenignUtilityCallback(max_drop_points=2.0, baseline=0.9)
        >>> from transformers import TrainerControl
        >>> state, control = TrainerState(), TrainerControl()
        >>> args = TrainingArguments(eval_strategy="steps", eval_steps=5, report_to="none", use_cpu=True)
        >>> callback.on_train_begin(args, state, control)
        >>> state.log_history.append({"step": 5, "eval_accuracy": 0.87})
        >>> callback.on_evaluate(args, state, control)
        >>> control.should_training_stop
        True
    """

    def __init__(
        self,
        max_drop_points: float = 2.0,
        metric: str = "eval_accuracy",
        action: str = "stop",
        baseline: float | None = None,
    ) -> None:
        if action not in ("stop", "restore"):
            raise ArgumentError(f"Expected action= 'stop' or 'restore', found {action!r}.")
        if not 0 <= max_drop_points < math.inf:
            raise ArgumentError(
                f"Expected max_drop_points= of at least 0 (percentage points), found {max_drop_points}."
            )
        if baseline is not None and not 0 <= baseline <= 1:
            raise ArgumentError(f"Expected baseline= between 0 and 1, a fraction, found {baseline}.")
        super().__init__(metric)
        self.max_drop_points, self.action, self.baseline = max_drop_points, action, baseline

    def _drops(self, state: TrainerState) -> dict[int, float]:
        return benign_drops(state.log_history, self.metric, self.baseline)

    def _reason(self, state: TrainerState) -> str | None:
        step, drop = next(reversed(self._drops(state).items()), (0, 0.0))
        if drop <= self.max_drop_points:
            return None
        return f"{self.metric} fell {drop:.3g} points by step {step}, more than the {self.max_drop_points:g} allowed"

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Check the settings; stop a resumed run that was already beyond the limit."""
        if self.action == "restore":
            check_restorable(args)
        known = self.baseline is not None or by_step(state.log_history, self.metric)
        if not known and not args.eval_on_start:
            _warn(
                state,
                f"No {self.metric} of the starting weights is known: BenignUtilityCallback will count from the first "
                "evaluation, and not see what was lost before it. Set eval_on_start=True or pass baseline=.",
            )
        super().on_train_begin(args, state, control, **kwargs)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Decide whether to go on; weights that will be given up are not saved."""
        super().on_evaluate(args, state, control, **kwargs)
        if self._training and self.action == "restore" and any_process(self._reason(state) is not None, args.device):
            control.should_save = False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Go back, where that was asked for and the last evaluation was beyond the limit."""
        super().on_train_end(args, state, control, **kwargs)
        reason = self._reason(state)
        if self.action == "stop" or not any_process(reason is not None, args.device):
            return
        rank_by = args.metric_for_best_model and _with_prefix(args.metric_for_best_model)
        within = [step for step, drop in self._drops(state).items() if drop <= self.max_drop_points]
        step = broadcast_from_main(
            best_checkpoint(
                args.output_dir, state.log_history, self.metric, within, rank_by, args.greater_is_better is not False
            )
        )
        if step is None:
            raise CheckpointError(
                f"Expected a checkpoint in {args.output_dir} to go back to, evaluated at its step and within the "
                f"limit, found none, while {reason or _ELSEWHERE}. The model in memory is beyond the limit. Save and "
                "evaluate more often, lower the learning rate or the harmful weight, or use action='stop'."
            )
        folder = f"{args.output_dir}/checkpoint-{step}"
        load_weights(kwargs["model"], folder)
        state.best_model_checkpoint, state.best_global_step = folder, step
        state.best_metric = by_step(state.log_history, rank_by).get(step) if rank_by else state.best_metric
        state.log_history.append({"returned_to_step": step, "step": state.global_step})
        _warn(state, f"Returned to the weights of step {step}: {reason or _ELSEWHERE}.")


class TargetRIRCallback(_EvaluationCallback):
    """Stop when the exact RIR has reached a target in successive evaluations.

    A lower bound (harmful rank was lost) counts; an upper bound and an undetermined RIR do not. RIR describes linear
    probing by gradient descent, not fine-tuning: audit the result. What benign accuracy may lose is up to a
    `BenignUtilityCallback` beside it. With ``load_best_model_at_end``, set
    ``metric_for_best_model="log10_rir"``. `ImmunizationTrainer` logs RIR; a plain Trainer can get it from
    ``compute_metrics``. A run that is resumed after it had reached the target takes one step.

    Args:
        target: The RIR to reach, dimensionless.
        patience: In how many evaluations on end.
        metric: The decimal logarithm of RIR, as the log calls it; for an evaluation set named x, eval_x_log10_rir.

    Raises:
        ArgumentError: For impossible values; without evaluations, or where the first lacks the metric.

    Example:
        >>> callback = TargetRIRCallback(target=1000.0, patience=2)
        >>> from transformers import TrainerControl
        >>> state, control = TrainerState(), TrainerControl()
        >>> args = TrainingArguments(eval_strategy="steps", eval_steps=5, report_to="none", use_cpu=True)
        >>> callback.on_train_begin(args, state, control)
        >>> for step, log10_rir in enumerate([0.0, 3.2, 3.4]):
        ...     state.log_history.append({"step": step, "eval_log10_rir": log10_rir})
        ...     callback.on_evaluate(args, state, control)
        ...     print(control.should_training_stop)
        False
        False
        True
    """

    def __init__(self, target: float = 1000.0, patience: int = 1, metric: str = "eval_log10_rir") -> None:
        if not (0 < target < math.inf):
            raise ArgumentError(f"Expected a finite target= above 0, found {target}. The paper's networks: 10 to 100.")
        if patience < 1 or int(patience) != patience:
            raise ArgumentError(f"Expected patience= as a whole number of at least 1, found {patience}.")
        if not metric.endswith("log10_rir"):
            raise ArgumentError(f"Expected metric= to end in log10_rir, found {metric!r}, as in 'eval_log10_rir'.")
        super().__init__(metric)
        self.target, self.patience = float(target), int(patience)

    def _reason(self, state: TrainerState) -> str | None:
        reached = rir_successes(state.log_history, self.target, self.metric)
        last = list(reached)[-self.patience :]
        if len(last) < self.patience or not all(reached[step] for step in last):
            return None
        value = by_step(state.log_history, self.metric)[last[-1]]
        return f"log10 RIR was {value:.3f} at step {last[-1]}, at or above the target of {math.log10(self.target):.3f}"


def _with_prefix(metric: str) -> str:
    return metric if metric.startswith("eval_") else f"eval_{metric}"


def _warn(state: TrainerState, message: str) -> None:
    if state.is_world_process_zero:
        logger.warning(message)
