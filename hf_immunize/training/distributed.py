"""Features and norms of the global batch. On one process everything here is the identity.

κ of a batch is not the mean of the κ's of its parts, so the gradient must flow back to the process that made the
features; ``Accelerator.gather`` and plain collectives cut or scale it. There are two routes to the global batch: its
features, gathered, and its Hessian ``ZᵀZ``, summed. Both give each process the world size times its part of the
global gradient, of which the mean that DistributedDataParallel takes is exactly the single-process gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_immunize.spectra.hessian_functions import Hessian


T = TypeVar("T")


def world_size() -> int:
    """Number of processes of the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the first process, or the only one."""
    return world_size() == 1 or dist.get_rank() == 0


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


def gather_features(features: Tensor) -> Tensor:
    """Rows of all processes in the order of ranks, differentiably; as many on each, for a loss that is one for all."""
    return features if world_size() == 1 else _Gathered.apply(features)


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of all processes' values, of one shape, differentiably."""
    return value if world_size() == 1 else _Summed.apply(value)


def sum_hessian(features: Tensor) -> Hessian:
    """The Hessian ``ZᵀZ`` of the rows of all processes, differentiably; as many rows on every process."""
    own = Hessian.of(features)
    return replace(own, matrix=sum_over_processes(own.matrix), rows=own.rows * world_size())


def sum_is_smaller(rows: int, dim: int, dtype: torch.dtype) -> bool:
    """Whether summing ``ZᵀZ`` over processes moves fewer bytes than gathering Z: ``2·8·D² < N·D·b`` at b bytes each.

    Float64 features hold more than their Gram matrix can, and are always gathered.
    """
    return dtype != torch.float64 and 16 * dim < rows * dtype.itemsize


def gather_labels(labels: Tensor | None) -> Tensor | None:
    """Labels of all processes, in the order of `gather_features`."""
    if world_size() == 1 or labels is None:
        return labels
    parts = [torch.empty_like(labels) for _ in range(world_size())]
    dist.all_gather(parts, labels.contiguous())
    return torch.cat(parts)


def mean_gradient_norm(norm: Tensor) -> Tensor:
    """Norm of the gradient of the processes' mean loss, ``sqrt(Σ_r norm_r²)/W``, from that of each one's own."""
    return norm if world_size() == 1 else (process_mean(norm.square()) / world_size()).sqrt()


def process_mean(values: Tensor) -> Tensor:
    """Mean over processes, without a gradient."""
    if world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def any_process(yes: bool, device: torch.device) -> bool:
    """Whether any process says yes: rounding may differ between them, and one that stops alone hangs the others."""
    return bool(process_mean(torch.tensor(float(yes), device=device)) > 0)


def broadcast_from_main(value: T) -> T:
    """The first process's value, of any type that can be pickled, on every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def sharded_weights() -> bool:
    """Whether processes hold parts of the weights, so that none can run or load the model by itself."""
    # Without an accelerator, of a Trainer or another, there is nothing to be sharded.
    if not AcceleratorState._shared_state:
        return False
    return AcceleratorState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
