"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerState
from transformers.utils import logging

from hf_immunize.errors import CheckpointError, HubError, NonFiniteError


# What a full disk raises: torch.save a RuntimeError, safetensors its own.
_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
_WRITTEN_LAST = "trainer_state.json"
logger = logging.get_logger(__name__)


@contextmanager
def staged_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory within the target to write into; its files replace the target's only when all are written.

    Args:
        target: The directory that the files are for; other files in it stay.

    Yields:
        The directory to write into, on the same file system.

    Raises:
        CheckpointError: If writing fails (a full disk, say); the target is then as it was.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with staged_directory(f"{folder}/model") as staging:
        ...         _ = (staging / "config.json").write_text("{}", encoding="utf-8")
        ...     os.listdir(f"{folder}/model")
        ['config.json']
    """
    target = Path(target)
    new, staging = not target.exists(), None
    try:
        target.mkdir(parents=True, exist_ok=True)
        # Within the target, which may be a mount of its own; a push to the Hub leaves out what begins with "_".
        staging = Path(tempfile.mkdtemp(prefix="_unfinished-", dir=target))
        yield staging
        for file in sorted(path for path in staging.rglob("*") if path.is_file()):
            place = target / file.relative_to(staging)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    except _WRITE_ERRORS as error:
        raise CheckpointError(
            f"Expected to write {target}, found: {error}. What was there before is untouched; make room or choose "
            "another output_dir, and save again."
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if new:
            with suppress(OSError):  # not empty: the files are in place
                target.rmdir()


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
def whole_or_passed_over(checkpoint: str | os.PathLike[str], writes: bool) -> Iterator[None]:
    """Write a checkpoint within, which `last_whole_checkpoint` passes over unless all of it was written.

    Args:
        checkpoint: Its folder.
        writes: Whether this process writes it.

    Raises:
        CheckpointError: If writing fails.
    """
    try:
        if writes:
            # Of an earlier run, it would make half of this checkpoint pass for a whole one.
            (Path(checkpoint) / _WRITTEN_LAST).unlink(missing_ok=True)
        yield
    except HubError:  # an OSError too, but of a push: the checkpoint itself is written
        raise
    except _WRITE_ERRORS as error:
        raise CheckpointError(
            f"Expected to write {checkpoint}, found: {error}. Earlier checkpoints are untouched: make room and resume "
            "with resume_from_checkpoint=True, which passes over the unfinished one."
        ) from error


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
        model.load_state_dict(saved.state_dict())
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"Expected the weights of this {type(model).__name__} in {folder}, found: {error}. Resume from another "
            "checkpoint, or with the model that was trained."
        ) from error


def last_whole_checkpoint(output_dir: str) -> tuple[str | None, list[str]]:
    """The last checkpoint of a run that was written to its end.

    The Trainer writes ``trainer_state.json`` last, so a checkpoint without a readable one was cut off.

    Args:
        output_dir: The run's folder.

    Returns:
        Its path, or None; and the paths of later ones that were cut off.
    """
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    broken = []
    for path in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            TrainerState.load_from_json(str(path / _WRITTEN_LAST))
        except (OSError, ValueError, TypeError):
            broken.append(str(path))
        else:
            return str(path), broken
    return None, broken


def checkpoint_to_resume(output_dir: str) -> str:
    """The last whole checkpoint of a run; says which later ones were cut off.

    Args:
        output_dir: The run's folder.

    Returns:
        Its path.

    Raises:
        CheckpointError: If there is none.
    """
    path, broken = last_whole_checkpoint(output_dir)
    for cut_off in broken:
        logger.warning(f"Passing over {cut_off}: it was not written to its end.")
    if path is None:
        raise CheckpointError(
            f"Expected a whole checkpoint in {output_dir}, found none. Start without resume_from_checkpoint."
        )
    return path


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
