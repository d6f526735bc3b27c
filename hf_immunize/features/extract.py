"""One loop of a model over images: the spectrum of the classifier's input, and views of earlier layers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_immunize.data.images import ImageCollator
from hf_immunize.errors import NonFiniteError, RankError, ScopeError
from hf_immunize.intervals import paired_interval
from hf_immunize.linear.time import (
    ProbingSteps,
    StartTimes,
    component_spectra,
    probing_metrics,
    start_times,
    steps_after,
    streamed_spectrum,
)
from hf_immunize.spectra.conditioning import Conditioning
from hf_immunize.spectra.ratio import relative_immunization_ratio
from hf_immunize.spectra.streaming import FeatureFactor
from hf_immunize.vision.head import HeadInput, find_head, full_precision_forward, in_eval_mode
from hf_immunize.vision.relu import RELUS
from hf_immunize.vision.scope import block_modules


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layer:
    """A place in the network where features are read: a module's output, or its input."""

    name: str
    before: bool  # whether its input is read
    shape: tuple[int, ...]  # of one image there
    inner: bool = False  # hidden units of a feed-forward block, (…, C): read pooled alone

    @property
    def entries(self) -> int:
        """Values per image."""
        return math.prod(self.shape)

    def label(self, view: str) -> str:
        """What outcomes call it, such as ``"vit.layers.0 (pooled)"``."""
        return f"{'input of ' if self.before else ''}{self.name} ({view})"


@dataclass(frozen=True)
class ExtractedBatch:
    """One batch after the forward pass, on the model's device."""

    features: Tensor  # what enters the classifier, (n, D)
    logits: Tensor  # (n, C)
    pixel_values: Tensor  # (n, C, H, W)
    labels: Tensor | None  # (n,)
    layers: dict[Layer, Tensor]  # what passed at the layers asked for, in the order of the pass


@torch.no_grad()
def run_batches(
    model: nn.Module,
    head: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    *,
    layers: Iterable[Layer] = (),
    forward: Callable[..., Any] | None = None,
) -> Iterator[ExtractedBatch]:
    """Run a model over batches in eval mode, without gradients and autocast, by default in float32 at least."""
    weight = next(model.parameters())
    forward = forward or full_precision_forward(model)
    with in_eval_mode(model):
        for batch in batches:
            given, labels = batch["pixel_values"], batch.get("labels")
            pixel_values = given.to(weight.device, torch.promote_types(given.dtype, weight.dtype))
            exact = torch.autocast(weight.device.type, enabled=False)
            with exact, HeadInput(head) as captured, _read_layers(model, layers) as passed:
                logits = forward(pixel_values=pixel_values).logits
            labels = None if labels is None else labels.to(weight.device)
            yield ExtractedBatch(captured.features, logits, pixel_values, labels, passed)


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
    """Run a model over a map-style dataset of rows with ``"image"`` or ``"pixel_values"``, in the set's order."""
    loader = torch.utils.data.DataLoader(rows, batch_size=batch_size, collate_fn=ImageCollator(image_processor))
    shown = tqdm(loader, desc=description, disable=not progress, leave=False)
    yield from run_batches(model, find_head(model, head_module)[1], shown)


