"""A forward pass with some of its modules replaced by stubs that give what was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.errors import ShapeError
from hf_immunize.features.trunk_calls import Candidate, run_recorded


@dataclass(frozen=True)
class Found:
    """What a trunk gives to the rest of the model.

    Attributes:
        templates: For each module of the trunk, the form of its outputs, call by call.
        producer: The module whose output is the activation, and how many calls of that module came before.
        activation: The activation of the first probe.
    """

    templates: dict[str, list[Any]]
    producer: tuple[str, int]
    activation: Tensor


class _Entry:
    """In a template: the activation at the entry."""


@dataclass(frozen=True)
class _Unknown:
    """In a template: a tensor that depends on the images, and that nothing after the trunk may use.

    Attributes:
        shape: Its shape without the images' dimension.
        dtype: Its type.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


class _Unfit(Exception):
    """The outputs of a trunk cannot be replayed; the message says why."""


def templates(model: nn.Module, candidate: Candidate, probes: list[Tensor]) -> tuple[Found | None, str | None]:
    """Tell what a trunk gives, from two batches of other images and other sizes.

    Args:
        model: The model, in eval mode.
        candidate: Where the trunk ends.
        probes: Two batches of pixel values, of different sizes.

    Returns:
        What it gives, or None and the reason why it cannot be replayed.
    """
    runs = [run_recorded(model, candidate, images) for images in probes]
    sizes = [len(images) for images in probes]
    into = {id(leaf) for leaf in _leaves(runs[0][1]) if isinstance(leaf, Tensor) and len(leaf.shape) > 1}
    given = {
        id(leaf): (call, leaf) for call, output in runs[0][0].items() for leaf in _leaves(output) if id(leaf) in into
    }
    constant = {
        id(leaf)
        for call, output in runs[0][0].items()
        for leaf, other in zip(_leaves(output), _leaves(runs[1][0][call]), strict=False)
        if isinstance(leaf, Tensor) and isinstance(other, Tensor) and _same(leaf, other)
    }
    entering = [pair for key, pair in given.items() if key not in constant]
    if len(entering) != 1:
        return None, f"{len(entering)} of its outputs enter {candidate.entry!r}, where one could be stored"
    ((producer, activation),) = entering
    if activation.shape[0] != sizes[0] or not activation.is_floating_point():
        return None, f"what enters {candidate.entry!r} has the shape {tuple(activation.shape)} for {sizes[0]} images"
    outputs: dict[str, list[Any]] = {}
    try:
        for call in candidate.trunk:
            template = _template(runs[0][0][call], runs[1][0][call], sizes, activation)
            outputs.setdefault(call[0], []).append(template)
    except _Unfit as unfit:
        return None, f"{call[0]!r} in it {unfit}"
    return Found(outputs, producer, activation), None


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _map(function: Callable[..., Any], value: Any, *others: Any) -> Any:
    """Apply a function to the leaves of nested values of one form."""
    if any(type(other) is not type(value) for other in others) and isinstance(value, (dict, tuple, list)):
        raise _Unfit("gives outputs whose form depends on the images")
    if isinstance(value, dict):
        mapped = {key: _map(function, part, *(other[key] for other in others)) for key, part in value.items()}
        return mapped if type(value) is dict else type(value)(**mapped)
    if isinstance(value, (tuple, list)):
        if any(len(other) != len(value) for other in others):
            raise _Unfit("gives outputs whose number depends on the images")
        parts = [_map(function, *each) for each in zip(value, *others, strict=True)]
        return parts if isinstance(value, list) else tuple(parts)
    return function(value, *others)


