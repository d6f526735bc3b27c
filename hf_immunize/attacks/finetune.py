"""Attackers with the weights: they fine-tune a part with a new head, or put the public starting weights back."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, skip_init

from hf_immunize.attacks.attacker import (
    Attacker,
    Found,
    Part,
    ProbeBudget,
    ProbeData,
    TuningBudget,
    accuracy,
    best_index,
    decompose,
    log_steps,
    stratified_split,
)
from hf_immunize.attacks.probes import half_cosine, minibatches, ridge, ridge_head
from hf_immunize.errors import DataError
from hf_immunize.features.extract import pass_size
from hf_immunize.vision.head import fast_layout, find_head, penultimate_features
from hf_immunize.vision.loading import can_copy, random_copy
from hf_immunize.vision.relu import RELUS
from hf_immunize.vision.scope import block_modules, last_stage


if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Setting(NamedTuple):
    """What the attacker tunes."""

    optimizer: str
    learning_rate: float
    batch_statistics: bool = False


_OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
}


def fine_tune(
    attacker: str,
    model: PreTrainedModel,
    data: Part,
    budget: TuningBudget,
    seed: int,
    head_module: str | None = None,
    chosen: dict[str, Any] | None = None,
) -> Found:
    """Fine-tune a copy of a model with a new head, by the best of the settings, or by those of an earlier seed."""
    # Each setting is tried on four fifths of the training images and compared on the rest; the best one then runs on
    # all of them. Dropout is off and BatchNorm keeps its statistics; the best is also tried with those of the batch.
    if chosen is not None:
        setting, trials = Setting(*(chosen[name] for name in Setting._fields)), 1
    else:
        found, trials, note = _choose(attacker, model, data, budget, seed, head_module)
        if found is None:
            return Found(None, trials=trials, status="diverged", note=note)
        setting = found
    when = log_steps(budget.steps, max(1, round(budget.evaluations / math.log10(max(budget.steps, 10)))))
    # What begins with a head that reads is measured before its first step too.
    when = [0, *when] if attacker in _FROM_RIDGE else when
    attacked = prepare(model, attacker, data, seed, head_module)
    curve, steps, note = _train(attacked, data, setting, when, budget.batch_size, seed)
    size = min(budget.batch_size, len(data.y))
    settings = setting._asdict() | {"steps": steps[-1] if steps else 0, "batch_size": size}
    return Found(None if note else curve[-1], steps, curve, settings, trials, "diverged" if note else "done", note)


def _choose(
    attacker: str, model: PreTrainedModel, data: Part, budget: TuningBudget, seed: int, head_module: str | None
) -> tuple[Setting | None, int, str]:
    """The best of the settings, how many were tried, and what to say where all of them diverge."""
    fit, validation = stratified_split(data.y, 0.2, seed)
    validation = validation[: budget.max_test_images]
    part = Part(data.Z[fit], data.y[fit], data.Z[validation], data.y[validation], data.num_classes)
    start = prepare(model, attacker, part, seed, head_module)  # which may take a pass over all images

    def attempt(setting: Setting) -> tuple[list[float], list[int], str]:
        return _train(copy.deepcopy(start), part, setting, [budget.trial_steps], budget.batch_size, seed)

    grid = [Setting(name, rate) for name, rates in budget.optimizers.items() for rate in rates]
    tried = [attempt(one) for one in grid]
    sound = [index for index, (_, _, note) in enumerate(tried) if not note]
    if not sound:
        return None, len(grid), f"with every setting; the first: {tried[0][2]}"
    best = sound[best_index([tried[index][0][-1] for index in sound])]
    if not _has_batchnorm(model):
        return grid[best], len(grid), ""
    other = grid[best]._replace(batch_statistics=True)
    curve, _, note = attempt(other)
    better = not note and curve[-1] > tried[best][0][-1]
    return (other if better else grid[best]), len(grid) + 1, ""


def prepare(
    model: PreTrainedModel, attacker: str, part: Part, seed: int, head_module: str | None = None
) -> PreTrainedModel:
    """A copy in eval mode with a new head, in which the attacker's parameters and no others take gradients."""
    num_classes = part.num_classes
    head_name, old = find_head(model, head_module)
    rank = int(attacker.removeprefix("lora_r")) if attacker.startswith("lora_r") else 0
    attacked = copy.deepcopy(model).float().eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(old.in_features, num_classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        _put(attacked, head_name, head.to(next(attacked.parameters()).device))
        if rank:
            attacked = _with_adapters(attacked, rank, head_name)
    if attacker in _STARTS:
        _STARTS[attacker](attacked, head_name, part, seed)
    attacked.config.num_labels = num_classes
    names = [name for name, _ in attacked.named_parameters()]
    choose = _TRAINABLE.get(attacker, lambda *_: {name for name in names if "lora_" in name})
    trainable = choose(attacked, head_name, names)
    for name, parameter in attacked.named_parameters():
        parameter.requires_grad_(name in trainable or name.startswith(f"{head_name}."))
    return attacked


_TRAINABLE: dict[str, Any] = {
    "last_stage": lambda model, head_name, names: set(last_stage(model, head_name)),
    "whole_network": lambda model, head_name, names: set(names),
    "bias_only": lambda model, head_name, names: {name for name in names if name.endswith("bias")},
    **dict.fromkeys(
        ("ridge_start", "reinitialized", "leaky", "whitened", "every_block", "rebalanced"),
        lambda model, head_name, names: set(names),
    ),
    "visual_prompt": lambda model, head_name, names: {"prompt"},
}


@torch.no_grad()
def features_of(model: PreTrainedModel, pixels: Tensor, head_name: str) -> Tensor:
    """The classifier's input for pixel values, ``(n, D)``, on the CPU."""
    device = next(model.parameters()).device
    parts = pixels.split(pass_size(model))
    return torch.cat([penultimate_features(model, rows.to(device), head_name).cpu() for rows in parts])


# ---- where it begins

# One-hot targets, as least squares fits them, times this are logits of a sure softmax.
_SURE = 10.0
# A side of the prompt at most, stretched to the image's, and by how much a step moves it more than a weight.
_PROMPT, _GAIN = 32, 10.0


@torch.no_grad()
def _from_ridge(model: PreTrainedModel, head_name: str, part: Part, seed: int) -> None:
    """The head is the ridge solution, so that no step is spent on finding it (Kumar et al., ICLR 2022)."""
    _solve(model.get_submodule(head_name), features_of(model, part.Z, head_name), part, seed)


def _solve(head: Any, Z: Tensor, part: Part, seed: int) -> None:
    weight, bias = ridge_head(ProbeData(Z, part.y, Z[:1], part.y[:1], part.num_classes), seed)
    head.weight.copy_(_SURE * weight)
    head.bias.copy_(_SURE * bias)


@torch.no_grad()
def _draw_anew(model: PreTrainedModel, head_name: str, part: Part, seed: int) -> None:
    """The last stage is drawn anew: what was hidden there is gone with it."""
    names = [name for name in last_stage(model, head_name) if not name.startswith(f"{head_name}.")]
    inside, fresh = {name.rpartition(".")[0] for name in names}, random_copy(model, seed).state_dict()
    for name, value in model.state_dict().items():
        if name.rpartition(".")[0] in inside:
            value.copy_(fresh[name])


def _with_prompt(model: PreTrainedModel, head_name: str, part: Part, seed: int) -> None:
    """Pixels, the same for all images, that are added to each (Bahng et al., 2022); at most 3,072 of three colours."""
    channels, *sides = part.Z.shape[1:]
    prompt = nn.Parameter(torch.zeros(1, channels, *(min(_PROMPT, side) for side in sides)))
    model.register_parameter("prompt", nn.Parameter(prompt.to(next(model.parameters()).device)))

    # The prompt of the module that runs, which may be a copy of this one.
    def add(one: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        stretched = torch.nn.functional.interpolate(one.prompt, tuple(sides), mode="bilinear")
        return inputs, named | {"pixel_values": named["pixel_values"] + _GAIN * stretched}

    model.register_forward_pre_hook(add, with_kwargs=True)


def _leak(model: PreTrainedModel, head_name: str, part: Part, seed: int) -> None:
    """Every ReLU passes a tenth of what it stopped, gradients too: none is dead."""
    for name, module in list(model.named_modules()):
        if isinstance(module, RELUS):
            _put(model, name, nn.LeakyReLU(0.1))
    _from_ridge(model, head_name, part, seed)


class _AllBlocks(nn.Module):
    """The classifier's input, and what every block gives, averaged over places: what an earlier block knows."""

    def __init__(self, model: PreTrainedModel, head_name: str) -> None:
        super().__init__()
        self._found: dict[str, Tensor] = {}
        for name, block in block_modules(model, head_name).items():
            block.register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, block: nn.Module, inputs: Any, output: Any) -> None:
        value = output if isinstance(output, Tensor) else output[0]
        self._found[name] = value.flatten(2).mean(dim=2) if value.ndim == 4 else value.mean(dim=1)

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([*self._found.values(), features], dim=1)


# Of the largest standard deviation: what lies below may be nothing but rounding.
_LEAST_SPREAD = 1e-3
# Over rows and columns, of which a few suffice where no factor hides anything.
_PASSES = 20


@torch.no_grad()
def _whiten(model: PreTrainedModel, head_name: str, part: Part, seed: int, every_block: bool = False) -> None:
    """All directions get the same variance on the harmful images before the head reads them, shrunk ones too."""
    # To read every block at once follows Evci et al. (Head2Toe, ICML 2022).
    first = _AllBlocks(model, head_name) if every_block else nn.Identity()
    _put(model, head_name, first)  # so that the model gives what the head will be given
    device = next(model.parameters()).device
    parts = (model(pixel_values=fast_layout(model, rows.to(device))).logits for rows in part.Z.split(pass_size(model)))
    Z = torch.cat([rows.cpu() for rows in parts]).double()
    mean, (_, s, V) = Z.mean(dim=0), decompose(Z - Z.mean(dim=0))
    s, V = (s, V) if len(s) else (Z.new_ones(1), Z.new_zeros(Z.shape[1], 1))  # where nothing varies
    scale = V / (s + _LEAST_SPREAD * s[:1]) * len(Z) ** 0.5
    whiten, head = (skip_init(nn.Linear, *sizes) for sizes in (scale.shape, (len(s), part.num_classes)))
    whiten.weight.copy_(scale.mT)
    whiten.bias.copy_(-mean @ scale)
    _solve(head, (Z - mean) @ scale, part, seed)
    _put(model, head_name, nn.Sequential(first, whiten, head).to(device))


class _Scaled(nn.Module):
    """A tensor as its scale times what is trained, so that a step has the scale's size; at 0 it stays 0."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, trained: Tensor) -> Tensor:
        return trained * self.scale

    def right_inverse(self, value: Tensor) -> Tensor:
        return value / _or_one(self.scale)


@torch.no_grad()
def _rebalance(model: PreTrainedModel, head_name: str, part: Part, seed: int) -> None:
    """Every parameter is trained on the scale of a fresh one, behind a whitening; the function stays what it is."""
    # Channels times 1,000 before a layer by 1,000 compute the same, and no usual step moves these or spares those.
    _whiten(model, head_name, part, seed)
    for owner, module in list(model.named_modules()):
        if owner != f"{head_name}.2":  # the new classifier
            for name, scale in _scales(module).items():
                parametrize.register_parametrization(module, name, _Scaled(scale))


def _scales(module: nn.Module) -> dict[str, Tensor]:
    """What divides a module's own parameters so that factors of channels are gone from them."""
    own = dict(module.named_parameters(recurse=False))
    if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        # Of a norm each channel for itself, with its bias.
        sizes = {name: value.abs() if value.ndim == 1 else _size(value) for name, value in own.items()}
        sizes |= {"bias": sizes["weight"]} if {"weight", "bias"} <= own.keys() else {}
        return sizes
    # Rows and columns of a matrix alike (Sinkhorn); a fresh one has variance 1 / inputs (LeCun et al., 1998).
    squares = module.weight.cpu().flatten(1).double().square()  # which not every accelerator has
    rows, columns = squares.new_ones(len(squares), 1), squares.new_ones(1, squares.shape[1])
    for _ in range(_PASSES):
        rows = _or_one((squares / columns**2).mean(dim=1, keepdim=True).sqrt())
        columns = _or_one((squares / rows**2).mean(dim=0, keepdim=True).sqrt())
    found = {"weight": (rows * columns).view_as(module.weight) * squares.shape[1] ** 0.5}
    if module.bias is not None:
        found["bias"] = rows[:, 0] * _size(module.bias.cpu() / rows[:, 0])
    return {name: scale.to(module.weight) for name, scale in found.items()}


def _size(value: Tensor) -> Tensor:
    return value.square().mean().sqrt()


def _or_one(sizes: Tensor) -> Tensor:
    return torch.where(sizes > 0, sizes, torch.ones_like(sizes))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


_STARTS: dict[str, Any] = {
    "ridge_start": _from_ridge,
    "reinitialized": _draw_anew,
    "visual_prompt": _with_prompt,
    "leaky": _leak,
    "whitened": _whiten,
    "every_block": partial(_whiten, every_block=True),
    "rebalanced": _rebalance,
}
# Measured before their first step too: their head reads at once.
_FROM_RIDGE = ("ridge_start", "leaky", "whitened", "every_block", "rebalanced")


def _with_adapters(model: Any, rank: int, head_name: str) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    # An adapter of a grouped convolution would need a rank that its groups divide.
    fits = {
        name: isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        for name, module in model.named_modules()
    }
    targets = [name for name, fit in fits.items() if fit and name != head_name]
    return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)


