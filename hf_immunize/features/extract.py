"""Features at the classifier's input and at the output of every stage, pooled and flattened, in one pass."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_immunize.data.images import ImageCollator
from hf_immunize.errors import NonFiniteError, ScopeError
from hf_immunize.spectra.ratio import relative_immunization_ratio
from hf_immunize.spectra.streaming import FeatureFactor
from hf_immunize.vision.head import HeadInput, find_head, full_precision_forward
from hf_immunize.vision.relu import RELUS
from hf_immunize.vision.scope import block_modules


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ExtractedBatch:
    """One batch after the forward pass, on the model's device.

    Attributes:
        features: Classifier inputs, shape ``(n, D)``.
        logits: Classifier outputs, shape ``(n, C)``.
        pixel_values: The images, shape ``(n, C, H, W)``.
        labels: Class indices, shape ``(n,)``, or None where the rows have none.
    """

    features: Tensor
    logits: Tensor
    pixel_values: Tensor
    labels: Tensor | None


def extract(
    model: PreTrainedModel,
    rows: Any,
    image_processor: Any = None,
    *,
    batch_size: int = 64,
    head_module: str | None = None,
    description: str = "features",
    progress: bool = True,
) -> Iterator[ExtractedBatch]:
    """Run a model over a data set in eval mode, in float32 at least and without gradients, in the set's order.

    Args:
        model: An image classifier; its train or eval mode is restored at the end.
        rows: A map-style dataset of rows with ``"image"`` or ``"pixel_values"``, such as `ImageRows`.
        image_processor: Needed where the rows hold images.
        batch_size: Images in one forward pass.
        head_module: The classifier's name, where it cannot be found without help.
        description: What the progress bar calls it.
        progress: Whether to show a progress bar.

    Yields:
        Batches; the last one may be short.

    Raises:
        DataError, ShapeError, ImageDecodeError: See `ImageCollator` and `ImageRows`.
        HeadError: See `find_head`.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        ...                    image_size=32, patch_size=16, num_labels=3)
        >>> rows = [{"pixel_values": torch.zeros(3, 32, 32), "labels": 1}] * 5
        >>> batches = list(extract(ViTForImageClassification(config), rows, batch_size=4, progress=False))
        >>> [tuple(batch.features.shape) for batch in batches]
        [(4, 16), (1, 16)]
    """
    _, head = find_head(model, head_module)
    device = next(model.parameters()).device
    forward = full_precision_forward(model)
    loader = torch.utils.data.DataLoader(rows, batch_size=batch_size, collate_fn=ImageCollator(image_processor))
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(loader, desc=description, disable=not progress, leave=False):
            pixel_values = batch["pixel_values"].to(device)
            labels = batch.get("labels")
            with torch.no_grad(), torch.autocast(device.type, enabled=False), HeadInput(head) as captured:
                logits = forward(pixel_values=pixel_values).logits
            yield ExtractedBatch(
                captured.features, logits, pixel_values, None if labels is None else labels.to(device)
            )
    finally:
        model.train(was_training)


@dataclass
class Measurement:
    """Features of one data set through one state of the model, as a QR factor, with a checksum of the images.

    The checksum tells whether two measurements are of the same images, whatever the weights, the order of the images,
    and the processes they were dealt out to.
    """

    factor: FeatureFactor = field(default_factory=FeatureFactor)
    checksum: float = 0.0

    def update(self, features: Tensor, pixel_values: Tensor, produced_dtype: torch.dtype | None = None) -> None:
        """Fold in a batch.

        Args:
            features: Shape ``(n, D)``.
            pixel_values: The images they came from, shape ``(n, C, H, W)``.
            produced_dtype: See `FeatureFactor.update`.
        """
        self.checksum += images_checksum(pixel_values)
        self.factor.update(features, produced_dtype)

    def merge(self, other: Measurement) -> None:
        """Take in the measurement of other images through the same weights, as of another process.

        Args:
            other: It is left as it is.
        """
        self.checksum += other.checksum
        self.factor.merge(other.factor)

    def same_data(self, other: Measurement) -> bool:
        """Whether both measurements are of the same images, in whatever order."""
        return self.factor.num_samples == other.factor.num_samples and math.isclose(
            self.checksum, other.checksum, rel_tol=1e-6
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that `from_state_dict` restores."""
        return {**self.factor.state_dict(), "checksum": torch.tensor(self.checksum, dtype=torch.float64)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> Measurement:
        """Restore a measurement from the tensors of `state_dict`."""
        return cls(FeatureFactor.from_state_dict(state), float(state["checksum"]))


@contextmanager
def of_side(name: str) -> Iterator[None]:
    """Within, an error about features that are not finite says whose images they are of.

    Args:
        name: What to call the images, such as "harmful".

    Raises:
        NonFiniteError: As raised within.
    """
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"Of the {name} images: {error}") from error


