"""PEFT's wrappers, seen through: the model inside, the modules that run, the parameters that an adapter holds.

PEFT stays optional: a wrapper exists only where the user has imported it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def without_wrapper(model: Any) -> PreTrainedModel:
    """The transformers model inside a `peft.PeftModel`; any other model as it is.

    Args:
        model: A model, wrapped or not.

    Returns:
        The model that PEFT's layers were put into, with these layers.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> without_wrapper(model) is model
        True
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        return model
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model.base_model.model


def running_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Name the modules of a model as its author built it: without an adapter's matrices, or copies that do not run.

    Of a layer with LoRA, its ``base_layer`` is given, which receives the layer's input; of a module in PEFT's
    ``modules_to_save``, the copy of the active adapter. A module that stands under several names has all of them.

    Args:
        module: A model, wrapped by PEFT or not.
        prefix: Put before every name.

    Yields:
        Names as in ``named_modules(remove_duplicate=False)``, and modules.

    Examples:
        >>> [name for name, _ in running_modules(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))]
        ['', '0', '1']
    """
    inner = _that_runs(module)
    if inner is not None:
        name, part = inner
        yield from running_modules(part, _joined(prefix, name))
        return
    yield prefix, module
    for name, child in module._modules.items():  # named_children() would leave out a module's second name
        if child is not None:
            yield from running_modules(child, _joined(prefix, name))


def adapter_parameters(model: Any) -> list[str] | None:
    """Name the parameters that PEFT trains and saves with a model's active adapter.

    Args:
        model: A model, wrapped by PEFT or not.

    Returns:
        Names as in ``model.named_parameters()``; None for a model without wrapper.
    """
    if without_wrapper(model) is model:
        return None
    from peft import get_peft_model_state_dict

    active = model.active_adapter
    names = [active] if isinstance(active, str) else list(active)
    parameters = dict(model.named_parameters())
    state = parameters | dict(model.named_buffers())
    saved: set[int] = set()
    for name in names:
        # PEFT renames what it saves; the objects are the same.
        held = get_peft_model_state_dict(model, state, adapter_name=name, save_embedding_layers=False)
        saved |= {id(parameter) for parameter in held.values()}
    return [name for name, parameter in parameters.items() if id(parameter) in saved]


def outermost_name(name: str) -> str:
    """The name of the module that PEFT put in the place of another one.

    Args:
        name: A module's name, as `running_modules` gives it.

    Returns:
        The name of the outermost wrapper that PEFT put around it; the name itself where there is none.

    Examples:
        >>> outermost_name("base_model.model.classifier.modules_to_save.default.1"), outermost_name("classifier.1")
        ('base_model.model.classifier', 'classifier.1')
    """
    return re.split(r"\.modules_to_save\.|\.original_module\b|\.base_layer\b", name)[0]


def _that_runs(module: nn.Module) -> tuple[str, nn.Module] | None:
    """Of one of PEFT's wrappers, the module that does the work of the one it replaced."""
    peft = sys.modules.get("peft")
    if peft is None:
        return None
    if isinstance(module, peft.utils.ModulesToSaveWrapper):
        active = module.active_adapters
        if active and active[0] in module.modules_to_save and not module.disable_adapters:
            return f"modules_to_save.{active[0]}", module.modules_to_save[active[0]]
        return "original_module", module.original_module
    if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) and hasattr(module, "base_layer"):
        return "base_layer", module.base_layer
    return None


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
