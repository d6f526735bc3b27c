"""The frozen trunk and the part that moves: where a model splits, and how the latter runs from a stored activation.

What runs after the split is the model's own code. Its forward is replayed with the modules of the trunk replaced by
stubs: one of them hands out the stored activation, and whatever else the trunk gives is replaced by NaN. A model that
uses anything of the trunk but the activation thus yields NaN, never a wrong number, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_immunize.errors import ShapeError, TrunkError
from hf_immunize.vision.head import HeadInput, find_head
from hf_immunize.vision.scope import modules_in_eval


if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


# Two sizes, so that what depends on the size of the batch is told from what does not.
_PROBE_IMAGES = (3, 2)
# A stored activation has lost its strides, and batches come in other sizes, so rounding differs (by a percent where a
# GPU multiplies in TF32); a wrong split differs in the first digit, or is NaN.
_TOLERANCE = {"cpu": 1e-3}
_ROUGH_TOLERANCE = 2e-2
# How dropout and stochastic depth call their probability.
_PROBABILITIES = ("p", "drop_prob", "drop_rate")


@dataclass(frozen=True)
class TrunkSplit:
    """Where a model's frozen trunk ends; made by `split_trunk`.

    It names modules and holds none, so it also serves copies of the model (a teacher, say).

    Attributes:
        entry: Name of the first module after the trunk.
        trunk: Names of the outermost modules of the trunk, in the order in which they run.
        around: Names of the modules around trunk and entry; "" is the model.
        pixel_shape: ``(C, H, W)`` of the images.
        activation_shape: Shape of one image's activation at the entry.
        activation_dtype: Its type in the model.
    """

    entry: str
    trunk: tuple[str, ...]
    around: tuple[str, ...]
    pixel_shape: tuple[int, ...]
    activation_shape: tuple[int, ...]
    activation_dtype: torch.dtype
    _templates: dict[str, list[Any]] = field(repr=False, compare=False)
    _producer: tuple[str, int] = field(repr=False, compare=False)

    def activations(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        """Run the trunk alone, in the modes its modules are in, without gradients and without autocast.

        Args:
            model: The model that was split, or a copy.
            pixel_values: Images, shape ``(N, C, H, W)``.

        Returns:
            The activations at the entry, shape ``(N, *activation_shape)``.

        Raises:
            ShapeError: If the images have another shape than those the model was split for.
        """
        if tuple(pixel_values.shape[1:]) != self.pixel_shape:
            raise ShapeError(
                f"The frozen trunk was split off for images of the shape (C, H, W) = {self.pixel_shape}, but got "
                f"{tuple(pixel_values.shape[1:])}; use an image processor that resizes and crops to one size."
            )
        name, call = self._producer
        template = [each for each in self._templates[name] if entry_leaf(each, each) is not None][-1]
        found: list[Tensor] = []

        def stop(_: str, count: int, output: Any) -> None:
            if count == call:
                found.append(entry_leaf(template, output))
                raise _TrunkDone

        exact = torch.autocast(pixel_values.device.type, enabled=False)
        with torch.no_grad(), exact, plain_forward(model), observed(model, [name], stop), suppress(_TrunkDone):
            model(pixel_values=pixel_values)
        return found[0].contiguous()

    @contextmanager
    def replayed(self, model: nn.Module) -> Iterator[None]:
        """Within, ``model(pixel_values=activations)`` runs the part that moves, and the trunk is not computed.

        The model's class, parameters and state dictionary stay as they are, so a wrapper such as
        ``DistributedDataParallel`` may be called in its place.

        Args:
            model: The model that was split, or a copy; without its wrapper.

        Yields:
            Nothing.
        """
        replay = Replay(self._templates, self.pixel_shape, self.activation_shape, self.activation_dtype)
        with ExitStack() as stack:
            for name in self._templates:
                module = model.get_submodule(name)
                stack.enter_context(forward_replaced(module, replay.stub(name, module.forward)))
            stack.callback(model.register_forward_pre_hook(replay.feed, with_kwargs=True).remove)
            yield


def split_trunk(
    model: PreTrainedModel,
    trainable_names: list[str],
    pixel_shape: tuple[int, ...],
    *,
    still: list[nn.Module] | None = None,
    head_module: str | None = None,
) -> TrunkSplit:
    """Find where the frozen trunk of a model ends, as late as the model's structure allows.

    The model runs a few times on random images, and the split is taken only if features and logits from stored
    activations equal those of the whole model. Modes, weights and the random state stay as they are.

    Args:
        model: An image classifier of transformers.
        trainable_names: The names of the parameters that move, as returned by `select_trainable`.
        pixel_shape: ``(C, H, W)`` of the images to come.
        still: The modules kept in eval mode in training; by default those of `modules_in_eval`.
        head_module: The classifier's name, where it cannot be found without help.

    Returns:
        The split.

    Raises:
        TrunkError: If nothing is frozen before what moves, if the trunk is no fixed function of one image (dropout,
            BatchNorm over the batch), or if the rest of the model needs more of it than one activation.
        HeadError: If the classifier cannot be found.

    Examples:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_immunize.vision.scope import select_trainable
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        ...                    image_size=32, patch_size=16, num_labels=3)
        >>> model = ViTForImageClassification(config).eval()
        >>> split = split_trunk(model, select_trainable(model, "last_stage"), (3, 32, 32))
        >>> split.entry, split.activation_shape
        ('vit.layers.2', (5, 16))
        >>> images = torch.randn(4, 3, 32, 32)
        >>> stored = split.activations(model, images)
        >>> with split.replayed(model):
        ...     logits = model(pixel_values=stored).logits
        >>> torch.equal(logits, model(images).logits)
        True
    """
    _, head = find_head(model, head_module)
    if still is None:
        still = modules_in_eval(model, trainable_names, head_module=head_module)
    chosen = set(trainable_names)
    moving = {id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False) if name in chosen}
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    probes = [
        torch.randn(count, *pixel_shape, generator=generator).to(weight.device, weight.dtype)
        for count in _PROBE_IMAGES
    ]
    devices = [weight.device] if weight.device.type == "cuda" else []
    reason = "nothing frozen runs before them"
    exact = torch.autocast(weight.device.type, enabled=False)
    with torch.no_grad(), exact, plain_forward(model), torch.random.fork_rng(devices), _modes_kept(model):
        model.eval()
        for candidate in candidates(model, moving, probes[0]):
            split, refusal = _split_at(model, candidate, probes)
            refusal = refusal or _not_fixed(model, split, still, probes) or _not_equal(model, head, split, probes)
            if refusal is None:
                return split
            reason = refusal
    raise TrunkError(
        f"{type(model).__name__} should have a frozen trunk before the parameters that move (first "
        f"{trainable_names[0]!r}), but {reason}; train it with cache_trunk='no', or let other parameters move."
    )


class _TrunkDone(Exception):
    """Ends a forward pass at the entry."""


def _split_at(model: nn.Module, candidate: Candidate, probes: list[Tensor]) -> tuple[Any, str | None]:
    """The split at one entry, or why there is none."""
    found, refusal = templates(model, candidate, probes)
    if found is None:
        return None, refusal
    name, call = found.producer
    return TrunkSplit(
        candidate.entry,
        tuple(dict.fromkeys(name for name, _ in candidate.trunk)),
        candidate.around,
        tuple(probes[0].shape[1:]),
        tuple(found.activation.shape[1:]),
        found.activation.dtype,
        found.templates,
        (name, call),
    ), None


def _not_fixed(model: nn.Module, split: TrunkSplit, still: list[nn.Module], probes: list[Tensor]) -> str | None:
    """Why the trunk is no fixed function of each image in training, if it is none."""
    frozen = set(still)
    for name in split.trunk:
        for inner, module in model.get_submodule(name).named_modules(prefix=name):
            if isinstance(module, _BatchNorm) and module.running_mean is None:
                return f"{inner!r} in it normalizes by the statistics of its batch"
            drops = any(isinstance(p := getattr(module, key, 0), float) and p > 0 for key in _PROBABILITIES)
            if drops and module not in frozen:
                return f"{inner!r} in it drops at random in training (set its probability to 0 in the config)"
    images = probes[0]
    expected = split.activations(model, images)
    for number, image in enumerate(images):
        if not _close(split.activations(model, image[None])[0], expected[number]):
            return "an image's activation depends on the other images of its batch"
    model.train()
    for module in still:
        module.training = False
    in_training = split.activations(model, images)
    model.eval()
    return None if _close(in_training, expected) else "its activations differ between training and evaluation"


def _not_equal(model: nn.Module, head: nn.Module, split: TrunkSplit, probes: list[Tensor]) -> str | None:
    """Why the part that moves, run from activations, is not the whole model, if it is not."""
    for images in probes:
        with HeadInput(head) as whole:
            logits = model(pixel_values=images).logits
        activations = split.activations(model, images)
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


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