@contextmanager
def _read_layers(model: nn.Module, layers: Iterable[Layer]) -> Iterator[dict[Layer, Tensor]]:
    """What passes at some layers in a forward pass, in its order."""
    found: dict[Layer, Tensor] = {}

    def note(layer: Layer, values: Any) -> None:
        tensor = next((value for value in values if isinstance(value, Tensor)), None)
        if tensor is not None:
            # A module in place writes over what entered.
            writes = layer.before and getattr(model.get_submodule(layer.name), "inplace", False)
            found[layer] = tensor.clone() if writes else tensor

    def attach(layer: Layer) -> Any:
        def before(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            note(layer, (*inputs, *named.values()))

        def after(_: nn.Module, inputs: Any, output: Any) -> None:
            note(layer, output if isinstance(output, (tuple, list)) else (output,))

        module = model.get_submodule(layer.name)
        if layer.before:
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(attach(layer).remove)
        yield found


def pass_size(model: nn.Module) -> int:
    """Images per batch of a pass without gradients: 64 on an accelerator; on a CPU 8 take half the time of 64."""
    return 8 if next(model.parameters()).device.type == "cpu" else 64


# ---- the spectrum of a data set ----

# Features of so many images are kept, to be compared with the reference's image by image.
_SAMPLE = 8192
# Of a measurement's state, what is compared on the CPU.
BY_IMAGE = ("numbers", "by_image")


@dataclass
class Measurement:
    """Features of one data set through one state of the model, as a QR factor, with a checksum of the images."""

    factor: FeatureFactor = field(default_factory=FeatureFactor)
    checksum: float = 0.0
    class_sums: Tensor | None = None  # (C, 1 + D), of ones and features by class; None unless all have a class
    # What is compared with the reference image by image, and numbers to know images by, (n,): of images without a
    # class their features, (n, D), and of others whether the model names them rightly, (n, 1), where that is known.
    by_image: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)
    noted: int = 0  # images that this is of; there are features of a sample of `_SAMPLE` at most
    compared: bool = True  # whether anything will be, image by image; else the factor is all that is kept
    # How long a probe takes here, by its targets: of a reference, every evaluation asks for it.
    _times: dict[str, StartTimes | None] = field(default_factory=dict, init=False, repr=False)

    def update(
        self, features: Tensor, pixel_values: Tensor, labels: Tensor | None = None, logits: Tensor | None = None
    ) -> None:
        """Fold in a batch: features ``(n, D)`` of images ``(n, C, H, W)``, with class numbers ``(n,)`` or without.

        Logits ``(n, C)`` are given where the classes are the model's.
        """
        first = self.factor.num_samples == 0
        self._times = {}
        numbers = _image_numbers(pixel_values)
        self.checksum += float(numbers.sum())
        self.factor.update(features)
        if not self.compared:
            return
        sums = _class_sums(features, labels)
        self.class_sums = sums if first else _added(self.class_sums, sums)
        if sums is None:
            # Copied: of a view, as a class token is, the whole would stay.
            self._note([(numbers, features.detach().to("cpu", copy=True))], len(numbers))
        elif labels is not None and logits is not None:
            self._note([(numbers, (logits.argmax(-1) == labels).cpu()[:, None])], len(numbers))

    def merge(self, other: Measurement) -> None:
        """Fold in the measurement of other images through the same weights, as of another process."""
        if other.factor.num_samples == 0:
            return
        first = self.factor.num_samples == 0
        self._times = {}
        self.checksum += other.checksum
        self.factor.merge(other.factor)
        self.class_sums = other.class_sums if first else _added(self.class_sums, other.class_sums)
        self._note(other.by_image, other.noted)

    def _note(self, parts: list[tuple[Tensor, Tensor]], count: int) -> None:
        self.by_image += parts
        self.noted += count
        # Many small tensors among large ones that go would keep the memory of both.
        while len(self.by_image) > 1 and _joins(*self.by_image[-2:]):
            self.by_image[-2:] = [_drawn(self.by_image[-2:])]

    def spectrum(self) -> tuple[Tensor, Tensor] | None:
        """Eigenvalues and the classes' shares in their directions (see `streamed_spectrum`); None without classes."""
        return None if self.class_sums is None else streamed_spectrum(self.factor, self.class_sums)

    def rows(self) -> Tensor | None:
        """`by_image`, ``(n, D)``, in an order that depends on the images alone; None unless all are of one kind."""
        if self.noted != self.factor.num_samples or not self.noted:
            return None
        if len({(values.shape[1], values.dtype) for _, values in self.by_image}) > 1:
            return None
        self.by_image = [_drawn(self.by_image)]
        return self.by_image[0][1]

    def same_data(self, other: Measurement) -> bool:
        """Whether both measurements are of the same images, in whatever order."""
        same_number = self.factor.num_samples == other.factor.num_samples
        return same_number and math.isclose(self.checksum, other.checksum, rel_tol=1e-6)

    def reference_conditioning(self, before: Measurement | None, *, intercept: bool = False) -> Conditioning | None:
        """Conditioning of the reference's features; None where there is none of the same images."""
        if before is None or not self.same_data(before):
            return None
        return before.factor.conditioning(intercept=intercept)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that `from_state_dict` restores."""
        state = {**self.factor.state_dict(), "checksum": torch.tensor(self.checksum, dtype=torch.float64)}
        rows = self.rows()
        if rows is not None:
            state |= {"numbers": self.by_image[0][0], "by_image": rows}
        return state if self.class_sums is None else {**state, "class_sums": self.class_sums}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> Measurement:
        """Restore a measurement from the tensors of `state_dict`."""
        factor, classes = FeatureFactor.from_state_dict(state), state.get("class_sums")
        rows = [(state["numbers"].cpu(), state["by_image"].cpu())] if "by_image" in state else []
        return cls(factor, float(state["checksum"]), classes, rows, factor.num_samples if rows else 0)


def _drawn(by_image: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Numbers and values in the order of numbers; of features a sample by content, whatever their order."""
    numbers, values = (torch.cat(parts) for parts in zip(*by_image, strict=True))
    if values.dtype != torch.bool and len(numbers) > _SAMPLE:
        # The golden ratio's bits spread numbers evenly: the smallest are no sample, but dark images.
        chosen = (numbers.view(torch.int64) * -7046029254386353131).argsort()[:_SAMPLE]
        numbers, values = numbers[chosen], values[chosen]
    order = numbers.argsort()
    return numbers[order], values[order]


