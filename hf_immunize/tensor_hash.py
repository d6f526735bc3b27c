"""The one hash by which tensors and weights are known again: of all their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def tensor_bytes(tensor: Tensor) -> Any:
    """A tensor's values as a numpy array of bytes, whose buffer a hash reads."""
    # A view as bytes, since numpy knows no bfloat16.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def tensors_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """Hash tensors with their names, types and shapes, in order; a sum would not see two values change places."""
    digest = hashlib.blake2b(digest_size=20)
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """Hash all weights and statistics of a model."""
    return tensors_hash((name, value) for name, value in model.state_dict().items() if isinstance(value, Tensor))
