"""Rectifiers that everything the classifier sees must pass: where all of them are off, all images look the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_immunize.errors import DataError


if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


# Switched off, they give zero exactly, and pass no gradient. GELU, SiLU and LeakyReLU do neither.
RECTIFIERS = (nn.ReLU, nn.ReLU6)
# Of the difference between two images, what may be left of it by rounding.
_ROUNDING = 1e-4


def find_rectifiers(model: nn.Module, moving: list[str]) -> list[str]:
    """Name the rectifiers in the part of a model that moves.

    Args:
        model: Any model.
        moving: Names of the parameters that move.

    Returns:
        Names of `RECTIFIERS` modules whose nearest ancestor with parameters has some that move.

    Example:
        >>> find_rectifiers(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["0.weight"])
        ['1']
    """
    chosen, found = set(moving), []

    def visit(module: nn.Module, name: str, inherited: bool) -> None:
        own = [f"{name}.{part}".lstrip(".") for part, _ in module.named_parameters()]
        moves = any(part in chosen for part in own) if own else inherited
        if moves and isinstance(module, RECTIFIERS):
            found.append(name)
        for part, child in module.named_children():
            visit(child, f"{name}.{part}".lstrip("."), moves)

    visit(model, "", False)
    return found


def choke_points(model: nn.Module, names: list[str], features: Callable[[], Tensor]) -> list[str]:
    """Those rectifiers around which no shortcut leads to the classifier.

    Each in turn is made to give zeros. Where different images then have the same features, nothing passes beside it.
    One that runs more than once in a pass is left out: what enters it is of several places.

    Args:
        model: The model.
        names: Of rectifiers.
        features: Runs the model on two different images or more and gives the classifier's inputs, ``(N, D)``.

    Returns:
        Some of the names, in the order in which they run.

    Raises:
        DataError: If the images' features do not differ, or are not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> choke_points(model, ["1"], lambda: model(torch.eye(2)))
        ['1']
    """
    with torch.no_grad():
        calls: dict[str, int] = {}

        def count(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                calls[name] = calls.get(name, 0) + 1

            return hook

        hooks = [model.get_submodule(name).register_forward_hook(count(name)) for name in names]
        try:
            usual = _spread(features())
        finally:
            for hook in hooks:
                hook.remove()
        if not 0 < usual < math.inf:
            raise DataError(
                "Expected images with different features to tell by which rectifiers all must pass, found "
                f"{'the same features for all' if usual == 0 else 'features that are not finite'}. Check the first "
                "images of both sides, and the weights."
            )
        found = []
        for name in (name for name, times in calls.items() if times == 1):
            hook = model.get_submodule(name).register_forward_hook(lambda module, given, output: output * 0)
            try:
                if _spread(features()) <= _ROUNDING * usual:
                    found.append(name)
            finally:
                hook.remove()
    return found


def _spread(rows: Tensor) -> float:
    return float((rows - rows.mean(0)).double().norm())


class RectifierInputs:
    """Record what enters rectifiers during passes that take gradients; hooks are removed on exit.

    Args:
        model: The model.
        names: Of the rectifiers.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
        >>> with RectifierInputs(model, ["1"]) as inside:
        ...     _ = model(torch.ones(3, 2))
        >>> inside.values["1"].shape
        torch.Size([3, 4])
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self._modules = {name: model.get_submodule(name) for name in names}
        self._parts: dict[str, list[Tensor]] = {name: [] for name in names}
        self._handles: list[RemovableHandle] = []

    @property
    def values(self) -> dict[str, Tensor]:
        """Name to what entered, ``(N, ...)``, in the graph; of several passes one after the other."""
        return {name: torch.cat(parts) for name, parts in self._parts.items() if parts}

    def __enter__(self) -> RectifierInputs:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._recorder(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _recorder(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        # As of `HeadInput`: a compiled graph ends here, or the hooks of the first pass would stand for all others.
        @torch.compiler.disable
        def record(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            # The starting model and held-out images pass without gradients; what is frozen cannot be moved.
            if not torch.is_grad_enabled() or not inputs[0].requires_grad:
                return None
            self._parts[name].append(inputs[0])
            # In place it would write over what was recorded.
            return (inputs[0].clone(), *inputs[1:]) if getattr(module, "inplace", False) else None

        return record
