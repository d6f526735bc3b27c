"""Which parameters are trainable, and which modules stay in eval mode while they train."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from hf_immunize.errors import ScopeError
from hf_immunize.vision.families import family_of
from hf_immunize.vision.head import adapter_parameters, find_head, outermost_name, without_wrapper


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def last_stage(model: PreTrainedModel, head_module: str | None = None) -> list[str]:
    """Names of the last stage's parameters: the deepest blocks at one resolution, what follows them, and the head.

    Of transformers whose blocks all have one resolution, it is the last third of them, and at least two.
    """
    # The blocks are in the outermost ModuleList of the base model (of several, the largest).
    head_name, head = find_head(model, head_module)
    blocks = _block_list(without_wrapper(model), head)
    stage = blocks[_stage_start(blocks) :]

    in_list = {id(parameter) for block in blocks for parameter in block.parameters()}
    in_stage = {id(parameter) for block in stage for parameter in block.parameters()}
    unread = {id(parameter) for part in _unread(without_wrapper(model)) for parameter in part.parameters()}
    names = []
    after = False  # parameters are listed in the order of registration, which is that of the forward pass
    for name, parameter in model.named_parameters():
        after = after or id(parameter) in in_list
        follows = after and id(parameter) not in in_list | unread
        if id(parameter) in in_stage or follows or name.startswith(f"{outermost_name(head_name)}."):
            names.append(name)
    if len(names) == len(list(model.named_parameters())):
        raise ScopeError(
            f'Expected blocks before the last stage for trainable="last_stage", found none in '
            f'{type(without_wrapper(model)).__name__}. Give trainable= a regular expression, or "all".'
        )
    return names


def select_trainable(model: PreTrainedModel, trainable: str, head_module: str | None = None) -> list[str]:
    """Set ``requires_grad`` on all parameters by "last_stage", "all" or an expression; names of the trainable ones."""
    # Under PEFT it chooses among what PEFT trains and saves: the adapter's files would not hold a base parameter.
    head_name, _ = find_head(model, head_module)
    names = [name for name, _ in model.named_parameters()]
    if trainable == "all":
        chosen = names
    elif trainable == "last_stage":
        chosen = last_stage(model, head_module)
    else:
        chosen = _matching(trainable, names)
    adapter = adapter_parameters(model)
    if adapter is not None:
        chosen = _of_adapter(chosen, adapter, trainable)
    if all(name.startswith(f"{outermost_name(head_name)}.") for name in chosen):
        raise ScopeError(
            f"Expected parameters of the backbone, found the head {head_name!r} alone with trainable={trainable!r}. "
            'Train the "last_stage" or, under PEFT, put an adapter there.'
        )
    wanted = set(chosen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    return chosen


def modules_in_eval(
    model: PreTrainedModel, trainable_names: list[str], freeze_batchnorm: bool = True, head_module: str | None = None
) -> list[nn.Module]:
    """The modules to keep in eval mode while the named parameters train; a flat list: ``eval()`` would recurse."""
    _, head = find_head(model, head_module)
    in_eval: dict[nn.Module, None] = {}  # a dictionary keeps the order
    for _, module, trains in with_training(model, trainable_names):
        if not trains or (freeze_batchnorm and isinstance(module, _BatchNorm)):
            in_eval[module] = None
        if any(part is head for part in module.modules()):
            # MobileNetV2 drops 80 % of the head's input: the regularizers would see features, and a rank, that no
            # probe of the released model ever sees.
            in_eval |= dict.fromkeys(child for child in module.children() if isinstance(child, _DropoutNd))
    return list(in_eval)


def with_training(model: nn.Module, trainable_names: list[str]) -> Iterator[tuple[str, nn.Module, bool]]:
    """Modules by name, each with whether it trains; one without parameters goes with its nearest ancestor."""
    chosen = set(trainable_names)
    trained = {id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False) if name in chosen}

    def visit(name: str, module: nn.Module, inherited: bool) -> Iterator[tuple[str, nn.Module, bool]]:
        own = [id(parameter) for parameter in module.parameters()]
        trains = any(parameter in trained for parameter in own) if own else inherited
        yield name, module, trains
        for part, child in module.named_children():
            yield from visit(f"{name}.{part}".lstrip("."), child, trains)

    yield from visit("", model, False)


def has_batch_statistics(model: nn.Module, in_eval: list[nn.Module]) -> bool:
    """Whether features depend on the other images of the batch, so that one pass over two sides is not two passes."""
    frozen = set(in_eval)
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
    raise ScopeError(
        f'Expected a list of blocks for trainable="last_stage", found none in {type(model).__name__}. Give trainable= '
        "a regular expression that matches the parameters to train."
    )


def _unread(model: PreTrainedModel) -> list[nn.Module]:
    """Modules after the blocks that the head does not read, and which would get no gradient."""
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
    # Where blocks are stages with lists of their own (Swin, ConvNeXt), the last one is the stage; else it starts at
    # the last block with a strided convolution (MobileNetV2), or is the last third of the blocks (ViT).
    if _outermost(blocks[last], nn.ModuleList):
        return last
    convolutions = [[part for part in block.modules() if isinstance(part, nn.Conv2d)] for block in blocks]
    strided = (i for i, parts in enumerate(convolutions) if any(max(part.stride) > 1 for part in parts))
    return max(strided, default=last + 1 - min(max(2, round((last + 1) / 3)), max(1, last)))


def _matching(pattern: str, names: list[str]) -> list[str]:
    try:
        chosen = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ScopeError(
            f'Expected trainable= as "last_stage", "all" or a regular expression, found {pattern!r} ({error}). '
            "Correct the expression."
        ) from error
    if len(chosen) in (0, len(names)):
        # "classifier|" and "." match all by mistake, and a network trained as a whole is lost within some steps.
        found = f"{'every one' if chosen else 'none'} with trainable={pattern!r}"
        remedy = 'Write trainable="all" to train all' if chosen else "Correct the expression"
        raise ScopeError(f"Expected some parameters out of names such as {_some(names)}, found {found}. {remedy}.")
    return chosen


def _of_adapter(chosen: list[str], adapter: list[str], trainable: str) -> list[str]:
    wanted = set(chosen)
    kept = [name for name in adapter if name in wanted]
    if not kept:
        raise ScopeError(
            f"Expected parameters that PEFT trains, of names such as {_some(adapter)}, found none among the "
            f'{len(chosen)} of trainable={trainable!r}. Put an adapter there, or write trainable="all".'
        )
    return kept


def _some(names: list[str]) -> str:
    return ", ".join(repr(name) for name in dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))
