"""Going back to an earlier checkpoint while the model is in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_immunize.errors import ArgumentError, CheckpointError
from hf_immunize.training.history import History, by_step
from hf_immunize.training.saving import STATE, flaw, load_weights


logger = logging.get_logger(__name__)


def check_restorable(args: TrainingArguments, state: TrainerState) -> None:
    """Make sure, before training, that there will be checkpoints to go back to.

    Args:
        args: The Trainer's.
        state: The Trainer's, as training begins.

    Raises:
        ArgumentError: If there will be none, or none that can be loaded into the model in memory.
    """
    wrong = None
    if args.save_strategy == "no":
        wrong = "checkpoints to go back to", "save_strategy='no'", "Save as often as you evaluate"
    elif args.save_strategy == "best" and args.save_total_limit == 1:
        wrong = "room for two checkpoints", "save_strategy='best' with save_total_limit=1", "Raise save_total_limit"
    elif state.is_hyper_param_search:
        wrong = (
            "a single run",
            "a search for hyperparameters, whose runs have folders of their own",
            "Train once with what it found",
        )
    elif sharded_weights():
        wrong = "whole weights in each process", "weights sharded by FSDP or DeepSpeed", "Load the checkpoint yourself"
    if wrong:
        raise ArgumentError(f"Expected {wrong[0]} for action='restore', found {wrong[1]}. {wrong[2]}, or use 'stop'.")
    by_steps = args.save_strategy == "steps" and state.save_steps % max(state.eval_steps, 1) != 0
    if args.save_strategy != "best" and (args.save_strategy != args.eval_strategy or by_steps):
        logger.warning_once(
            "Some checkpoints will be saved at steps without an evaluation. BenignUtilityCallback does not go back to "
            "these, and with save_total_limit they may crowd out the others: save at steps that are evaluated."
        )


def sharded_weights() -> bool:
    """Whether processes hold parts of the weights, so that none can run or load the model by itself."""
    # Without an accelerator, of a Trainer or another, there is nothing to be sharded.
    if not AcceleratorState._shared_state:
        return False
    return AcceleratorState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def load_into(model: nn.Module, folder: str) -> None:
    """Load a checkpoint's weights into the model in memory: of transformers, of peft, or any other module.

    Args:
        model: The model, not wrapped for several processes.
        folder: The checkpoint, as the Trainer saved it.

    Raises:
        CheckpointError: If the weights are not there or do not fit.
    """
    if isinstance(model, PreTrainedModel):
        load_weights(model, folder)
        return
    # Of peft models, the adapters alone are saved.
    load_adapter: Any = getattr(model, "load_adapter", None)
    try:
        if load_adapter is not None:
            load_adapter(folder, model.active_adapter, is_trainable=True)
        else:
            load_model(model, Path(folder) / "model.safetensors", strict=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"Expected the weights of this {type(model).__name__} in {folder}, found: {error}. The model in memory is "
            "as training left it; load the checkpoint by hand."
        ) from error


def best_checkpoint(
    output_dir: str, history: History, metric: str, steps: Iterable[int], rank_by: str | None, greater_is_better: bool
) -> int | None:
    """The best saved checkpoint out of some steps.

    Args:
        output_dir: The run's folder.
        history: ``trainer.state.log_history``.
        metric: The metric by whose evaluation at that very step a checkpoint was found good.
        steps: Those steps.
        rank_by: The metric that says which is best; without one it is the latest.
        greater_is_better: Of that metric.

    Returns:
        The step of the best whole checkpoint of this run, None if there is none.
    """
    found = [step for step in sorted(steps) if _is_of_this_run(Path(output_dir), step, history, metric)]
    if not found:
        return None
    values = by_step(history, rank_by) if rank_by else {}
    known = {step: values[step] for step in found if not math.isnan(values.get(step, math.nan))}
    sign = 1.0 if greater_is_better else -1.0
    return max(known, key=lambda step: (sign * known[step], step)) if known else found[-1]


def _is_of_this_run(output_dir: Path, step: int, history: History, metric: str) -> bool:
    """Whether a checkpoint is whole and its log holds this run's evaluation of that step, not an earlier run's."""
    try:
        theirs = TrainerState.load_from_json(str(output_dir / f"checkpoint-{step}" / STATE)).log_history
    except (OSError, ValueError, TypeError):
        return False
    # As text, in which NaN equals itself; it holds the evaluation's run time, which no other run repeats.
    of_step = {_text(entry) for entry in history if entry.get("step") == step and metric in entry}
    of_this_run = any(_text(entry) in of_step for entry in theirs if entry.get("step") == step and metric in entry)
    return of_this_run and flaw(output_dir / f"checkpoint-{step}") is None


def _text(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True, default=str)
