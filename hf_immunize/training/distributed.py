"""Features and norms of the global batch. On one process everything here is the identity.

κ of a batch is not the mean of the κ's of its parts, so the regularizers need the features of all processes, and their
gradient must flow back to the process that made them. ``Accelerator.gather`` and plain collectives cut it, or scale it
by one over the world size without a word.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes of the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_features(features: Tensor) -> Tensor:
    """Features of all processes, differentiably.

    With the same loss on every process, the gradient that comes back to each is the world size times its part of the
    global gradient; the mean that DistributedDataParallel takes restores exactly the single-process gradient.

    Args:
        features: Shape ``(n, D)``, the same n on every process.

    Returns:
        Shape ``(world_size · n, D)``, in the order of ranks; the argument itself on one process.
    """
    if world_size() == 1:
        return features
    from torch.distributed._functional_collectives import all_gather_tensor_autograd

    group = dist.group.WORLD
    assert group is not None  # world_size() was above 1
    return all_gather_tensor_autograd(features.contiguous(), gather_dim=0, group=group)


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
