"""The term that switches rectifiers off on harmful images."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_immunize.training.distributed import process_mean, sum_over_processes, world_size
from hf_immunize.training.terms import InnerTerm


# How far below zero harmful images shall enter, in units of what benign ones enter with: for images not trained on.
MARGIN = 0.5
# Keeps the logarithm finite where all are off.
_FLOOR = 1e-12
# From this mean square on, in units of u², the term counts as nearly done, and weighs less the smaller it is.
_NEARLY_DONE = 1e-4


def rectifier_activity(harmful: Tensor, benign: Tensor, margin: float = MARGIN) -> InnerTerm:
    """How far harmful images are from switching all rectifiers of a layer off.

    ``log mean relu(a/u + margin)²`` over what enters them, a, of harmful images; u is the root mean square of what
    enters of benign ones, which is taken as it is. Where a rectifier is off, its output is zero exactly and no
    gradient passes back; where all of a layer are off that no shortcut bypasses, every image has the same features,
    and no probe of a later layer reads anything.

    Args:
        harmful: What enters, of this process's harmful images, ``(N_H, ...)``, in the autograd graph.
        benign: The same of its benign images, ``(N_P, ...)``.
        margin: How far below zero all shall be, in units of u.

    Returns:
        The term, of the images of all processes, with the norm of its gradient on what enters, the unit in which
        this is weighed (one over the size of what enters of benign images), and how much is left to do.

    Example:
        >>> term = rectifier_activity(torch.tensor([[-2.0, 0.5]], requires_grad=True), torch.tensor([[1.0, -1.0]]))
        >>> round(term.value.exp().item(), 3), round(term.scale.item(), 3)
        (0.5, 0.707)
    """
    dtype = torch.promote_types(harmful.dtype, torch.float32)
    entries = benign[0].numel() * len(benign) * world_size()
    unit = process_mean(benign.detach().to(dtype).square().mean()).clamp_min(torch.finfo(dtype).tiny).sqrt()
    count = harmful[0].numel() * len(harmful) * world_size()
    squares = sum_over_processes(torch.relu(harmful.to(dtype) / unit + margin).square().sum())
    mean = squares / count + _FLOOR
    norm = 2 * squares.detach().sqrt() / (unit * count * mean.detach())
    left = (squares.detach() / count / _NEARLY_DONE).clamp(max=1)
    return InnerTerm(torch.log(mean), norm, 1 / (unit * entries**0.5), left)