def _joins(earlier: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor]) -> bool:
    """Whether rows of a later part are of the earlier's kind and as many: each is then copied a few times alone."""
    kinds = {(values.shape[1], values.dtype) for _, values in (earlier, later)}
    return len(kinds) == 1 and len(later[0]) >= len(earlier[0])


def _class_sums(features: Tensor, labels: Tensor | None) -> Tensor | None:
    """Sums of ones and features by class, ``(C, 1 + D)`` float64 on the CPU; None unless every row has a class."""
    if labels is None or labels.ndim != 1 or labels.is_floating_point() or not len(labels):
        return None
    if int(labels.min()) < 0 or int(labels.max()) >= 2**15:  # numbers of another kind
        return None
    rows = features.detach().cpu().double()
    sums = rows.new_zeros(int(labels.max()) + 1, rows.shape[1] + 1)
    return sums.index_add_(0, labels.cpu().long(), torch.cat([rows.new_ones(len(rows), 1), rows], dim=1))


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Sums by class of two sets of images, of as many classes as the larger has."""
    if one is None or other is None:
        return None
    classes = max(len(one), len(other))
    return torch.stack([F.pad(sums.to(one), (0, 0, 0, classes - len(sums))) for sums in (one, other)]).sum(dim=0)


@contextmanager
def of_side(name: str) -> Iterator[None]:
    """Within, an error about features that are not finite names their images, such as "harmful"."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"Of the {name} images: {error}") from error


def _image_numbers(pixel_values: Tensor) -> Tensor:
    """A number of each image by which to know it again, ``(n,)`` float64 on the CPU; their sum is of the set."""
    # Each is e + e², with e its mean squared pixel, where the weight of pixels rises from 1 to 2 over the image so
    # that a flipped one is another one, and the square so that the sum says more than the mean of all images together.
    rows = pixel_values.detach().float().flatten(1)
    weights = 1 + torch.arange(rows.shape[1], dtype=rows.dtype, device=rows.device) / rows.shape[1]
    energies = (rows.square() * weights).mean(dim=1).cpu().double()
    return energies + energies.square()


