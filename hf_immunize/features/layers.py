"""Features at the classifier's input and at the output of every stage, pooled and flattened, in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_immunize.errors import ScopeError
from hf_immunize.vision.features import HeadInput, find_head
from hf_immunize.vision.rectifiers import RECTIFIERS
from hf_immunize.vision.scope import block_modules


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layer:
    """A place in the network where features are read.

    Attributes:
        name: The module's name.
        before: Whether its input is read in place of its output.
        shape: Of one image there, without the batch.
    """

    name: str
    before: bool
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """Values an image."""
        return int(np.prod(self.shape))

    def label(self, view: str) -> str:
        """What outcomes call it, such as ``"vit.layers.0 (pooled)"``."""
        return f"{'input of ' if self.before else ''}{self.name} ({view})"


@dataclass
class Extraction:
    """One task through one model.

    Attributes:
        features: Classifier inputs, ``(N, D)``.
        logits: Classifier outputs, ``(N, C)``.
        views: Label of layer and view to features, ``(N, d)``.
    """

    features: Tensor
    logits: Tensor
    views: dict[str, Tensor] = field(default_factory=dict)


def find_layers(
    model: PreTrainedModel, pixel_values: Tensor, max_layers: int, head_module: str | None = None
) -> list[Layer]:
    """The layers to probe: what enters the blocks, the output of every stage, and what enters rectifiers.

    A stage ends where the resolution changes; where it never does (ViT), every block is one. A rectifier that is off
    hides what enters it from all that follows, and an attacker has only to look there: at the first one up to the end
    of each stage, before which nothing of the stage is hidden, and at the last.

    Args:
        model: An image classifier of transformers.
        pixel_values: One image or more, ``(n, C, H, W)``.
        max_layers: At most so many, evenly spaced, the last among them; what enters rectifiers comes on top.
        head_module: The classifier's name, where it cannot be found without help.

    Returns:
        Layers in the order of the forward pass; none where the model has no list of blocks.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        ...                    image_size=32, patch_size=16, num_labels=3)
        >>> layers = find_layers(ViTForImageClassification(config), torch.zeros(1, 3, 32, 32), 8)
        >>> [layer.label("pooled") for layer in layers]
        ['input of vit.layers.0 (pooled)', 'vit.layers.0 (pooled)', 'vit.layers.1 (pooled)']
    """
    try:
        blocks = block_modules(model, head_module)
    except ScopeError:
        return []
    first = next(iter(blocks))
    wanted = [Layer(first, True, ()), *(Layer(name, False, ()) for name in blocks)]
    rectifiers = [Layer(name, True, ()) for name, module in model.named_modules() if isinstance(module, RECTIFIERS)]
    with Readings(model, list(dict.fromkeys([*wanted, *rectifiers]))) as readings:
        run(model, pixel_values[:1])
    passed = {layer: tuple(value.shape[1:]) for layer, value in readings.values.items()}  # in the order of the pass
    found = [layer for layer in wanted if len(passed.get(layer, ())) in (2, 3)]
    # (C, h, w) or (T, C): what changes between stages is the grid.
    grids = [passed[layer][1:] if len(passed[layer]) == 3 else passed[layer][:1] for layer in found]
    ends = [i for i in range(len(found)) if i + 1 == len(found) or grids[i] != grids[i + 1]]
    if len(ends) > 1:
        found = [found[i] for i in ends]
    if len(found) > max_layers:
        chosen = np.unique(np.linspace(0, len(found) - 1, max_layers).round().astype(int))
        found = [found[i] for i in chosen]
    places = _with_rectifiers(found, [layer for layer in passed if len(passed[layer]) in (2, 3)], set(rectifiers))
    return [Layer(layer.name, layer.before, passed[layer]) for layer in places]


def _with_rectifiers(found: list[Layer], passed: list[Layer], rectifiers: set[Layer]) -> list[Layer]:
    """Layers found, with the first and the last rectifier before each and behind all; in the order of the pass."""
    chosen: list[Layer] = []
    between: list[Layer] = []
    for layer in passed:
        if layer in rectifiers:
            between.append(layer)
        if layer in found:
            chosen += [*between[:1], *between[-1:], layer]
            between = []
    return list(dict.fromkeys([*chosen, *between[:1], *between[-1:]])) if found else found


def choose_views(
    layers: list[Layer], rows: int, limit: int, memory: int, flattened: bool
) -> tuple[list[tuple[Layer, str]], dict[str, str]]:
    """Which layers are read in which form, within the memory there is.

    Args:
        layers: From `find_layers`.
        rows: Images.
        limit: Values an image, at most, of a flattened layer.
        memory: Bytes that all views together may take; deep layers come first.
        flattened: Whether to read layers flattened too.

    Returns:
        The views, and for those left out a sentence why.
    """
    chosen = [(layer, "pooled") for layer in layers]
    left_out = {}
    # The dual form's matrices, N × N in float64, and one working copy.
    spent = 24 * rows * rows
    for layer in reversed(layers if flattened else []):
        need = 4 * rows * layer.entries
        if layer.entries > limit:
            left_out[layer.label("flattened")] = (
                f"{layer.entries:,} values an image, more than the preset's {limit:,}; choose a larger preset."
            )
        elif spent + need > memory:
            left_out[layer.label("flattened")] = (
                f"needs {need / 2**30:.1f} GiB beside the {spent / 2**30:.1f} GiB of what is already held, of "
                f"{memory / 2**30:.1f} GiB there are; use fewer images or a larger machine."
            )
        else:
            spent += need
            chosen.append((layer, "flattened"))
    # Chosen from the end, read in the network's order.
    return sorted(chosen, key=lambda view: (view[1] != "pooled", layers.index(view[0]))), left_out


def extract_views(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    views: list[tuple[Layer, str]],
    head_module: str | None = None,
) -> Extraction:
    """Run a model over images once, in eval mode and without gradients, and read all views.

    Args:
        model: An image classifier; its train or eval mode is restored.
        batches: Pixel values, ``(n, C, H, W)`` each.
        views: From `choose_views`.
        head_module: The classifier's name, where it cannot be found without help.

    Returns:
        The extraction, on the CPU; half precision becomes float32, which holds the same numbers.
    """
    _, head = find_head(model, head_module)
    parts: dict[str, list[Tensor]] = {"features": [], "logits": []}
    was_training = model.training
    model.eval()
    try:
        for pixel_values in batches:
            with Readings(model, list({layer: None for layer, _ in views})) as readings, HeadInput(head) as captured:
                logits = run(model, pixel_values)
            parts["features"].append(_host(captured.features))
            parts["logits"].append(_host(logits))
            for layer, view in views:
                parts.setdefault(layer.label(view), []).append(_host(_viewed(readings.values[layer], view)))
    finally:
        model.train(was_training)
    joined: dict[str, Tensor] = {}
    for name in list(parts):  # one at a time, so that no more than one is held twice
        joined[name] = torch.cat(parts.pop(name))
    return Extraction(joined.pop("features"), joined.pop("logits"), joined)


def pass_size(model: nn.Module) -> int:
    """Images in a batch of a pass without gradients.

    On a CPU few: activations of many take tens of megabytes each, which the C library gives back to the system and
    has to be given anew at every layer. 64 images of 160 pixels through MobileNetV2 cost 40 ms each, 8 cost 22.

    Args:
        model: The model.

    Returns:
        64 on an accelerator, 8 on a CPU.

    Example:
        >>> pass_size(nn.Linear(2, 2))
        8
    """
    return 8 if next(model.parameters()).device.type == "cpu" else 64


def run(model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """Logits, without gradients and autocast, on the model's device and in its precision."""
    parameter = next(model.parameters())
    with torch.no_grad(), torch.autocast(parameter.device.type, enabled=False):
        logits: Tensor = model(pixel_values=pixel_values.to(parameter.device, parameter.dtype)).logits
    return logits


