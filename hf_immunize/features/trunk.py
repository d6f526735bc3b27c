"""The frozen trunk and the part that moves: where a model splits, and how the latter runs from a stored activation.

What runs after the split is the model's own code. Its forward is replayed with the modules of the trunk replaced by
stubs: one of them hands out the stored activation, and whatever else the trunk gives is replaced by NaN. A model that
uses anything of the trunk but the activation thus yields NaN, never a wrong number, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_immunize.errors import ShapeError, TrunkError
from hf_immunize.features.trunk_calls import Candidate, candidates, observed
from hf_immunize.features.trunk_replay import Replay, entry_leaf, forward_replaced, plain_forward, templates
from hf_immunize.vision.features import HeadInput, find_head
from hf_immunize.vision.scope import modules_in_eval


if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
