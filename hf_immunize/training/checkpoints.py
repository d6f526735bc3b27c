"""Checkpoints: written whole or passed over, resumed from, and gone back to."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from hf_immunize.errors import ArgumentError, CheckpointError, HubError, NonFiniteError
from hf_immunize.features.extract import Measurement, load_measurements, save_measurements
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
from hf_immunize.hub.load import INDEX
from hf_immunize.training.distributed import sharded_weights, world_size
from hf_immunize.training.step import ImmunizationStep
from hf_immunize.vision.bare import HEAD_FILES
from hf_immunize.vision.loading import ADAPTER_FILES, plain_names


logger = logging.get_logger(__name__)

History = Sequence[Mapping[str, Any]]

STATE = "trainer_state.json"
# Names the other files of a checkpoint, with their sizes and checksums.
MANIFEST = "checkpoint_files.json"
# Made anew for the Hub, read by nobody, or removed when a checkpoint written on SIGTERM is whole.
_NOT_READ = ("README.md", "immunization.json", "training_args.bin", "checkpoint-is-incomplete.txt")
_STEP_FILE = "immunization_step.safetensors"
_REFERENCES_FILE = "immunization_state.safetensors"


# ---- writing ----


def check_finite_weights(weights: Mapping[str, Tensor]) -> None:
    """Refuse to save weights that are not finite: the loss shows it a step later, or on a GPU when it is logged."""
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(
                f"Expected finite weights to save, found NaN or infinity in {name}. Lower the learning rate or the "
                "weights, or train in full precision; the last checkpoint is sound."
            )


@contextmanager
def atomic_checkpoint(checkpoint: str | os.PathLike[str], state: TrainerState, writes: bool) -> Iterator[None]:
    """Write a checkpoint within, which `last_whole_checkpoint` passes over unless all of it was written."""
    try:
        if writes:
            # Of an earlier run, they would make half of this checkpoint pass for a whole one.
            for name in (STATE, MANIFEST):
                (Path(checkpoint) / name).unlink(missing_ok=True)
            # The Trainer writes its state after all other files and before it removes older checkpoints.
            vars(state)["save_to_json"] = lambda path: _seal(Path(path), state)
        yield
    except HubError:  # an OSError too, but of a push: the checkpoint itself is written
        raise
    except WRITE_ERRORS as error:
        reason = error.__cause__ or error if isinstance(error, CheckpointError) else error
        raise CheckpointError(
            f"Expected to write {checkpoint}, found: {reason}. Make room and resume from the one before, which "
            "resume_from_checkpoint=True does."
        ) from error
    finally:
        vars(state).pop("save_to_json", None)


def _seal(path: Path, state: TrainerState) -> None:
    """Flush and list what a checkpoint holds, and write the state, in that order."""
    folder = path.parent
    with staged_directory(folder) as staging:
        TrainerState.save_to_json(state, str(staging / path.name))
        files = _resumed_from(folder)
        for written in (*files.values(), *(each for each in folder.rglob("*") if each.is_dir())):
            flush(written)
        files[path.name] = staging / path.name
        listed = {name: [file.stat().st_size, file_sha256(file)] for name, file in sorted(files.items())}
        write_whole(folder / MANIFEST, with_checksum({"files": listed}) + "\n")


def _resumed_from(folder: Path) -> dict[str, Path]:
    """The files of a checkpoint that decide what a resumed run becomes, less the state, by their names in it."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name not in (*_NOT_READ, STATE, MANIFEST)]
    named = {path.relative_to(folder).as_posix(): path for path in found}
    return {name: path for name, path in named.items() if UNFINISHED not in name}


def remove_other_forms(target: str | os.PathLike[str], staging: str | os.PathLike[str]) -> None:
    """Remove from a folder what an earlier save of another form left, which would change what the new one loads as."""
    for name in ("config.json", SAFE_WEIGHTS_NAME, INDEX, *ADAPTER_FILES, *HEAD_FILES):
        if not (Path(staging) / name).is_file():
            (Path(target) / name).unlink(missing_ok=True)


