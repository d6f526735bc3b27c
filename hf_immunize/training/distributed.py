"""Features and norms of the global batch. On one process everything here is the identity.

κ of a batch is not the mean of the κ's of its parts, so the regularizers need the features of all processes, and their
gradient must flow back to the process that made them. ``Accelerator.gather`` and plain collectives cut it, or scale it
by one over the world size without a word.

There are two routes to the global batch: its features, gathered, and its Hessian ``ZᵀZ``, summed. Both give exactly
the single-process gradient under data parallelism's mean; `sum_is_smaller` says which moves fewer bytes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_immunize.spectra.hessian_functions import Hessian


def world_size() -> int:
    """Number of processes of the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gathered(torch.autograd.Function):
    """The rows of all processes."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        rows = len(features)
        ctx.own = slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)
        whole = features.new_empty(world_size() * rows, *features.shape[1:])
        dist.all_gather_into_tensor(whole, features.contiguous())
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        # The same on every process, as the loss is: nothing to communicate, but to make up for the mean.
        return world_size() * grad_outputs[0][ctx.own]


def gather_features(features: Tensor) -> Tensor:
    """Features of all processes, differentiably.

    The loss that they enter must be the same on every process. The gradient that comes back to each is then the world
    size times its part of the global gradient; the mean that DistributedDataParallel takes restores exactly the
    single-process gradient.

    Args:
        features: Shape ``(n, D)``, the same n on every process.

    Returns:
        Shape ``(world_size · n, D)``, in the order of ranks; the argument itself on one process.
    """
    return features if world_size() == 1 else _Gathered.apply(features)


def sum_is_smaller(rows: int, dim: int, dtype: torch.dtype) -> bool:
    """Whether summing ``ZᵀZ`` over processes moves fewer bytes than gathering Z.

    In units of ``(W − 1)/W`` bytes a process, W their number: gathering moves ``N·D·b``, b the bytes of a feature, and
    a sum of float64 moves ``2·8·D²``. Neither moves anything backward, since every process holds the same gradient.
    That of float64 features is never taken: they hold more than their float64 Gram matrix can.

    Args:
        rows: N, of all processes.
        dim: D.
        dtype: Of the features.

    Returns:
        Whether ``16·D < N·b``.

    Example:
        >>> sum_is_smaller(4096, 768, torch.float32), sum_is_smaller(4096, 768, torch.bfloat16)
        (True, False)
        >>> sum_is_smaller(4096, 768, torch.float64)
        False
    """
    return dtype != torch.float64 and 16 * dim < rows * dtype.itemsize


class _Summed(torch.autograd.Function):
    """The sum of all processes' tensors."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        total = matrix.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return world_size() * grad_outputs[0]


def sum_hessian(features: Tensor) -> Hessian:
    """The Hessian ``ZᵀZ`` of the features of all processes, differentiably.

    The gradient that comes back to each process is the world size times its part, as of `gather_features`.

    Args:
        features: Shape ``(n, D)``, the same n on every process.

    Returns:
        What functions of the spectrum take in place of features; the same on every process.

    Example:
        >>> rows = torch.tensor([[3.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> hessian = sum_hessian(rows)
        >>> hessian.matrix.diagonal().tolist(), hessian.rows
        ([9.0, 1.0], 2)
    """
    own = Hessian.of(features)
    if world_size() == 1:
        return own
    return replace(own, matrix=_Summed.apply(own.matrix), rows=own.rows * world_size())


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of all processes' values, differentiably; the gradient comes back as of `gather_features`.

    Args:
        value: Any shape, the same on every process.

    Returns:
        Of that shape; the argument itself on one process.
    """
    return value if world_size() == 1 else _Summed.apply(value)


def gather_labels(labels: Tensor | None) -> Tensor | None:
    """Labels of all processes, beside the features that `gather_features` gives.

    Args:
        labels: Shape ``(n,)``, the same n on every process; or None on every process.

    Returns:
        Shape ``(world_size · n,)``, in the order of ranks; the argument itself on one process.
    """
    if world_size() == 1 or labels is None:
        return labels
    parts = [torch.empty_like(labels) for _ in range(world_size())]
    dist.all_gather(parts, labels.contiguous())
    return torch.cat(parts)


def mean_gradient_norm(norm: Tensor) -> Tensor:
    """Norm of the gradient of the processes' mean loss, from the norm of each process's own.

    Args:
        norm: Norm of this process's gradient on its own features.

    Returns:
        ``sqrt(Σ_r norm_r²)/world_size``; the argument itself on one process.
    """
    size = world_size()
    if size == 1:
        return norm
    total = norm.detach().square()
    dist.all_reduce(total)
    return total.sqrt() / size


def process_mean(values: Tensor) -> Tensor:
    """Mean over processes, without a gradient.

    Args:
        values: Any shape, the same on every process.

    Returns:
        Their mean; the argument itself on one process.
    """
    size = world_size()
    if size == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / size


def any_process(yes: bool, device: torch.device) -> bool:
    """Whether any process says yes: rounding may differ between them, and one that stops alone hangs the others.

    Args:
        yes: What this process says.
        device: Where the processes' communication happens.

    Returns:
        The same on every process; the argument itself on one.
    """
    return bool(process_mean(torch.tensor(float(yes), device=device)) > 0)


def first_process_step(step: int | None, device: torch.device) -> int | None:
    """The first process's choice of a step.

    Args:
        step: This process's choice, None for none.
        device: Where the processes' communication happens.

    Returns:
        The same on every process; the argument itself on one.
    """
    if world_size() == 1:
        return step
    choice = torch.tensor(-1 if step is None else step, device=device)
    dist.broadcast(choice, src=0)
    return None if choice < 0 else int(choice)


def sharded_weights() -> bool:
    """Whether processes hold parts of the weights, so that none can run or load the model by itself."""
    # Without an accelerator, of a Trainer or another, there is nothing to be sharded.
    if not AcceleratorState._shared_state:
        return False
    return AcceleratorState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
