"""What stored activations depend on, as fingerprints."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import datasets
import transformers
from torch import Tensor, nn

from hf_immunize.data.images import ImageRows
from hf_immunize.vision.tensor_hash import tensor_bytes, tensors_hash


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_immunize.features.trunk import TrunkSplit

# What a configuration says about the head or about where the model came from.
_NOT_OF_THE_TRUNK = ("id2label", "label2id", "num_labels", "architectures", "problem_type", "transformers_version")


def trunk_fingerprint(model: nn.Module, split: TrunkSplit) -> str:
    """Hash the weights and buffers of a frozen trunk.

    Args:
        model: The model that was split.
        split: Where its trunk ends.

    Returns:
        The hash of all tensors of the trunk's modules and of those that the modules around own themselves.

    Examples:
        >>> from transformers import ResNetConfig, ResNetForImageClassification
        >>> from hf_immunize.vision.scope import select_trainable
        >>> from hf_immunize.features.trunk import split_trunk
        >>> config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3)
        >>> model = ResNetForImageClassification(config)
        >>> split = split_trunk(model, select_trainable(model, "last_stage"), (3, 32, 32))
        >>> before = trunk_fingerprint(model, split)
        >>> model.classifier[1].weight.data.zero_().sum().item(), trunk_fingerprint(model, split) == before
        (0.0, True)
        >>> model.resnet.embedder.embedder.convolution.weight.data.zero_().sum().item()
        0.0
        >>> trunk_fingerprint(model, split) == before
        False
    """
    named: list[tuple[str, Tensor]] = []
    for name in (*split.trunk, *split.around):
        module, inner = model.get_submodule(name), name in split.trunk
        tensors = [*module.named_parameters(recurse=inner), *module.named_buffers(recurse=inner)]
        named += [(f"{name}.{key}", tensor) for key, tensor in sorted(tensors, key=lambda pair: pair[0])]
    return tensors_hash(named)


def model_fingerprint(model: PreTrainedModel, split: TrunkSplit) -> str:
    """Hash what decides how a trunk computes: class, configuration, where it ends, version of transformers.

    Args:
        model: The model that was split.
        split: Where its trunk ends.

    Returns:
        The SHA-256.
    """
    config = model.config.to_dict()
    kept = {key: value for key, value in config.items() if key not in _NOT_OF_THE_TRUNK and key != "_name_or_path"}
    return text_fingerprint([type(model).__name__, kept, repr(split), transformers.__version__])


def processor_fingerprint(processor: Any) -> str:
    """Hash the settings of an image processor.

    Args:
        processor: The processor, or None.

    Returns:
        The SHA-256 of its ``to_dict()`` in JSON.
    """
    return text_fingerprint(processor.to_dict() if hasattr(processor, "to_dict") else type(processor).__name__)


def stored_fingerprint(rows: Any) -> str | None:
    """The fingerprint that the library `datasets` keeps of a dataset and of what was done to it.

    Args:
        rows: Rows, such as `ImageRows`.

    Returns:
        The fingerprint; None where the data are no ``datasets.Dataset``, and have to be read to be told apart.
    """
    if not (isinstance(rows, ImageRows) and isinstance(rows.dataset, datasets.Dataset)):
        return None
    return text_fingerprint([rows.dataset._fingerprint, rows.image_column, rows.label_column])


def row_checksums(batch: dict[str, Tensor]) -> list[bytes]:
    """Hash the rows of a batch one by one, so that the hashes of a dataset do not depend on how it was cut.

    Args:
        batch: Tensors with one row for each of the batch.

    Returns:
        16 bytes a row.

    Examples:
        >>> import torch
        >>> rows = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
        >>> first, second = row_checksums({"pixel_values": rows})
        >>> first != second, [second] == row_checksums({"pixel_values": rows[1:]})
        (True, True)
    """
    names = sorted(batch)
    head = repr([(name, str(batch[name].dtype), tuple(batch[name].shape[1:])) for name in names]).encode()
    checksums = []
    for row in range(len(batch[names[0]])):
        digest = hashlib.blake2b(head, digest_size=16)
        for name in names:
            digest.update(tensor_bytes(batch[name][row]))
        checksums.append(digest.digest())
    return checksums


def text_fingerprint(value: Any) -> str:
    """Hash what JSON can write.

    Args:
        value: Nested lists and dictionaries of plain values; others are written as text.

    Returns:
        The SHA-256.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
