"""The state of an `ImmunizationStep` in a checkpoint, and what is said where it is not that of the run at hand."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.utils import logging

from hf_immunize.errors import CheckpointError
from hf_immunize.training.saving import save_tensors
from hf_immunize.training.step import ImmunizationStep


_METHOD = "method"
logger = logging.get_logger(__name__)


def save_step(step: ImmunizationStep, path: str | os.PathLike[str]) -> None:
    """Write what a resumed run needs of a step, and the settings it was made with.

    Args:
        step: The step.
        path: File to write.
    """
    save_tensors(step.state_dict(), path, {_METHOD: json.dumps(asdict(step.method))})


def load_step(step: ImmunizationStep, path: str | os.PathLike[str]) -> None:
    """Go on from what `save_step` wrote; settings that have changed since are taken as they are now, and named.

    Args:
        step: The step, at the starting weights of the run at hand.
        path: File to read.

    Raises:
        CheckpointError: If it cannot be read, or is missing where it alone holds the starting weights.
        ArgumentError: If the starting weights in it are of another model, scope or method.
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
        return
    try:
        state = load_file(path)
        with safe_open(path, "pt") as file:
            saved = json.loads((file.metadata() or {}).get(_METHOD, "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"Expected the state of the immunization in {path}, found: {error}. Resume from another checkpoint."
        ) from error
    step.load_state_dict(state)
    now = asdict(step.method)
    changed = [f"{name}={now[name]} (was {saved[name]})" for name in now if name in saved and saved[name] != now[name]]
    if changed:
        logger.warning(f"Resuming {folder} with other settings than it was written with: {', '.join(changed)}.")