def save_step(step: ImmunizationStep, path: str | os.PathLike[str], about: dict[str, Any] | None = None) -> None:
    """Write what a resumed run needs of a step, its settings, and plain values about the run."""
    metadata = {**(about or {}), "method": asdict(step.method), "moving": step.moving}
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in step.state_dict().items()}
    save_file(tensors, path, {name: json.dumps(value) for name, value in metadata.items()})


def save_run_state(folder: str, step: ImmunizationStep, references: dict[str, Measurement], batch: int) -> None:
    """Write the step and the measurements through the starting weights; `batch` is one process's benign images."""
    save_step(step, os.path.join(folder, _STEP_FILE), {"batch": [batch, world_size()]})
    if references:
        save_measurements(os.path.join(folder, _REFERENCES_FILE), references)


# ---- finding one that is whole ----


def checkpoint_to_resume(given: str | Literal[True], output_dir: str) -> str:
    """The given checkpoint, or the last whole one of a run; refuses one that is not as it was written."""
    if given is not True:
        wrong = flaw(given) if os.path.isdir(given) else "nothing is"
        if wrong:
            raise CheckpointError(
                f"Expected a checkpoint as it was written, found {given}, where {wrong}. Give True for the last whole "
                "one in output_dir, or check the spelling."
            )
        return given
    path, broken = last_whole_checkpoint(output_dir)
    for other, wrong in broken.items():
        logger.warning(f"Passing over {other}: {wrong}.")
    if path is None:
        raise CheckpointError(f"Expected a whole checkpoint in {output_dir}, found none. Start a new run.")
    return path


def last_whole_checkpoint(output_dir: str) -> tuple[str | None, dict[str, str]]:
    """The last checkpoint of a run without a `flaw`; and the paths of later ones, with the flaw of each."""
    broken: dict[str, str] = {}
    for path in reversed(sort_checkpoints(output_dir)):
        wrong = flaw(path)
        if wrong is None:
            return path, broken
        broken[path] = wrong
    return None, broken


def flaw(checkpoint: str | os.PathLike[str]) -> str | None:
    """What tells that a checkpoint is not as it was written, as a phrase that names a file; None if nothing does."""
    folder = Path(checkpoint)
    name = STATE
    try:
        TrainerState.load_from_json(str(folder / STATE))
        if not (folder / MANIFEST).is_file():
            return None  # of a plain Trainer or an older version, which write the state after all else
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


# ---- loading ----


def load_weights(model: nn.Module, folder: str) -> None:
    """Load saved weights into a model of transformers, of peft, or any other, under whatever names they were saved."""
    try:
        if isinstance(model, PreTrainedModel):
            _load_pretrained(model, folder)
        elif hasattr(model, "load_adapter"):  # of peft models, the adapters alone are saved
            load_adapter: Any = model.load_adapter
            load_adapter(folder, model.active_adapter, is_trainable=True)
        else:
            load_model(model, Path(folder) / "model.safetensors", strict=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"Expected the weights of this {type(model).__name__} in {folder}, found: {error}. Load another "
            "checkpoint, or into the model that was trained."
        ) from error


def _load_pretrained(model: PreTrainedModel, folder: str) -> None:
    # Many families (ViT among them) are saved under the names of older versions, which `from_pretrained` knows. The
    # Trainer, as of transformers 5.23, does not: a resumed ViT went on from its starting blocks, with a warning.
    saved, info = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"no {', '.join(sorted(info['missing_keys'])[:3])}")
    names = plain_names(model)
    state = saved.state_dict()
    model.load_state_dict({name: state[names.get(name, name)] for name in model.state_dict()})


