"""What a run keeps in its checkpoints beside the Trainer's own files."""

from __future__ import annotations

import os

from transformers.utils import logging

from hf_immunize.features.measurement import Measurement, load_measurements, save_measurements
from hf_immunize.training.distributed import world_size
from hf_immunize.training.resuming import load_step, save_step
from hf_immunize.training.step import ImmunizationStep


_STATE_FILE = "immunization_state.safetensors"
_STEP_FILE = "immunization_step.safetensors"
_BATCH = "batch"
logger = logging.get_logger(__name__)


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
