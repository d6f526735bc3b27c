"""Which modules a forward pass calls, in which order, and what they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Candidate:
    """A place where a frozen trunk may end.

    Attributes:
        entry: Name of the first module after it.
        trunk: The trunk's outermost modules in order: name, and how many calls of that module came before.
        around: Names of the modules that contain the entry.
    """

    entry: str
    trunk: tuple[tuple[str, int], ...]
    around: tuple[str, ...]


@dataclass
class _Call:
    name: str
    module: nn.Module
    before: int = 0
    children: list[_Call] = field(default_factory=list)


def candidates(model: nn.Module, moving: set[int], images: Tensor) -> list[Candidate]:
    """Find the places where a frozen trunk may end, latest first.

    Going down the calls of one forward pass to the first module with a parameter that moves, all that ran before on
    every level is frozen. Below a module that itself owns a parameter that moves nothing is known about the order.

    Args:
        model: The model.
        moving: The ``id`` of each parameter that moves.
        images: Pixel values to run it on.

    Returns:
        The candidates; empty where nothing frozen runs before what moves.
    """
    call = _record_calls(model, images)
    around: list[str] = []
    trunk: list[tuple[str, int]] = []
    found: dict[int, Candidate] = {}
    while not any(id(parameter) in moving for parameter in call.module.parameters(recurse=False)):
        around.append(call.name)
        entry = next((child for child in call.children if _moves(child.module, moving)), None)
        if entry is None:
            break
        trunk += [(child.name, child.before) for child in call.children[: call.children.index(entry)]]
        if trunk:
            # Of several with the same trunk, the outermost is the one people know by name.
            found.setdefault(len(trunk), Candidate(entry.name, tuple(trunk), tuple(around)))
        call = entry
    return list(found.values())[::-1]


def _moves(module: nn.Module, moving: set[int]) -> bool:
    return any(id(parameter) in moving for parameter in module.parameters())


def _record_calls(model: nn.Module, images: Tensor) -> _Call:
    root = _Call("", model)
    stack, counts = [root], dict[str, int]()

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any) -> None:
            call = _Call(name, module, counts.get(name, 0))
            counts[name] = call.before + 1
            stack[-1].children.append(call)
            stack.append(call)

        return hook

    def leave(*_: Any) -> None:
        stack.pop()

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if module is not model:
                hooks.callback(module.register_forward_pre_hook(enter(name)).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
        model(pixel_values=images)
    return root


@contextmanager
def observed(model: nn.Module, names: list[str], see: Callable[[str, int, Any], None]) -> Iterator[None]:
    """Show the outputs of some modules as they come.

    Args:
        model: The model.
        names: The modules' names.
        see: Called with a module's name, the number of its calls before, and its output.

    Yields:
        Nothing.
    """
    counts = dict.fromkeys(names, 0)

    def hook(name: str) -> Callable[..., None]:
        def leave(module: nn.Module, _: Any, output: Any) -> None:
            counts[name] += 1
            see(name, counts[name] - 1, output)

        return leave

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_hook(hook(name)).remove)
        yield


def run_recorded(model: nn.Module, candidate: Candidate, images: Tensor) -> tuple[dict[tuple[str, int], Any], Any]:
    """Run the whole model, and keep what the trunk gives.

    Args:
        model: The model.
        candidate: Where the trunk ends.
        images: Pixel values.

    Returns:
        Outputs of the trunk's modules, by name and number of calls before; and the inputs of the entry.
    """
    wanted, outputs, inputs = set(candidate.trunk), dict[tuple[str, int], Any](), list[Any]()

    def see(name: str, before: int, output: Any) -> None:
        if (name, before) in wanted:
            outputs[name, before] = output

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not inputs and len(outputs) == len(wanted):
            inputs.append((args, kwargs))

    handle = model.get_submodule(candidate.entry).register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with observed(model, sorted({name for name, _ in wanted}), see):
            model(pixel_values=images)
    finally:
        handle.remove()
    return outputs, inputs