def load_step(step: ImmunizationStep, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Go on from what `save_step` wrote; returns what it wrote about the run."""
    folder, name = os.path.split(path)
    if not os.path.isfile(path):
        if step.start is not None:
            raise CheckpointError(
                f"Expected {name} in {folder}, found none: the starting model is lost. Resume from a checkpoint that "
                "was written without save_only_model, or start anew."
            )
        logger.warning(f"{folder} has no {name}: running means of the weights start anew.")
        return {}
    try:
        state = load_file(path)
        with safe_open(path, "pt") as file:
            about = {key: json.loads(text) for key, text in (file.metadata() or {}).items() if key != "format"}
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"Expected the state of the immunization in {path}, found: {error}. Resume from another checkpoint."
        ) from error
    saved = about.get("moving", step.moving)
    if saved != step.moving:
        raise ArgumentError(
            f"Expected the {len(saved)} parameters that were trainable when {folder} was written, from {saved[0]} on, "
            f"found {len(step.moving)}, from {step.moving[0]} on. Resume with its trainable= and its model."
        )
    try:
        step.load_state_dict(state)
    except KeyError as error:
        raise CheckpointError(
            f"Expected {error} in {path}, found none: another version of hf_immunize wrote it. Resume with that "
            "version, or start anew."
        ) from error
    now, then = asdict(step.method), about.get("method", {})
    changed = [f"{key}={now[key]} (was {then[key]})" for key in now if key in then and then[key] != now[key]]
    if changed:
        logger.warning(f"Resuming {folder} with other settings than it was written with: {', '.join(changed)}.")
    return about


def load_run_state(folder: str, step: ImmunizationStep, batch: int) -> dict[str, Measurement]:
    """Go on from what `save_run_state` wrote, on however many processes; returns the measurements."""
    processes, path = world_size(), os.path.join(folder, _REFERENCES_FILE)
    about = load_step(step, os.path.join(folder, _STEP_FILE))
    old_batch, old_processes = about.get("batch", (batch, processes))
    old = old_batch * old_processes
    if (old_batch, old_processes) != (batch, processes):
        what = "dropout is drawn otherwise"
        if old != batch * processes:
            size = f"set per_device_train_batch_size={old // processes}"
            same = f"run on {old_processes} processes" if old % processes else size
            what = f"κ and the place in the epoch are of batches of another size (to keep it, {same})"
        logger.warning(
            f"The run was interrupted at {old_batch} benign images on each of {old_processes} processes, and goes on "
            f"at {batch} on each of {processes}: {what}."
        )
    return load_measurements(path) if os.path.isfile(path) else {}


# ---- going back to an earlier one ----


def by_step(history: History, metric: str) -> dict[int, float]:
    """Values of a metric, one per step; of several at one step (a resumed run may repeat one), the last."""
    return {entry["step"]: float(entry[metric]) for entry in history if metric in entry and "step" in entry}


def check_restorable(args: TrainingArguments) -> None:
    """Make sure, before training, that there will be checkpoints to load into the model in memory."""
    wrong = None
    if args.save_strategy == "no":
        wrong = "checkpoints to go back to", "save_strategy='no'"
    elif args.save_strategy == "best" and args.save_total_limit == 1:
        wrong = "room for two checkpoints", "save_strategy='best' with save_total_limit=1"
    elif sharded_weights():
        wrong = "whole weights in each process", "weights sharded by FSDP or DeepSpeed"
    if wrong:
        raise ArgumentError(f"Expected {wrong[0]} for action='restore', found {wrong[1]}. Change it, or use 'stop'.")


def best_checkpoint(
    output_dir: str, history: History, metric: str, steps: Iterable[int], rank_by: str | None, greater_is_better: bool
) -> int | None:
    """The step, of those given, with the best whole checkpoint by `rank_by`; without it the last."""
    found = [step for step in sorted(steps) if _is_of_this_run(Path(output_dir), step, history, metric)]
    if not found:
        return None
    values = by_step(history, rank_by) if rank_by else {}
    known = {step: values[step] for step in found if not math.isnan(values.get(step, math.nan))}
    sign = 1.0 if greater_is_better else -1.0
    return max(known, key=lambda step: (sign * known[step], step)) if known else found[-1]


def _is_of_this_run(output_dir: Path, step: int, history: History, metric: str) -> bool:
    """Whether a checkpoint is whole and its log holds this run's evaluation of that step, not an earlier run's."""
    folder = output_dir / f"checkpoint-{step}"
    if flaw(folder) is not None:
        return False

    def evaluations(log: History) -> set[str]:
        # As text, in which NaN equals itself; the run time in it is of no other run.
        found = (entry for entry in log if entry.get("step") == step and metric in entry)
        return {json.dumps(entry, sort_keys=True, default=str) for entry in found}

    return bool(evaluations(history) & evaluations(TrainerState.load_from_json(str(folder / STATE)).log_history))
