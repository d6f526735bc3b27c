"""The frozen trunk: where a model splits, and how the trainable part runs from a stored activation.

The model's own forward is replayed with stubs in place of the trunk: one gives the activation, the others NaN. A model
that uses anything else of the trunk thus yields NaN, never a wrong number, and is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_immunize.errors import ShapeError, TrunkError
from hf_immunize.vision.head import HeadInput, fast_layout, find_head, in_eval_mode
from hf_immunize.vision.scope import modules_in_eval


if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Two sizes, so that what depends on the size of the batch is separable from what does not.
_PROBE_IMAGES = (3, 2)
# A stored activation has lost its strides, and batches come in other sizes, so rounding differs (by a percent where a
# GPU multiplies in TF32); a wrong split differs in the first digit, or is NaN.
_TOLERANCE = {"cpu": 1e-3}
_ROUGH_TOLERANCE = 2e-2
# How dropout and stochastic depth call their probability.
_PROBABILITIES = ("p", "drop_prob", "drop_rate")


# ---- what a split is ----


@dataclass(frozen=True)
class TrunkSplit:
    """Where a model's frozen trunk ends, by names of modules, so that it serves the model's copies too."""

    entry: str  # the first module after the trunk
    trunk: tuple[str, ...]  # its outermost modules, in the order in which they run
    around: tuple[str, ...]  # the modules around trunk and entry; "" is the model
    pixel_shape: tuple[int, ...]  # (C, H, W)
    activation_shape: tuple[int, ...]  # of one image
    activation_dtype: torch.dtype
    # The form of the trunk's outputs, and the module whose output holds the activation.
    _templates: dict[str, Any] = field(repr=False, compare=False)
    _producer: str = field(repr=False, compare=False)

    def activations(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        """Run the trunk alone, in the modes of its modules, without gradients: ``(N, C, H, W)`` to the activations."""
        if tuple(pixel_values.shape[1:]) != self.pixel_shape:
            raise ShapeError(
                f"Expected images of the shape (C, H, W) = {self.pixel_shape}, for which the frozen trunk was split "
                f"off, found {tuple(pixel_values.shape[1:])}. Use an image processor that resizes and crops."
            )
        marks = _leaves(self._templates[self._producer])
        place = next(index for index, mark in enumerate(marks) if isinstance(mark, _Entry))
        found: list[Tensor] = []

        def stop(module: nn.Module, _: Any, output: Any) -> None:
            found.append(_leaves(output)[place])
            raise _TrunkDone

        with torch.no_grad(), _plain(model, pixel_values.device), suppress(_TrunkDone), ExitStack() as hook:
            hook.callback(model.get_submodule(self._producer).register_forward_hook(stop).remove)
            model(pixel_values=fast_layout(model, pixel_values))
        return found[0].contiguous()

    @contextmanager
    def replayed(self, model: nn.Module) -> Iterator[None]:
        """Within, ``model(pixel_values=activations)``, or its wrapper, runs the trainable part, and no trunk."""
        activation = torch.empty(0)

        def feed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            """Keep the activation, and pass on images that are not there."""
            nonlocal activation
            given = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
            if tuple(given.shape[1:]) != self.activation_shape:
                raise ShapeError(
                    f"Expected stored activations of the shape {self.activation_shape} per image, found "
                    f"{tuple(given.shape[1:])}. Leave the `replayed` block to run the whole model on images."
                )
            activation = given.to(self.activation_dtype)
            return args[1:], kwargs | {"pixel_values": _nan(activation, self.pixel_shape, self.activation_dtype)}

        def fill(mark: Any) -> Any:
            if isinstance(mark, _Entry):
                return activation
            if isinstance(mark, _Unknown):
                return _nan(activation, mark.shape, mark.dtype)
            return mark.to(activation.device) if isinstance(mark, Tensor) else mark

        def stub(template: Any) -> Callable[..., Any]:
            return lambda *args, **kwargs: _map(fill, template)

        with ExitStack() as stack:
            for name, template in self._templates.items():
                stack.enter_context(_forward_replaced(model.get_submodule(name), stub(template)))
            stack.callback(model.register_forward_pre_hook(feed, with_kwargs=True).remove)
            yield


class _TrunkDone(Exception):
    """Ends a forward pass at the entry."""


class _Entry:
    """In a template: the activation at the entry."""


@dataclass(frozen=True)
class _Unknown:
    """In a template: a tensor that depends on the images, and that nothing after the trunk may use."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _nan(activation: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """NaN for every image, in the memory of one number."""
    value = torch.full((1,) * (len(shape) + 1), float("nan"), dtype=dtype, device=activation.device)
    return value.expand(len(activation), *shape)


# ---- finding it ----


def split_trunk(
    model: PreTrainedModel,
    trainable_names: list[str],
    pixel_shape: tuple[int, ...],
    *,
    eval_modules: list[nn.Module] | None = None,  # kept in eval mode in training
    head_module: str | None = None,
) -> TrunkSplit:
    """Find where the frozen trunk of a model ends, as late as the model's structure allows; else a `TrunkError`."""
    # A split is accepted only if features and logits from activations of random images equal those of the whole model.
    _, head = find_head(model, head_module)
    if eval_modules is None:
        eval_modules = modules_in_eval(model, trainable_names, head_module=head_module)
    chosen = set(trainable_names)
    trainable = {id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False) if name in chosen}
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    probes = [
        torch.randn(count, *pixel_shape, generator=generator).to(weight.device, weight.dtype)
        for count in _PROBE_IMAGES
    ]
    devices = [weight.device] if weight.device.type == "cuda" else []
    reason = "nothing frozen runs before them"
    with torch.no_grad(), _plain(model, weight.device), torch.random.fork_rng(devices), in_eval_mode(model):
        recorded = [_record_calls(model, images) for images in probes]
        for candidate in _candidates(recorded[0], trainable):
            split = _split_at(candidate, recorded, probes)
            if isinstance(split, TrunkSplit):
                refusal = _not_fixed(model, split, eval_modules, probes[0]) or _not_equal(model, head, split, probes)
                if refusal is None:
                    return split
                split = refusal
            reason = split
    raise TrunkError(
        f"Expected a frozen trunk before the trainable parameters of {type(model).__name__} (first "
        f"{trainable_names[0]!r}), found that {reason}. Use cache_trunk='no', or make other parameters trainable."
    )


