"""What a run keeps in its checkpoints beside the Trainer's own files."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.utils import logging

from hf_immunize.errors import ArgumentError, CheckpointError
from hf_immunize.features.extract import Measurement, load_measurements, save_measurements
from hf_immunize.training.checkpoints import save_tensors
from hf_immunize.training.distributed import world_size
from hf_immunize.training.step import ImmunizationStep


logger = logging.get_logger(__name__)


_METHOD, _MOVING = "method", "moving"


def save_step(step: ImmunizationStep, path: str | os.PathLike[str], about: dict[str, Any] | None = None) -> None:
    """Write what a resumed run needs of a step, and the settings it was made with.

    Args:
        step: The step.
        path: File to write.
        about: What else shall be known of the run: name to plain value.
    """
    metadata = {**(about or {}), _METHOD: asdict(step.method), _MOVING: step.moving}
    save_tensors(step.state_dict(), path, {name: json.dumps(value) for name, value in metadata.items()})


def load_step(step: ImmunizationStep, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Go on from what `save_step` wrote; settings that have changed since are taken as they are now, and named.

    Args:
        step: The step, at the starting weights of the run at hand.
        path: File to read.

    Returns:
        What else is known of the run (see `save_step`); empty where there is no file.

    Raises:
        CheckpointError: If it cannot be read, or is missing where it alone holds the starting weights.
        ArgumentError: If it is of another model or scope, or holds no starting weights where the method needs them.
    """
    folder = os.path.dirname(path)
    if not os.path.isfile(path):
        if step.start is not None:
            raise CheckpointError(
                f"Expected {os.path.basename(path)} in {folder}, found none: the starting model, to which the benign "
                "side is held, is lost. Resume from a checkpoint that this Trainer wrote (without save_only_model), "
                "or load these weights with from_pretrained and start anew."
            )
        logger.warning(
            f"{folder} has no {os.path.basename(path)}: running means, multiplier and queue of the weights start anew."
        )
        return {}
    try:
        state = load_file(path)
        with safe_open(path, "pt") as file:
            about = {name: json.loads(text) for name, text in (file.metadata() or {}).items() if name != "format"}
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"Expected the state of the immunization in {path}, found: {error}. Resume from another checkpoint."
        ) from error
    moved = about.get(_MOVING, step.moving)
    if moved != step.moving:
        raise ArgumentError(
            f"Expected the parameters to move that moved when {folder} was written ({len(moved)}, the first "
            f"{moved[0]}), found {len(step.moving)}, the first {step.moving[0]}. Resume with trainable= and the model "
            "of the interrupted run."
        )
    step.load_state_dict(state)
    now, saved = asdict(step.method), about.get(_METHOD, {})
    changed = [f"{name}={now[name]} (was {saved[name]})" for name in now if name in saved and saved[name] != now[name]]
    if changed:
        logger.warning(f"Resuming {folder} with other settings than it was written with: {', '.join(changed)}.")
    return about


_STATE_FILE = "immunization_state.safetensors"
_STEP_FILE = "immunization_step.safetensors"
_BATCH = "batch"


def save_run_state(folder: str, step: ImmunizationStep, references: dict[str, Measurement], batch: int) -> None:
    """Write the state of the step and the features' factors through the starting weights.

    Args:
        folder: The checkpoint.
        step: What the run computes in a step; its state is the same on every process.
        references: Measurements through the starting weights.
        batch: Benign images a process takes in a micro-batch.
    """
    save_step(step, os.path.join(folder, _STEP_FILE), {_BATCH: [batch, world_size()]})
    if references:
        save_measurements(os.path.join(folder, _STATE_FILE), references)


def load_run_state(folder: str, step: ImmunizationStep, batch: int) -> dict[str, Measurement]:
    """Go on from what `save_run_state` wrote, on however many processes.

    Args:
        folder: The checkpoint.
        step: Takes its state.
        batch: Benign images a process takes in a micro-batch now.

    Returns:
        Measurements through the starting weights; none where the checkpoint holds none.

    Raises:
        CheckpointError, ArgumentError: See `load_step`.
    """
    before = load_step(step, os.path.join(folder, _STEP_FILE)).get(_BATCH)
    if before is not None:
        _say_what_differs((int(before[0]), int(before[1])), (batch, world_size()))
    path = os.path.join(folder, _STATE_FILE)
    return load_measurements(path) if os.path.isfile(path) else {}


def _say_what_differs(before: tuple[int, int], now: tuple[int, int]) -> None:
    """Of images a process takes and the number of processes."""
    (old_batch, old_processes), (batch, processes) = before, now
    old, new = old_batch * old_processes, batch * processes
    if old != new:
        same = f"With per_device_train_batch_size={old // processes} it goes on as it was."
        other = f"On a number of processes that divides {old} it can go on as it was."
        logger.warning(
            f"The run was interrupted at batches of {old} benign images ({old_batch} on each of {old_processes} "
            f"processes) and goes on at {new} ({batch} on each of {processes}): κ is of batches of another size, and "
            f"the place in the epoch is counted in the new ones. {other if old % processes else same}"
        )
    elif old_processes != processes:
        logger.warning(
            f"The run was interrupted on {old_processes} processes and goes on on {processes}, at the same batches: "
            "random numbers within the model (dropout) and the images of the budget's hold-out are drawn otherwise."
        )
