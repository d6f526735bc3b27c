"""Tensors in a safetensors file with a checksum for each, so that other numbers are never taken for them."""

from __future__ import annotations

import os
from collections.abc import Mapping

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_immunize.vision.tensor_hash import tensors_hash


def save_kept(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write tensors for `read_kept`.

    Args:
        tensors: Name to tensor, on the CPU.
        path: File to write.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, {name: tensors_hash([(name, tensor)]) for name, tensor in whole.items()})


def read_kept(path: str | os.PathLike[str], name: str) -> Tensor:
    """Read a tensor that `save_kept` wrote.

    Args:
        path: File to read.
        name: Of the tensor.

    Returns:
        The tensor.

    Raises:
        ValueError: If it is not the tensor that was written, or has no checksum.
        OSError, SafetensorError: If there is no such file or tensor, or the file is cut off.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_kept({"values": torch.ones(2)}, f"{folder}/kept")
        ...     read_kept(f"{folder}/kept", "values")
        tensor([1., 1.])
    """
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
        known = (file.metadata() or {}).get(name)
    if known != tensors_hash([(name, tensor)]):
        raise ValueError(f"{name} in {os.fspath(path)} is not what was written")
    return tensor
