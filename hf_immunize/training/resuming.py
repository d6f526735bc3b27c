"""The state of an `ImmunizationStep` in a checkpoint, and what is said where it is not that of the run at hand."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.utils import logging

from hf_immunize.errors import ArgumentError, CheckpointError
from hf_immunize.training.saving import save_tensors
from hf_immunize.training.step import ImmunizationStep


_METHOD, _MOVING = "method", "moving"
logger = logging.get_logger(__name__)


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
