"""Which parameters move, and which modules keep still while they do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from transformers.utils import logging

from hf_immunize.errors import ScopeError
from hf_immunize.vision.families import family_of
from hf_immunize.vision.head import adapter_parameters, find_head, outermost_name, without_wrapper


if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.get_logger(__name__)


def last_stage(model: PreTrainedModel, head_module: str | None = None) -> list[str]:
    """Name the parameters of the last stage: the deepest blocks at one resolution, all that follows them, the head."""
    head_name, head = find_head(model, head_module)
    blocks = _block_list(without_wrapper(model), head)
    stage = blocks[_stage_start(blocks) :]

    in_list = {id(parameter) for block in blocks for parameter in block.parameters()}
    in_stage = {id(parameter) for block in stage for parameter in block.parameters()}
    unread = {id(parameter) for part in _unread(without_wrapper(model)) for parameter in part.parameters()}
    names = []
    behind = False  # Parameters are listed in the order of registration, which is the order of the forward pass.
    for name, parameter in model.named_parameters():
        behind = behind or id(parameter) in in_list
        follows = behind and id(parameter) not in in_list | unread
        if id(parameter) in in_stage or follows or name.startswith(f"{outermost_name(head_name)}."):
            names.append(name)
    if len(names) == len(list(model.named_parameters())):
        raise ScopeError(
            f'"last_stage" should leave a part of the model as it is, but of {type(without_wrapper(model)).__name__} '
            f'no last stage can be told from the rest; give trainable= a regular expression, or "all".'
        )
    return names


def select_trainable(model: PreTrainedModel, trainable: str, head_module: str | None = None) -> list[str]:
    r"""Set ``requires_grad`` on all parameters of a model, so that the chosen ones move and the others do not."""
    head_name, _ = find_head(model, head_module)
    names = [name for name, _ in model.named_parameters()]
    if trainable == "all":
        moving = names
    elif trainable == "last_stage":
        moving = last_stage(model, head_module)
    else:
        moving = _matching(trainable, names)

    adapter = adapter_parameters(model)
    if adapter is not None:
        moving = _of_adapter(moving, adapter, trainable)
    if all(name.startswith(f"{outermost_name(head_name)}.") for name in moving):
        raise ScopeError(
            f"trainable={trainable!r} takes the head {head_name!r} alone, so no feature could move; take parameters "
            f'of the backbone too, with "last_stage" or, under PEFT, with an adapter there and "all".'
        )

    chosen = set(moving)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return moving


def modules_in_eval(
    model: PreTrainedModel,
    trainable_names: list[str],
    freeze_batchnorm: bool = True,
    head_module: str | None = None,
) -> list[nn.Module]:
    """List the modules to keep in eval mode while the chosen parameters train."""
    _, head = find_head(model, head_module)
    chosen = set(trainable_names)
    moving = {id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False) if name in chosen}
    still: dict[nn.Module, None] = {}  # A dictionary keeps the order.

    def visit(module: nn.Module, inherited: bool) -> None:
        own = [id(parameter) for parameter in module.parameters()]
        moves = any(parameter in moving for parameter in own) if own else inherited
        if not moves or (freeze_batchnorm and isinstance(module, _BatchNorm)):
            still[module] = None
        holds_head = any(part is head for part in module.modules())
        for child in module.children():
            # MobileNetV2 drops 80 % of the head's input: the regularizers would see features, and a rank, that no
            # probe of the released model ever sees.
            if holds_head and isinstance(child, _DropoutNd):
                still[child] = None
            visit(child, moves)

    visit(model, False)
    return list(still)


def has_batch_statistics(model: nn.Module, still: list[nn.Module]) -> bool:
    """Tell whether any BatchNorm will normalize by the statistics of its batch."""
    frozen = set(still)
    # Without running statistics, a BatchNorm uses those of the batch in eval mode as well.
    return any(
        isinstance(module, _BatchNorm) and (module not in frozen or module.running_mean is None)
        for module in model.modules()
    )


def block_modules(model: PreTrainedModel, head_module: str | None = None) -> dict[str, nn.Module]:
    """The blocks (or stages) of the backbone, in the order of the forward pass."""
    names = {id(module): name for name, module in model.named_modules()}
    _, head = find_head(model, head_module)
    return {names[id(block)]: block for block in _block_list(model, head)}


def _block_list(model: PreTrainedModel, head: nn.Module) -> list[nn.Module]:
    base = model.base_model
    for kind in (nn.ModuleList, nn.Sequential):
        lists = [found for found in _outermost(base, kind) if all(part is not head for part in found.modules())]
        if lists:
            return list(max(lists, key=_size).children())
    # Some of timm (RegNet) name their stages s1, s2, ... in the model itself.
    alike: dict[type, list[nn.Module]] = {}
    for part in base.children():
        if list(part.children()) and all(inner is not head for inner in part.modules()):
            alike.setdefault(type(part), []).append(part)
    stages = max(alike.values(), key=lambda group: sum(map(_size, group)), default=[])
    if len(stages) > 1:
        return stages
    raise ScopeError(
        f'"last_stage" should be the last of a list of blocks, but {type(model).__name__} has no such list; give '
        f"trainable= a regular expression that matches the names of the parameters to train."
    )


def _unread(model: PreTrainedModel) -> list[nn.Module]:
    """Modules behind the blocks of which no path leads to the head; they would wait for a gradient in vain."""
    names = getattr(model, "unread_modules", family_of(model.config).unread)
    modules = dict(model.named_modules())
    return [modules[name] for name in names if name in modules]


def _outermost(module: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    if isinstance(module, kind):
        return [module] if _size(module) else []
    return [found for child in module.children() for found in _outermost(child, kind)]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _stage_start(blocks: list[nn.Module]) -> int:
    last = max(index for index, block in enumerate(blocks) if _size(block))
    if _outermost(blocks[last], nn.ModuleList):
        # The children are stages. Swin and FocalNet downsample at the end of a stage, so looking for it would mislead.
        return last
    return max((index for index, block in enumerate(blocks) if _downsamples(block)), default=last)


def _downsamples(block: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv2d) and max(part.stride) > 1 for part in block.modules())


def _matching(pattern: str, names: list[str]) -> list[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ScopeError(
            f'trainable= should be "last_stage", "all" or a regular expression, but {pattern!r} is invalid: {error}.'
        ) from error
    moving = [name for name in names if expression.search(name)]
    if not moving:
        raise ScopeError(f"trainable={pattern!r} matches no parameter; parameters have names such as {_some(names)}.")
    if len(moving) == len(names):
        # "classifier|" and "." do so by mistake, and a network that moves as a whole is lost within some steps.
        raise ScopeError(
            f"trainable={pattern!r} matches every parameter, those of the head included, of names such as "
            f'{_some(names)}; write trainable="all" if the whole model should move.'
        )
    return moving


def _of_adapter(moving: list[str], adapter: list[str], trainable: str) -> list[str]:
    chosen = set(moving)
    kept = [name for name in adapter if name in chosen]
    if not kept:
        raise ScopeError(
            f"trainable={trainable!r} takes {len(moving)} parameters, none of which PEFT trains and saves: it does so "
            f"with {len(adapter)}, of names such as {_some(adapter)}. Put an adapter there (target_modules, "
            f'layers_to_transform), or write trainable="all" for those.'
        )
    if len(kept) < len(adapter) and trainable == "last_stage":
        logger.warning(
            f"Of the {len(adapter)} parameters that PEFT trains, the {len(kept)} in the last stage move; "
            f'trainable="all" moves all of them.'
        )
    return kept


def _some(names: list[str]) -> str:
    return ", ".join(repr(name) for name in dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
