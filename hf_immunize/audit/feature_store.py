"""Features of a run, kept on disk, so that an audit that goes on after an interruption extracts none of them again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hf_immunize.audit.journal import fingerprint
from hf_immunize.audit.kept_tensors import read_kept, save_kept
from hf_immunize.errors import CheckpointError
from hf_immunize.features.layers import Extraction, Layer
from hf_immunize.files import remove_leftovers, staged_directory


if TYPE_CHECKING:
    from transformers import PreTrainedModel


View = tuple[Layer, str]
# Raised when the same model and images would give other features.
_FORMAT = 1


class FeatureStore:
    """Extractions in a folder, a safetensors file for each layer and view, whole or not there.

    A file's name is a digest of the weights, the model's configuration, the images as the model sees them (so of the
    data and of the processor), the layer and the view: what it holds cannot be taken for anything else.

    Args:
        folder: Where they are kept; None keeps none.
        limit: Bytes that all of them may take, at most half of what the disk has free; 0 keeps none.
        warnings: A sentence is appended where they cannot be written.

    Example:
        >>> store = FeatureStore(None, 0, [])
        >>> model = nn.Linear(2, 2)
        >>> store.through(model, [b"image"], [], lambda views: Extraction(torch.ones(1, 2), torch.ones(1, 2))).features
        tensor([[1., 1.]])
    """

    def __init__(self, folder: str | os.PathLike[str] | None, limit: int, warnings: list[str]) -> None:
        self.folder = None if folder is None or limit <= 0 else Path(folder)
        self.limit, self.warnings = limit, warnings
        self._marks: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        if self.folder is not None:
            remove_leftovers(self.folder)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self._files())

    def through(
        self,
        model: nn.Module | PreTrainedModel,
        hashes: list[bytes],
        views: list[View],
        extract: Callable[[list[View]], Extraction],
    ) -> Extraction:
        """What was kept, and for the rest one pass over the images.

        Args:
            model: Whose features they are.
            hashes: Of the images, in order.
            views: What to read beside the classifier's inputs and outputs.
            extract: Makes the pass, given the views that are missing.

        Returns:
            The extraction with all views.
        """
        if self.folder is None:
            return extract(views)
        labels = ["features", "logits", *(layer.label(view) for layer, view in views)]
        files = {label: self.folder / f"{self._name(model, hashes, label)}.safetensors" for label in labels}
        kept = {label: _read(file, len(hashes)) for label, file in files.items()}
        found = {label: tensor for label, tensor in kept.items() if tensor is not None}
        if len(found) < len(labels):
            made = extract([one for one in views if one[0].label(one[1]) not in found])
            fresh = {"features": made.features, "logits": made.logits, **made.views}
            fresh = {label: tensor for label, tensor in fresh.items() if label not in found}
            self._write({files[label]: tensor for label, tensor in fresh.items()})
            found |= fresh
        return Extraction(found.pop("features"), found.pop("logits"), found)

    def holds(self, model: nn.Module | PreTrainedModel, hashes: list[bytes], views: list[View]) -> bool:
        """Whether `through` would make no pass.

        Args:
            model: Whose features they are.
            hashes: Of the images, in order.
            views: What would be read.

        Returns:
            Whether all of it is there.
        """
        if self.folder is None:
            return False
        labels = ["features", "logits", *(layer.label(view) for layer, view in views)]
        files = (self.folder / f"{self._name(model, hashes, label)}.safetensors" for label in labels)
        return all(_rows(file) == len(hashes) for file in files)

    def _files(self) -> list[Path]:
        return [] if self.folder is None else list(self.folder.glob("*.safetensors"))

    def _name(self, model: nn.Module, hashes: list[bytes], label: str) -> str:
        if model not in self._marks:
            config = getattr(model, "config", None)
            described = {} if config is None else config.to_dict()
            described.pop("_name_or_path", None)
            device = next(model.parameters()).device.type
            settings = {"config": described, "torch": torch.__version__, "device": device, "format": _FORMAT}
            self._marks[model] = fingerprint({"model": model}, {}, settings)
        total = hashlib.blake2b(digest_size=20)
        total.update(json.dumps([self._marks[model], label, len(hashes)]).encode())
        for one in hashes:
            total.update(one)
        return total.hexdigest()

    def _write(self, tensors: dict[Path, Tensor]) -> None:
        """Keep what fits, the small ones first."""
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            room = min(self.limit - self.size, shutil.disk_usage(self.folder).free // 2)
            with staged_directory(self.folder) as staging:
                for file, tensor in sorted(tensors.items(), key=lambda item: item[1].nbytes):
                    if tensor.nbytes > room:
                        break
                    save_kept({"values": tensor}, staging / file.name)
                    room -= tensor.nbytes
        except (OSError, CheckpointError) as error:
            reason = error.__cause__ or error
            sentence = f"Features could not be kept ({reason}); after an interruption they are extracted again."
            if sentence not in self.warnings:
                self.warnings.append(sentence)


def _rows(file: Path) -> int | None:
    """Rows of the tensor in a file, from its header; None where there is none, or the file is cut off."""
    try:
        with safe_open(file, "pt") as opened:
            shape: list[int] = opened.get_slice("values").get_shape()
    except (OSError, SafetensorError):
        return None
    return shape[0]


def _read(file: Path, rows: int) -> Tensor | None:
    """The tensor, or None where there is none of so many rows: a damaged file is written anew."""
    try:
        values = read_kept(file, "values")
    except (OSError, ValueError, SafetensorError):
        return None
    return values if len(values) == rows else None
