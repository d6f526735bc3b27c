"""ReLUs that everything the classifier reads must pass: where all of them are dead, all images look the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.errors import DataError
from hf_immunize.vision.scope import with_training


# A dead ReLU gives exactly zero and passes no gradient. GELU, SiLU and LeakyReLU do neither.
RELUS = (nn.ReLU, nn.ReLU6)
# What rounding may leave of the difference between two images.
_ROUNDING = 1e-4


def find_relus(model: nn.Module, trainable: list[str]) -> list[str]:
    """Names of the ReLUs whose nearest ancestor with parameters has some of the trainable ones."""
    modules = with_training(model, trainable)
    return [name for name, module, trains in modules if trains and isinstance(module, RELUS)]


@torch.no_grad()
def choke_points(model: nn.Module, names: list[str], features: Callable[[], Tensor]) -> list[str]:
    """Of the named ReLUs, those that no shortcut bypasses, in the order in which they run."""
    # Each in turn is made to give zeros; where features of different images then coincide, nothing bypasses it.
    calls: list[str] = []
    with ExitStack() as hooks:
        for name in names:
            hook = model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
            hooks.callback(hook.remove)
        usual = _spread(features())
    if not 0 < usual < math.inf:
        raise DataError(
            "Expected images with different features to find the ReLUs that all must pass, found "
            f"{'the same features for all' if usual == 0 else 'features that are not finite'}. Check the first "
            "images of both sides, and the weights."
        )
    found = []
    # One that runs more than once is left out: its inputs come from several places.
    for name in (name for name in calls if calls.count(name) == 1):
        with ExitStack() as hooks:
            hooks.callback(model.get_submodule(name).register_forward_hook(lambda *given: given[2] * 0).remove)
            if _spread(features()) <= _ROUNDING * usual:
                found.append(name)
    return found


def _spread(rows: Tensor) -> float:
    return float((rows - rows.mean(0)).double().norm())


class ReluInputs:
    """Record what enters ReLUs during passes that take gradients; hooks are removed on exit."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self._modules = {name: model.get_submodule(name) for name in names}
        self._parts: dict[str, list[Tensor]] = {name: [] for name in names}
        self._hooks = ExitStack()

    @property
    def values(self) -> dict[str, Tensor]:
        """Name to what entered, ``(N, ...)``, in the graph; several passes are concatenated."""
        return {name: torch.cat(parts) for name, parts in self._parts.items() if parts}

    def __enter__(self) -> ReluInputs:
        for name, module in self._modules.items():
            self._hooks.callback(module.register_forward_pre_hook(self._recorder(name)).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def _recorder(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        # As in `HeadInput`: a compiled graph ends here, or the hooks of the first pass would serve for all others.
        @torch.compiler.disable
        def record(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            # The starting model and held-out images pass without gradients; a frozen input cannot change.
            if not torch.is_grad_enabled() or not inputs[0].requires_grad:
                return None
            self._parts[name].append(inputs[0])
            # An in-place ReLU would overwrite the recorded tensor.
            return (inputs[0].clone(), *inputs[1:]) if getattr(module, "inplace", False) else None

        return record
