"""The bytes of tensors, and the one hash by which weights are known again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def tensors_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """Hash tensors by all of their bytes, with names, types and shapes.

    A sum or a norm of them would not see two values change places, nor a change below its rounding.

    Args:
        named: Names and tensors, in an order that is always the same.

    Returns:
        40 hexadecimal digits.

    Examples:
        >>> before = tensors_hash([("weight", torch.tensor([1.0, 2.0]))])
        >>> before == tensors_hash([("weight", torch.tensor([2.0, 1.0]))])
        False
        >>> before == tensors_hash([("weight", torch.tensor([1.0, 2.0]))])
        True
    """
    digest = hashlib.blake2b(digest_size=20)
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """A tensor's values as an array of bytes.

    Args:
        tensor: Of any type and shape, on any device.

    Returns:
        A numpy array of ``uint8``, whose buffer a hash reads.
    """
    # A view as bytes, since numpy knows no bfloat16.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