@dataclass
class _Call:
    """One call of a module in a forward pass, with the calls within it."""

    name: str
    module: nn.Module
    inputs: Any = None
    output: Any = None
    children: list[_Call] = field(default_factory=list)

    def within(self) -> Iterator[_Call]:
        for child in self.children:
            yield child
            yield from child.within()


def _record_calls(model: nn.Module, images: Tensor) -> _Call:
    root = _Call("", model)
    stack = [root]

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, *inputs: Any) -> None:
            call = _Call(name, module, inputs)
            stack[-1].children.append(call)
            stack.append(call)

        return hook

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        stack.pop().output = output

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if module is not model:
                hooks.callback(module.register_forward_pre_hook(enter(name), with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
        model(pixel_values=images)
    return root


# Where a frozen trunk may end: the first call after it, the modules of the trunk, the modules around.
_Candidate = tuple[_Call, list[str], tuple[str, ...]]


def _candidates(call: _Call, trainable: set[int]) -> list[_Candidate]:
    """The places where a frozen trunk may end, latest first."""
    # Going down the calls to the first module with a trainable parameter, all that ran before on every level is
    # frozen. Below a module that itself owns a trainable parameter nothing is known about the order.
    around: list[str] = []
    trunk: list[str] = []
    found: dict[int, _Candidate] = {}
    while not any(id(parameter) in trainable for parameter in call.module.parameters(recurse=False)):
        around.append(call.name)
        children = call.children
        trains = [any(id(one) in trainable for one in child.module.parameters()) for child in children]
        if not any(trains):
            break
        number = trains.index(True)
        trunk += [child.name for child in children[:number]]
        call = children[number]
        if trunk:
            # Of several with the same trunk, the outermost is the one people know by name.
            found.setdefault(len(trunk), (call, list(trunk), tuple(around)))
    return list(found.values())[::-1]


def _split_at(candidate: _Candidate, recorded: list[_Call], probes: list[Tensor]) -> TrunkSplit | str:
    """The split at one entry, from two passes of other images and other sizes; or why there is none."""
    call, trunk, around = candidate
    entry = call.name
    one, two = ({call.name: call.output for call in root.within()} for root in recorded)
    runs = Counter(call.name for call in recorded[0].within())
    for name in trunk:
        if runs[name] > 1:
            return f"{name!r} in it runs more than once in a forward pass"
    sizes = [len(images) for images in probes]
    entering = {id(leaf) for leaf in _leaves(call.inputs) if isinstance(leaf, Tensor) and leaf.dim() > 1}
    given: dict[int, tuple[str, Tensor]] = {}
    constant = set()
    for name in trunk:
        for leaf, other in zip(_leaves(one[name]), _leaves(two[name]), strict=False):
            if id(leaf) in entering:
                given[id(leaf)] = name, leaf
            if isinstance(leaf, Tensor) and isinstance(other, Tensor) and _same(leaf, other):
                constant.add(id(leaf))
    varying = [pair for identity, pair in given.items() if identity not in constant]
    if len(varying) != 1:
        return f"{len(varying)} of its outputs enter {entry!r}, where one could be stored"
    ((producer, activation),) = varying
    if activation.shape[0] != sizes[0] or not activation.is_floating_point():
        return f"what enters {entry!r} has the shape {tuple(activation.shape)} for {sizes[0]} images"
    templates: dict[str, Any] = {}
    try:
        for name in trunk:
            templates[name] = _template(one[name], two[name], sizes, activation)
    except _Unfit as unfit:
        return f"{name!r} in it {unfit}"
    pixel_shape, activation_shape = tuple(probes[0].shape[1:]), tuple(activation.shape[1:])
    return TrunkSplit(
        entry, tuple(trunk), around, pixel_shape, activation_shape, activation.dtype, templates, producer
    )


class _Unfit(Exception):
    """The outputs of a trunk cannot be replayed; the message says why."""


def _template(output: Any, other: Any, sizes: list[int], activation: Tensor) -> Any:
    """The form of an output, from those of two passes."""

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
            raise _Unfit(f"gives a {one.dtype} tensor of the shape {tuple(one.shape)}, which has no row per image")
        return _Unknown(tuple(one.shape[1:]), one.dtype)

    return _map(leaf, output, other)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _leaves(value: Any) -> list[Any]:
    parts = list(value.values()) if isinstance(value, dict) else value
    return [leaf for part in parts for leaf in _leaves(part)] if isinstance(parts, (tuple, list)) else [value]


def _map(function: Callable[..., Any], value: Any, *others: Any) -> Any:
    """Apply a function to the leaves of nested values of one form."""
    if isinstance(value, (dict, tuple, list)):
        if any(type(other) is not type(value) or len(other) != len(value) for other in others):
            raise _Unfit("gives outputs whose form depends on the images")
        if isinstance(value, dict):
            mapped = {key: _map(function, part, *(other[key] for other in others)) for key, part in value.items()}
            return mapped if type(value) is dict else type(value)(**mapped)
        parts = [_map(function, *each) for each in zip(value, *others, strict=True)]
        return parts if isinstance(value, list) else tuple(parts)
    return function(value, *others)


# ---- what makes a split unfit ----


def _not_fixed(model: nn.Module, split: TrunkSplit, eval_modules: list[nn.Module], images: Tensor) -> str | None:
    """Why the trunk is no fixed function of each image in training, if it is none."""
    for name in split.trunk:
        for inner, module in model.get_submodule(name).named_modules(prefix=name):
            drops = any(isinstance(p := getattr(module, key, 0), float) and p > 0 for key in _PROBABILITIES)
            if drops and module not in eval_modules:
                return f"{inner!r} in it drops at random in training (set its probability to 0 in the config)"
    expected = split.activations(model, images)
    for number, image in enumerate(images):
        if not _close(split.activations(model, image[None])[0], expected[number]):
            return "an image's activation depends on the other images of its batch"
    model.train()
    for module in eval_modules:
        module.training = False
    in_training = split.activations(model, images)
    model.eval()
    return None if _close(in_training, expected) else "its activations differ between training and evaluation"


def _not_equal(model: nn.Module, head: nn.Module, split: TrunkSplit, probes: list[Tensor]) -> str | None:
    """Why the trainable part, run from activations, is not the whole model, if it is not."""
    for images in probes:
        activations = split.activations(model, images)
        with HeadInput(head) as whole:
            logits = model(pixel_values=images).logits
        try:
            with split.replayed(model), HeadInput(head) as replayed:
                replayed_logits = model(pixel_values=activations).logits
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            return f"what follows does not run from its activation alone ({type(error).__name__})"
        if not (_close(replayed.features, whole.features) and _close(replayed_logits, logits)):
            return f"what follows {split.entry!r} uses more of it than one activation"
    return None


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return False
    exact = expected.dtype in (torch.float32, torch.float64)
    tolerance = _TOLERANCE.get(expected.device.type, _ROUGH_TOLERANCE) if exact else _ROUGH_TOLERANCE
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


# ---- a model for a while ----


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward; its hooks, parameters and class stay."""
    own = vars(module).get("forward")  # such as accelerate or a compiler may have put there
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def _plain(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Without autocast, by the forward of the model's class; accelerate puts one under autocast in its place."""
    forward: AbstractContextManager[None] = _forward_replaced(model, MethodType(type(model).forward, model))
    with torch.autocast(device.type, enabled=False), forward:
        yield