def probing_steps(now: Measurement, before: Measurement | None) -> ProbingSteps | None:
    """How long a probe takes now and took before; None unless both are of the same images, of two classes at least.

    Without classes, it is of a sample of 8,192 images where there are more.
    """
    if before is None or not now.same_data(before):
        return None
    targets, start, found = "classes", before.spectrum(), now.spectrum()
    rows = None if start else before.rows(), None if found else now.rows()
    if rows[0] is not None and rows[1] is not None:
        factors = before.factor, now.factor
        if len(rows[0]) < before.factor.num_samples:
            # Rounding may draw other images on other hardware.
            if not torch.allclose(before.by_image[0][0], now.by_image[0][0], rtol=1e-6):
                return None
            factors = FeatureFactor().update(rows[0]), FeatureFactor().update(rows[1])
        targets, (start, found) = "components", component_spectra(factors[0], rows[0], factors[1], rows[1])
    if found is None or start is None:
        return None
    if targets not in before._times:
        before._times[targets] = start_times(start)
    times = before._times[targets]
    return None if times is None else steps_after(times, found, targets)


def accuracy_change(now: Measurement, before: Measurement | None) -> dict[str, float]:
    """Change of the accuracy and its 95 % interval over images, paired; empty unless both named the same images."""
    if before is None or before is now or not now.same_data(before):
        return {}
    found, start = now.rows(), before.rows()
    if found is None or start is None or found.dtype != torch.bool or start.dtype != torch.bool:
        return {}
    gained, lost, size = int((found & ~start).sum()), int((start & ~found).sum()), len(found)
    low, high = paired_interval(gained, lost, size)
    return {"accuracy_change": (gained - lost) / size, "accuracy_change_low": low, "accuracy_change_high": high}


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
    (both 1.0: no statement, and ``rir`` is NaN). A reference of other data, through the starting weights, is ignored.
    Names that begin with ``intercept_`` are of a probe with an intercept. Where all images have a class, or none has,
    ``benign_probing_steps`` and ``harmful_probing_steps`` are how long such a probe takes (see `probing_steps`;
    without classes, ``…_probing_of_components`` is 1.0), ``…_conjugate_gradient_steps`` by conjugate gradient, and
    ``probing_time_ratio`` is the growth of the harmful ones over that of the benign ones.
    """
    sides = {"benign": (benign, benign_reference), "harmful": (harmful, harmful_reference)}
    times = {side: probing_steps(now, before) for side, (now, before) in sides.items() if now is not None}
    metrics = probing_metrics(times) | accuracy_change(benign, benign_reference)
    for intercept in (False, True):
        known: dict[str, Any] = {}
        prefix = "intercept_" if intercept else ""
        for side, (now, before) in sides.items():
            if now is None or (intercept and now.factor.num_samples < 2):
                continue
            try:
                start = now.reference_conditioning(before, intercept=intercept)
                found = now.factor.conditioning(start, intercept=intercept)
            except RankError:
                if not intercept:
                    raise
                continue  # features that are all alike have a κ without an intercept alone
            known |= {side: found} if start is None else {side: found, f"{side}_reference": start}
            metrics[f"{prefix}{side}_log10_kappa"] = found.log10_kappa
            metrics[f"{prefix}{side}_is_bound"] = float(found.is_bound)
            metrics[f"{prefix}{side}_rank"] = float(found.rank)
            metrics[f"{prefix}{side}_effective_rank"] = found.effective_rank
        if len(known) == 4:
            ratio = relative_immunization_ratio(**known, protocol="intercept" if intercept else "exact")
            metrics |= {
                f"{prefix}rir": ratio.rir,
                f"{prefix}log10_rir": ratio.log10_rir,
                f"{prefix}harmful_ratio": ratio.harmful_ratio,
                f"{prefix}benign_ratio": ratio.benign_ratio,
                f"{prefix}rir_is_lower_bound": float(ratio.bound in ("lower", "undetermined")),
                f"{prefix}rir_is_upper_bound": float(ratio.bound in ("upper", "undetermined")),
            }
    return metrics


def save_measurements(path: str | os.PathLike[str], measurements: dict[str, Measurement]) -> None:
    """Write measurements by name, as safetensors."""
    states = {name: measurement.state_dict() for name, measurement in measurements.items()}
    save_file({f"{name}/{key}": value.cpu() for name, state in states.items() for key, value in state.items()}, path)


def load_measurements(path: str | os.PathLike[str]) -> dict[str, Measurement]:
    """Read what `save_measurements` wrote."""
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, value in load_file(path).items():
        name, key = full_name.rsplit("/", 1)
        states.setdefault(name, {})[key] = value
    return {name: Measurement.from_state_dict(state) for name, state in states.items()}


# ---- views of earlier layers ----


@dataclass
class Extraction:
    """Images through one model: classifier inputs ``(N, D)``, outputs ``(N, C)``, and views, ``(N, d)``, by label."""

    features: Tensor
    logits: Tensor
    views: dict[str, Tensor] = field(default_factory=dict)


def find_layers(
    model: PreTrainedModel, pixel_values: Tensor, max_layers: int, head_module: str | None = None
) -> list[Layer]:
    """The layers to probe, in their order: what enters blocks, every stage's output, ReLUs' input, hidden units."""
    # A stage ends where the resolution changes; where it never does (ViT), every block is one. A dead ReLU hides what
    # enters it from all that follows, and an attacker has only to look there: at the first one up to the end of each
    # stage, before which nothing of the stage is hidden, and at the last.
    try:
        blocks = block_modules(model, head_module)
    except ScopeError:
        return []
    wanted = [Layer(next(iter(blocks)), True, ()), *(Layer(name, False, ()) for name in blocks)]
    relus = [Layer(name, True, ()) for name, module in model.named_modules() if isinstance(module, RELUS)]
    inner = {name: _hidden_units(name, block) for name, block in blocks.items()}
    head = find_head(model, head_module)[1]
    # Two images tell what is of an image from what is of the network, such as biases of positions.
    two = {"pixel_values": pixel_values[:1].repeat(2, 1, 1, 1)}
    every = {*wanted, *relus, *(unit for units in inner.values() for unit in units)}
    (batch,) = run_batches(model, head, [two], layers=every)
    passed = {layer: value for layer, value in batch.layers.items() if value.dim() in (3, 4) and len(value) == 2}
    shapes = {layer: tuple(value.shape[1:]) for layer, value in passed.items()}
    found = [layer for layer in wanted if layer in shapes]
    # (C, h, w) or (T, C): what changes between stages is the grid.
    grids = [shapes[layer][1:] if len(shapes[layer]) == 3 else shapes[layer][:1] for layer in found]
    ends = [i for i in range(len(found)) if i + 1 == len(found) or grids[i] != grids[i + 1]]
    if len(ends) > 1:
        found = [found[i] for i in ends]
    if len(found) > max_layers:
        chosen = np.unique(np.linspace(0, len(found) - 1, max_layers).round().astype(int))
        found = [found[i] for i in chosen]
    found = _with_relus(found, [layer for layer in shapes if not layer.inner], set(relus))
    units = [[unit for unit in inner.get(layer.name, []) if unit in shapes] for layer in found if not layer.before]
    read = {*found, *(one[-1] for one in units if one)}
    return [replace(layer, shape=shape) for layer, shape in shapes.items() if layer in read]


def _hidden_units(name: str, block: nn.Module) -> list[Layer]:
    """What enters the linear layers of a block that narrow, hidden units as they are used; what narrows most last."""
    linear = [(part, one) for part, one in block.named_modules() if isinstance(one, nn.Linear)]
    linear = [(part, one) for part, one in linear if one.in_features > one.out_features]
    linear.sort(key=lambda named: named[1].in_features / named[1].out_features)
    return [Layer(f"{name}.{part}", True, (), inner=True) for part, _ in linear]


def _with_relus(found: list[Layer], passed: list[Layer], relus: set[Layer]) -> list[Layer]:
    """Layers found, with the first and the last ReLU before each and after all; in the order of the pass."""
    chosen: list[Layer] = []
    between: list[Layer] = []
    for layer in passed:
        if layer in relus:
            between.append(layer)
        if layer in found:
            chosen += [*between[:1], *between[-1:], layer]
            between = []
    return list(dict.fromkeys([*chosen, *between[:1], *between[-1:]])) if found else found


def choose_views(
    layers: list[Layer], rows: int, limit: int, memory: int, flattened: bool
) -> tuple[list[tuple[Layer, str]], dict[str, str]]:
    """Which layers are read in which form, within the memory there is; and for those left out a sentence why."""
    # The limit bounds the values per image of a flattened layer, the memory the bytes of all views; deep layers first.
    chosen = [(layer, "pooled") for layer in layers]
    left_out = {}
    # The dual form's matrices, N × N in float64, and one working copy.
    spent = 24 * rows * rows
    for layer in reversed([layer for layer in layers if flattened and not layer.inner]):
        need = 4 * rows * layer.entries
        if layer.entries > limit:
            left_out[layer.label("flattened")] = (
                f"{layer.entries:,} values per image, more than the preset's {limit:,}; choose a larger preset."
            )
        elif spent + need > memory:
            left_out[layer.label("flattened")] = (
                f"needs {need / 2**30:.1f} GiB in addition to the {spent / 2**30:.1f} GiB already kept, of "
                f"{memory / 2**30:.1f} GiB there are; use fewer images or a larger machine."
            )
        else:
            spent += need
            chosen.append((layer, "flattened"))
    # Chosen from the end, read in the network's order.
    return sorted(chosen, key=lambda view: (view[1] != "pooled", layers.index(view[0]))), left_out


def extract_views(
    model: PreTrainedModel, batches: Iterable[Tensor], views: list[tuple[Layer, str]], head_module: str | None = None
) -> Extraction:
    """Run a model over pixel values once, and read all views; on the CPU, in float32 at least."""
    head = find_head(model, head_module)[1]
    layers = dict.fromkeys(layer for layer, _ in views)
    parts: dict[str, list[Tensor]] = {"features": [], "logits": []}
    for batch in run_batches(model, head, ({"pixel_values": pixels} for pixels in batches), layers=layers):
        parts["features"].append(_host(batch.features))
        parts["logits"].append(_host(batch.logits))
        for layer, view in views:
            value = batch.layers[layer]
            if view == "flattened":
                value = value.flatten(1)
            elif layer.inner:
                value = value.flatten(1, -2).mean(dim=1)
            else:
                value = value.mean(dim=(2, 3)) if value.dim() == 4 else value.mean(dim=1)
            parts.setdefault(layer.label(view), []).append(_host(value))
    # One at a time, so that no more than one is kept twice.
    joined = {name: torch.cat(parts.pop(name)) for name in list(parts)}
    return Extraction(joined.pop("features"), joined.pop("logits"), joined)


def _host(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return value if value.dtype == torch.float64 else value.float()


def dual_coordinates(Z: Tensor, Z_test: Tensor, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """Features in an orthonormal basis of the training rows' span, in float64: at most N coordinates in place of D."""
    # K = ZZᵀ = QΛQᵀ gives Z = QΛ^½·Bᵀ with orthonormal B, so any probe that commutes with rotations and starts at zero
    # (ridge, gradient descent, L-BFGS with a penalty on ‖W‖²) finds the same scores on QΛ^½ and K_test QΛ^-½.
    # Directions below 1e-8 of the largest are lost to the square.
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