def images_checksum(pixel_values: Tensor) -> float:
    """A number by which to know images again: a sum over them, so that it does not depend on their order.

    Each adds ``e + e²``, with e its mean squared pixel, where the weight of pixels rises from 1 to 2 over the image so
    that a flipped one is another one, and the square so that the sum says more than the mean of all images together.

    Args:
        pixel_values: Shape ``(n, C, H, W)``.

    Returns:
        The sum; that of two sets of images is the sum of their checksums.

    Example:
        >>> images = torch.arange(24.0).reshape(2, 3, 2, 2)
        >>> images_checksum(images) == images_checksum(images[:1]) + images_checksum(images[1:])
        True
        >>> [images_checksum(images) == images_checksum(images.flip(dim)) for dim in (0, 3)]
        [True, False]
    """
    rows = pixel_values.detach().float().flatten(1)
    weights = 1 + torch.arange(rows.shape[1], dtype=rows.dtype, device=rows.device) / rows.shape[1]
    energies = (rows.square() * weights).mean(dim=1).cpu().double()
    return float((energies + energies.square()).sum())


def spectral_metrics(
    benign: Measurement,
    benign_reference: Measurement | None,
    harmful: Measurement | None,
    harmful_reference: Measurement | None,
) -> dict[str, float]:
    """Metrics of an evaluation, by stable names and without a prefix.

    ``benign_log10_kappa``, ``benign_is_bound`` (1.0 where rank was lost, so that κ is only bounded from below),
    ``benign_rank``, ``benign_effective_rank``, the same for ``harmful``, and against the references ``rir``,
    ``log10_rir``, ``harmful_ratio``, ``benign_ratio`` with ``rir_is_lower_bound`` and ``rir_is_upper_bound``
    (both 1.0: no statement, and ``rir`` is NaN).

    Args:
        benign: The benign set now.
        benign_reference: The same set through the starting weights, if known; ignored if it is of other data.
        harmful: The harmful set now, if there is one.
        harmful_reference: The same set through the starting weights, if known; ignored if it is of other data.

    Returns:
        Name to number.
    """
    metrics: dict[str, float] = {}
    conditionings = {}
    for side, now, before in (("benign", benign, benign_reference), ("harmful", harmful, harmful_reference)):
        if now is None:
            continue
        start = before.factor.conditioning() if before is not None and now.same_data(before) else None
        conditioning = now.factor.conditioning(start)
        metrics[f"{side}_log10_kappa"] = conditioning.log10_kappa
        metrics[f"{side}_is_bound"] = float(conditioning.is_bound)
        metrics[f"{side}_rank"] = float(conditioning.rank)
        metrics[f"{side}_effective_rank"] = conditioning.effective_rank
        conditionings[side] = (conditioning, start)
    if len(conditionings) == 2 and all(start is not None for _, start in conditionings.values()):
        (b, b0), (h, h0) = conditionings["benign"], conditionings["harmful"]
        ratio = relative_immunization_ratio(harmful=h, harmful_reference=h0, benign=b, benign_reference=b0)
        metrics |= {
            "rir": ratio.rir,
            "log10_rir": ratio.log10_rir,
            "harmful_ratio": ratio.harmful_ratio,
            "benign_ratio": ratio.benign_ratio,
            "rir_is_lower_bound": float(ratio.bound in ("lower", "undetermined")),
            "rir_is_upper_bound": float(ratio.bound in ("upper", "undetermined")),
        }
    return metrics


def save_measurements(path: str | os.PathLike[str], measurements: dict[str, Measurement]) -> None:
    """Write measurements by name, as safetensors.

    Args:
        path: File to write.
        measurements: Name to measurement.
    """
    tensors = {
        f"{name}/{key}": value.cpu()
        for name, measurement in measurements.items()
        for key, value in measurement.state_dict().items()
    }
    save_file(tensors, path)


def load_measurements(path: str | os.PathLike[str]) -> dict[str, Measurement]:
    """Read what `save_measurements` wrote.

    Args:
        path: File to read.

    Returns:
        Name to measurement.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, value in load_file(path).items():
        name, key = full_name.rsplit("/", 1)
        states.setdefault(name, {})[key] = value
    return {name: Measurement.from_state_dict(state) for name, state in states.items()}


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
    rectifiers = [Layer(name, True, ()) for name, module in model.named_modules() if isinstance(module, RELUS)]
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