def dual_coordinates(Z: Tensor, Z_test: Tensor, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """Features in an orthonormal basis of the training rows' span: at most N coordinates in place of D.

    ``K = ZZᵀ = QΛQᵀ`` gives ``Z = QΛ^½·Bᵀ`` with orthonormal ``B``, so any probe that commutes with rotations and
    starts at zero (ridge, gradient descent, L-BFGS with a penalty on ‖W‖²) finds the same scores on ``QΛ^½`` and
    ``K_test QΛ^-½``. In float64; directions below 1e-8 of the largest are lost to the square.

    Args:
        Z: Training features, ``(N, D)``.
        Z_test: Test features, ``(M, D)``.
        chunk: Columns turned into float64 at a time.

    Returns:
        Both in the new coordinates, ``(N, r)`` and ``(M, r)``; as they were, in float64, where D ≤ N.

    Example:
        >>> Z = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
        >>> a, b = dual_coordinates(Z, Z)
        >>> a.shape, bool(torch.allclose(a @ b.T, (Z @ Z.T).double(), atol=1e-4))
        (torch.Size([4, 4]), True)
    """
    if Z.shape[1] <= len(Z):
        return Z.double(), Z_test.double()
    K = torch.zeros(len(Z), len(Z), dtype=torch.float64)
    K_test = torch.zeros(len(Z_test), len(Z), dtype=torch.float64)
    for start in range(0, Z.shape[1], chunk):
        columns = Z[:, start : start + chunk].double()
        K.addmm_(columns, columns.mT)
        K_test.addmm_(Z_test[:, start : start + chunk].double(), columns.mT)
    values, Q = torch.linalg.eigh(K)
    keep = values > values[-1].clamp_min(0) * 1e-16
    root = values[keep].sqrt()
    return Q[:, keep] * root, K_test @ (Q[:, keep] / root)


class Readings:
    """Record what passes at some layers during forward passes; the hooks are removed on exit.

    Args:
        model: The model.
        layers: Where to read.
    """

    def __init__(self, model: nn.Module, layers: list[Layer]) -> None:
        self.modules = dict(model.named_modules())
        self.layers = layers
        self.values: dict[Layer, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Readings:
        for layer in self.layers:
            module = self.modules[layer.name]
            if layer.before:
                hook = self._before(layer)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(self._after(layer)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, layer: Layer) -> Any:
        def record(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            values = (*inputs, *named.values())
            # In place it writes over what entered.
            in_place = getattr(module, "inplace", False)
            self._note(layer, (value.clone() if in_place else value for value in values))

        return record

    def _after(self, layer: Layer) -> Any:
        def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self._note(layer, output if isinstance(output, (tuple, list)) else (output,))

        return record

    def _note(self, layer: Layer, values: Iterable[Any]) -> None:
        tensor = next((value for value in values if isinstance(value, Tensor)), None)
        if tensor is not None:
            self.values[layer] = tensor


def _viewed(value: Tensor, view: str) -> Tensor:
    if view == "flattened":
        return value.flatten(1)
    return value.mean(dim=(2, 3)) if value.dim() == 4 else value.mean(dim=1)


def _host(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return value if value.dtype == torch.float64 else value.float()