def _train(
    model: PreTrainedModel, part: Part, setting: Setting, when: list[int], batch_size: int, seed: int
) -> tuple[list[float], list[int], str]:
    """Accuracy at the given steps, of which the last is the end; those steps; and why it ended early, if it did."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _OPTIMIZERS[setting.optimizer](trainable, lr=setting.learning_rate)
    norms = [one for one in model.modules() if isinstance(one, _BatchNorm)] if setting.batch_statistics else []
    device = next(model.parameters()).device
    curve = [_measure(model, part, norms)] if 0 in when else []
    steps = [0] if 0 in when else []
    for step, rows in enumerate(minibatches(len(part.y), batch_size, when[-1], seed), start=1):
        optimizer.param_groups[0]["lr"] = setting.learning_rate * half_cosine((step - 1) / when[-1])
        for norm in norms:
            norm.train(len(rows) > 1)
        logits = model(pixel_values=fast_layout(model, part.Z[rows].to(device))).logits
        loss = torch.nn.functional.cross_entropy(logits, part.y[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            return curve, steps, f"the loss was {value} at step {step}"
        if step in when:
            steps.append(step)
            curve.append(_measure(model, part, norms))
    return curve, steps, ""


@torch.no_grad()
def _measure(model: PreTrainedModel, part: Part, norms: list[_BatchNorm]) -> float:
    for norm in norms:
        norm.eval()
    device = next(model.parameters()).device
    scores = [
        model(pixel_values=fast_layout(model, rows.to(device))).logits.cpu()
        for rows in part.Z_test.split(pass_size(model))
    ]
    return accuracy(torch.cat(scores), part.y_test)


# ---- statistics and weights put in, without a step


def reestimate(
    model: PreTrainedModel,
    data: Part,
    budget: TuningBudget,
    seed: int,
    head_module: str | None = None,
    chosen: dict[str, Any] | None = None,
) -> Found:
    """BatchNorm takes the statistics of the harmful images, then ridge: what frozen statistics hid is seen again."""
    head_name, _ = find_head(model, head_module)
    attacked = copy.deepcopy(model).float().eval()
    take_statistics(attacked, data.Z, seed)
    Z, Z_test = (features_of(attacked, pixels, head_name) for pixels in (data.Z, data.Z_test))
    return ridge(ProbeData(Z, data.y, Z_test, data.y_test, data.num_classes), ProbeBudget(), seed)


@torch.no_grad()
def take_statistics(model: nn.Module, pixels: Tensor, seed: int) -> None:
    """BatchNorm takes its statistics from one pass over pixel values, their mean over batches."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    device = next(model.parameters()).device
    for rows in minibatches(len(pixels), 64, -(-len(pixels) // 64), seed) if norms else []:
        model(pixel_values=fast_layout(model, pixels[rows].to(device)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _has_batchnorm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def _has_relus(model: nn.Module) -> bool:
    return any(isinstance(module, RELUS) for module in model.modules())


def changed_parameters(model: PreTrainedModel, reference: PreTrainedModel) -> list[str]:
    """Names of the parameters and buffers in which two checkpoints of one architecture differ."""
    ours, theirs = model.state_dict(), reference.state_dict()
    shared = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    # A new head is no other backbone.
    if len(shared) < len(ours) - 2:
        odd = [name for name in {**ours, **theirs} if name not in set(shared)]
        raise DataError(
            f"Expected a reference of the same architecture, found other names or shapes of {len(odd)} tensors, first "
            f"{odd[0]!r}. Give the weights that the immunization started from."
        )
    return [name for name in shared if not torch.equal(ours[name].cpu(), theirs[name].cpu().to(ours[name].dtype))]


# ---- the list


def _tuning(name: str, label: str, where: str, preset: str) -> Attacker:
    run = partial(fine_tune, name)
    return Attacker(name, label, "fine_tuning", False, run, preset, f"{where} and a new head")


def _adapters(rank: int, preset: str = "full") -> Attacker:
    return _tuning(f"lora_r{rank}", f"LoRA of rank {rank}", "low-rank adapters", preset)


ATTACKERS = (
    _tuning("last_stage", "fine-tuning of the last stage", "last stage", "quick"),
    _tuning("whole_network", "fine-tuning of the whole network", "whole network", "quick"),
    _tuning("bias_only", "fine-tuning of the biases", "biases", "standard"),
    _adapters(2),
    _adapters(8, "quick"),
    _adapters(32),
    _tuning("ridge_start", "fine-tuning from the ridge solution", "whole network", "quick"),
    replace(
        _tuning("reinitialized", "fine-tuning with the last stage drawn anew", "whole network", "standard"),
        applies=can_copy,
    ),
    replace(
        _tuning("leaky", "fine-tuning with leaky activations", "whole network, its ReLUs made leaky,", "standard"),
        applies=_has_relus,
    ),
    _tuning("whitened", "fine-tuning behind a whitening", "whole network, a whitening of its features", "standard"),
    _tuning("every_block", "fine-tuning of what every block gives", "whole network, a head on all blocks", "standard"),
    _tuning(
        "rebalanced", "fine-tuning with rebalanced weights", "whole network, its weights on one scale,", "standard"
    ),
    _tuning("visual_prompt", "a visual prompt", "pixels added to every image", "standard"),
    Attacker(
        "batchnorm_ridge",
        "ridge after BatchNorm with statistics of the harmful images",
        "fine_tuning",
        True,
        reestimate,
        "quick",
        "statistics of BatchNorm and a new head",
        applies=_has_batchnorm,
    ),
    # With the public weights back, the features are the reference's.
    Attacker("restore_swap", "restoring the public weights", "fine_tuning", True, ridge, "quick", restores=True),
)
