"""Going back to an earlier checkpoint while the model is in memory."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_immunize.errors import ArgumentError, CheckpointError, HubError, NonFiniteError
from hf_immunize.files import (
    UNFINISHED,
    WRITE_ERRORS,
    checked,
    file_sha256,
    flush,
    staged_directory,
    with_checksum,
    write_whole,
)
from hf_immunize.hub.weights import INDEX, WEIGHT_PATTERNS
from hf_immunize.vision.bare import HEAD_FILES
from hf_immunize.vision.loading import ADAPTER_FILES, plain_names


logger = logging.get_logger(__name__)


History = Sequence[Mapping[str, Any]]


def by_step(history: History, metric: str) -> dict[int, float]:
    """Values of a metric, one a step; of several at one step (a resumed run may repeat one), the last.

    Args:
        history: ``trainer.state.log_history``.
        metric: A key of its entries.

    Returns:
        Step to value, in the order of the steps' first appearance.

    Example:
        >>> by_step([{"step": 0, "eval_accuracy": 0.9}, {"step": 5, "loss": 1.0}], "eval_accuracy")
        {0: 0.9}
    """
    return {entry["step"]: float(entry[metric]) for entry in history if metric in entry and "step" in entry}


def benign_drops(
    history: History, metric: str = "eval_accuracy", baseline: float | None = None, percent: bool = False
) -> dict[int, float]:
    """How many points benign accuracy lies below its starting value, at every evaluation.

    Args:
        history: ``trainer.state.log_history``.
        metric: The accuracy, as the history calls it.
        baseline: The starting value; by default the first one in the history.
        percent: Whether the accuracy is logged between 0 and 100, not between 0 and 1.

    Returns:
        Step to points (negative where it rose, infinite where it is NaN).

    Raises:
        ArgumentError: If a value lies outside of the range that `percent` says.

    Example:
        >>> history = [{"step": 0, "eval_accuracy": 0.75}, {"step": 5, "eval_accuracy": 0.625}]
        >>> benign_drops(history)
        {0: 0.0, 5: 12.5}
    """
    values = by_step(history, metric)
    top = 100.0 if percent else 1.0
    for value in values.values():
        if value < 0 or value > top:
            raise ArgumentError(
                f"Expected {metric} between 0 and {top:g}, found {value:g}. "
                + ("Leave percent= out if it is a fraction." if percent else "Pass percent=True if it is in percent.")
            )
    start = next(iter(values.values()), math.nan) if baseline is None else baseline
    # The last digits of a difference of fractions are rounding: 0.90 - 0.88 is no more than two points.
    drops = {step: round((start - value) * 100.0 / top, 9) for step, value in values.items()}
    return {step: math.inf if math.isnan(drop) else drop for step, drop in drops.items()}


def rir_successes(history: History, target: float, metric: str = "eval_log10_rir") -> dict[int, bool]:
    """Whether RIR is known to have reached a target, at every evaluation.

    A lower bound at or above the target counts. An upper bound does not, nor does an undetermined RIR: the true one
    may be below.

    Args:
        history: ``trainer.state.log_history``.
        target: The RIR to reach, dimensionless.
        metric: The decimal logarithm of RIR, as the history calls it; ``…rir_is_upper_bound`` beside it is heeded.

    Returns:
        Step to whether it is reached.

    Example:
        >>> rir_successes([{"step": 5, "eval_log10_rir": 3.1, "eval_rir_is_upper_bound": 0.0}], target=1000.0)
        {5: True}
    """
    bound = metric.removesuffix("log10_rir") + "rir_is_upper_bound"
    uppers = by_step(history, bound)
    found = by_step(history, metric)
    return {step: value >= math.log10(target) and not uppers.get(step) for step, value in found.items()}


STATE = "trainer_state.json"
# Names the other files of a checkpoint, with their sizes and checksums.
MANIFEST = "checkpoint_files.json"
# Made anew for the Hub, or read by nobody.
_NOT_READ = ("README.md", "immunization.json", "training_args.bin")
_NUMBERS = (".safetensors", ".pt", ".pth", ".bin", ".distcp")


def check_finite_weights(weights: Mapping[str, Tensor]) -> None:
    """Refuse to save weights that are lost, so that the last checkpoint is sound.

    A loss term that is not finite is seen in the step after the weights were lost, or on a GPU when it is logged.

    Args:
        weights: Name to weight, of those that moved.

    Raises:
        NonFiniteError: If a weight is NaN or infinite; the first is named.
    """
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(
                f"Expected finite weights to save, found NaN or infinity in {name}. Lower the learning rate or the "
                "weights, or train in full precision; the last checkpoint is sound."
            )


@contextmanager
def whole_or_passed_over(checkpoint: str | os.PathLike[str], state: TrainerState, writes: bool) -> Iterator[None]:
    """Write a checkpoint within, which `last_whole_checkpoint` passes over unless all of it was written.

    The Trainer writes its state after all other files and before it removes older checkpoints. At that moment the
    others are flushed to the disk and listed with their checksums, and only then the state appears.

    Args:
        checkpoint: Its folder.
        state: The Trainer's.
        writes: Whether this process writes it.

    Raises:
        CheckpointError: If writing fails.
    """
    try:
        if writes:
            # Of an earlier run, they would make half of this checkpoint pass for a whole one.
            for name in (STATE, MANIFEST):
                (Path(checkpoint) / name).unlink(missing_ok=True)
            vars(state)["save_to_json"] = lambda path: _seal(Path(path), state)
        yield
    except HubError:  # an OSError too, but of a push: the checkpoint itself is written
        raise
    except WRITE_ERRORS as error:
        # What a staged file of the checkpoint says of itself, it need not say twice.
        reason = error.__cause__ or error if isinstance(error, CheckpointError) else error
        raise CheckpointError(
            f"Expected to write {checkpoint}, found: {reason}. Earlier checkpoints are untouched: make room and "
            "resume with resume_from_checkpoint=True, which passes over the unfinished one."
        ) from error
    finally:
        vars(state).pop("save_to_json", None)


def load_weights(model: PreTrainedModel, folder: str) -> None:
    """Load saved weights into a model, under whatever names they were saved.

    Many families (ViT among them) are saved under the names of older versions. The Trainer, as of transformers 5.23,
    looks for the present names, and of the others says no more than a warning: a resumed ViT went on from its starting
    blocks. ``from_pretrained`` knows both.

    Args:
        model: Model to load into.
        folder: Where ``save_pretrained`` put the weights.

    Raises:
        CheckpointError: If a weight is missing there or has another shape.
    """
    try:
        saved, info = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"no {', '.join(sorted(info['missing_keys'])[:3])}")
        names = plain_names(model)
        state = saved.state_dict()
        model.load_state_dict({name: state[names.get(name, name)] for name in model.state_dict()})
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"Expected the weights of this {type(model).__name__} in {folder}, found: {error}. Resume from another "
            "checkpoint, or with the model that was trained."
        ) from error


def remove_other_forms(target: str | os.PathLike[str], staging: str | os.PathLike[str]) -> None:
    """Remove from a folder what an earlier save of another form left, which would make something else of the new one.

    Args:
        target: The folder.
        staging: What is about to be moved there.
    """
    for name in ("config.json", WEIGHT_PATTERNS[0], INDEX, *ADAPTER_FILES, *HEAD_FILES):
        if not (Path(staging) / name).is_file():
            (Path(target) / name).unlink(missing_ok=True)


def last_whole_checkpoint(output_dir: str) -> tuple[str | None, dict[str, str]]:
    """The last checkpoint of a run that is as it was written (see `flaw`).

    Args:
        output_dir: The run's folder.

    Returns:
        Its path, or None; and the paths of later ones, with what is wrong with each.
    """
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    broken: dict[str, str] = {}
    for path in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        wrong = flaw(path)
        if wrong is None:
            return str(path), broken
        broken[str(path)] = wrong
    return None, broken


def checkpoint_to_resume(output_dir: str) -> str:
    """The last whole checkpoint of a run; says which later ones are passed over, and why.

    Args:
        output_dir: The run's folder.

    Returns:
        Its path.

    Raises:
        CheckpointError: If there is none.
    """
    path, broken = last_whole_checkpoint(output_dir)
    for other, wrong in broken.items():
        logger.warning(f"Passing over {other}: {wrong}.")
    if path is None:
        raise CheckpointError(
            f"Expected a whole checkpoint in {output_dir}, found none. Start without resume_from_checkpoint."
        )
    return path


def check_whole(checkpoint: str) -> None:
    """Refuse a checkpoint to resume from that is not as it was written.

    Args:
        checkpoint: Its folder.

    Raises:
        CheckpointError: With the file that is missing or has changed.
    """
    if not os.path.isdir(checkpoint):
        found = f"none at {checkpoint}"
    elif wrong := flaw(checkpoint):
        found = f"{checkpoint}, in which {wrong}"
    else:
        return
    raise CheckpointError(
        f"Expected the folder of a checkpoint as it was written, found {found}. Give True for the last whole one "
        "in output_dir, or check the spelling."
    )


def flaw(checkpoint: str | os.PathLike[str]) -> str | None:
    """What tells that a checkpoint is not as it was written.

    Each file has to have the size and the checksum of the list beside it; what people add or change for the Hub (the
    card, the record) does not count. Where an older version or a plain Trainer left no list, the files have to be
    there and not empty.

    Args:
        checkpoint: Its folder.

    Returns:
        A phrase that names a file; None if nothing is wrong.
    """
    folder = Path(checkpoint)
    name = STATE
    try:
        TrainerState.load_from_json(str(folder / STATE))
        if not (folder / MANIFEST).is_file():
            return _flaw_without_list(folder)
        name = MANIFEST
        listed = checked((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, (size, digest) in listed.items():
            if (folder / name).stat().st_size != size or file_sha256(folder / name) != digest:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        return f"{name} cannot be read ({type(error).__name__})"
    return None


def _seal(path: Path, state: TrainerState) -> None:
    """Flush and list what a checkpoint holds, and write the state, in that order."""
    folder = path.parent
    with staged_directory(folder) as staging:
        TrainerState.save_to_json(state, str(staging / path.name))
        files = {file.relative_to(folder).as_posix(): file for file in _resumed_from(folder)}
        for written in (*files.values(), *(each for each in folder.rglob("*") if each.is_dir())):
            flush(written)
        files[path.name] = staging / path.name
        listed = {name: [file.stat().st_size, file_sha256(file)] for name, file in sorted(files.items())}
        write_whole(folder / MANIFEST, with_checksum({"files": listed}) + "\n")


def _resumed_from(folder: Path) -> list[Path]:
    """The files of a checkpoint that decide what a resumed run becomes, less the state."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name not in (*_NOT_READ, STATE, MANIFEST)]
    return [path for path in found if not any(part.startswith(UNFINISHED) for part in path.relative_to(folder).parts)]


def _flaw_without_list(folder: Path) -> str | None:
    """As `flaw`, by names and sizes alone."""
    files = _resumed_from(folder)
    names = [path.relative_to(folder).as_posix() for path in files]
    for path, name in zip(files, names, strict=True):
        if not path.stat().st_size and path.suffix in _NUMBERS:
            return f"{name} is empty"

    def found(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in names)

    # Of DeepSpeed, which may keep all in a folder of its own; and a sharded model of FSDP.
    if found("global_step"):
        return None
    if not found(r"(.*/)?(model|adapter_model|pytorch_model)"):
        return "the weights are missing"
    # With save_only_model there are none of them.
    parts = {"optimizer.pt": "optimizer", "scheduler.pt": "scheduler", "rng_state.pth": "rng_state"}
    if found("immunization_step") or any(map(found, parts.values())):
        return next((f"{name} is missing" for name, pattern in parts.items() if not found(pattern)), None)
    return None


def save_tensors(
    tensors: dict[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Write named tensors as safetensors, from any device and with any sharing of memory.

    Args:
        tensors: Name to tensor.
        path: File to write.
        metadata: Text that goes into the file's header.
    """
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, path, metadata)


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