def _template(output: Any, other: Any, sizes: list[int], activation: Tensor) -> Any:
    def leaf(one: Any, two: Any) -> Any:
        if one is activation:
            return _Entry()
        if not isinstance(one, Tensor):
            if one is None or (isinstance(one, (bool, int, float, str)) and one == two):
                return one
            raise _Unfit(f"gives a {type(one).__name__} that cannot be stored")
        if isinstance(two, Tensor) and _same(one, two):
            return one.detach().clone()
        by_image = isinstance(two, Tensor) and (one.shape[:1], two.shape[:1]) == ((sizes[0],), (sizes[1],))
        if not (by_image and one.is_floating_point() and one.shape[1:] == two.shape[1:]):
            raise _Unfit(f"gives a {one.dtype} tensor of the shape {tuple(one.shape)}, which has no row an image")
        return _Unknown(tuple(one.shape[1:]), one.dtype)

    return _map(leaf, output, other)


def entry_leaf(template: Any, output: Any) -> Any:
    """Find the activation in an output of its producer.

    Args:
        template: The form of the output.
        output: The output.

    Returns:
        The activation; None where this output holds none.
    """
    found = [leaf for mark, leaf in zip(_leaves(template), _leaves(output), strict=True) if isinstance(mark, _Entry)]
    return found[0] if found else None


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward; its hooks, parameters and class stay.

    Args:
        module: The module.
        forward: What runs in its place.

    Yields:
        Nothing.
    """
    own = vars(module).get("forward")  # such as accelerate or a compiler may have put there
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def plain_forward(model: nn.Module) -> AbstractContextManager[None]:
    """Run a model by the forward of its class; accelerate puts one under autocast in its place.

    Args:
        model: The model.

    Returns:
        A context manager.
    """
    return forward_replaced(model, MethodType(type(model).forward, model))


class Replay:
    """A forward pass whose trunk is replaced by stored activations.

    Args:
        outputs: For each module of the trunk, the form of its outputs, call by call.
        pixel_shape: ``(C, H, W)`` of the images.
        activation_shape: Shape of one image's activation.
        dtype: Type of the activation in the model.
    """

    def __init__(
        self,
        outputs: dict[str, list[Any]],
        pixel_shape: tuple[int, ...],
        activation_shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self._templates = outputs
        self._pixel_shape = pixel_shape
        self._activation_shape = activation_shape
        self._dtype = dtype
        self._counts: dict[str, int] = {}
        self._activation: Tensor | None = None

    def feed(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A hook before the model's forward: keeps the activation, and passes on images that are not there.

        Args:
            model: The model.
            args: Its positional arguments.
            kwargs: Its keyword arguments, with the activations, ``(N, *activation_shape)``, as ``pixel_values``.

        Returns:
            The arguments with NaN in place of the images.

        Raises:
            ShapeError: If the activations have another shape.
        """
        given = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        if tuple(given.shape[1:]) != self._activation_shape:
            raise ShapeError(
                f"The part that moves should get stored activations of the shape {self._activation_shape} an image, "
                f"but got {tuple(given.shape[1:])}; leave the `replayed` block to run the whole model on images."
            )
        self._activation = given.to(self._dtype)
        self._counts = dict.fromkeys(self._templates, 0)
        return args[1:], kwargs | {"pixel_values": _nan(self._activation, self._pixel_shape, self._dtype)}

    def stub(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """What runs in place of a module of the trunk.

        Args:
            name: The module's name.
            forward: Its own forward, which later calls of a module that is used again get.

        Returns:
            The function.
        """

        def give(*args: Any, **kwargs: Any) -> Any:
            count = self._counts[name]
            self._counts[name] += 1
            known = self._templates[name]
            return _map(self._fill, known[count]) if count < len(known) else forward(*args, **kwargs)

        return give

    def _fill(self, mark: Any) -> Any:
        assert self._activation is not None, "the hook before the model's forward comes first"
        if isinstance(mark, _Entry):
            return self._activation
        if isinstance(mark, _Unknown):
            return _nan(self._activation, mark.shape, mark.dtype)
        return mark.to(self._activation.device) if isinstance(mark, Tensor) else mark


def _nan(activation: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """NaN for every image, in the memory of one number."""
    value = torch.full((1,) * (len(shape) + 1), float("nan"), dtype=dtype, device=activation.device)
    return value.expand(len(activation), *shape)
