"""Attackers with the weights: they fine-tune a part with a new head, or mix the public starting weights back in."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_immunize.attacks.attacker import Attacker, Found, ProbeBudget, TuningBudget
from hf_immunize.attacks.descent import Clock, half_cosine, minibatches
from hf_immunize.attacks.direct import ridge
from hf_immunize.attacks.probe_data import Part, ProbeData, accuracy, best_index, log_steps, stratified_split
from hf_immunize.errors import ArgumentError, DataError, HeadError, TrunkError
from hf_immunize.features.extract import pass_size
from hf_immunize.features.trunk import TrunkSplit, split_trunk
from hf_immunize.vision.head import find_head
from hf_immunize.vision.scope import last_stage


if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Setting(NamedTuple):
    """What the attacker tunes."""

    optimizer: str
    learning_rate: float
    batch_statistics: bool = False


_DEFAULT_OPTIMIZERS: dict[str, tuple[float, ...]] = {"adamw": (3e-4,), "sgd": (1e-2,)}
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
    fit, validation = stratified_split(data.y, 0.2, seed)
    validation = validation[: budget.max_test_images]
    optimizers = budget.optimizers or _DEFAULT_OPTIMIZERS
    grid = [Setting(name, rate) for name, rates in optimizers.items() for rate in rates]
    has_statistics = any(isinstance(module, _BatchNorm) for module in model.modules())

    copied = partial(prepare, model, attacker, data.num_classes, seed, head_module)

    @cache
    def frozen() -> tuple[TrunkSplit, Part] | None:
        return frozen_part(copied(), data, find_head(model, head_module)[0])

    def attempt(setting: Setting, final: bool) -> tuple[list[float], list[int], str]:
        attacked = copied()
        # With the statistics of the batch the frozen part is no fixed function of an image.
        stored = frozen() if attacker == "last_stage" and not setting.batch_statistics else None
        split, part = stored or (None, data)
        if not final:
            part = Part(part.Z[fit], part.y[fit], part.Z[validation], part.y[validation], part.num_classes)
        seconds = None if budget.seconds is None else budget.seconds / 2
        if final:
            clock = Clock(budget.steps, seconds)
            per_decade = max(1, round(budget.evaluations / math.log10(max(budget.steps, 10))))
            when = log_steps(budget.steps, per_decade)
        else:
            clock = Clock(budget.trial_steps, None if seconds is None else seconds / (len(grid) + has_statistics))
            when = [budget.trial_steps]
        with split.replayed(attacked) if split else nullcontext():
            return _train(attacked, part, setting, when, clock, budget.batch_size, seed)

    trials = 1
    if chosen is not None:
        setting = Setting(*(chosen[name] for name in Setting._fields))
    else:
        tried = [attempt(one, final=False) for one in grid]
        sound = [index for index, (_, _, note) in enumerate(tried) if not note]
        trials = len(grid)
        if not sound:
            return Found(None, trials=trials, status="diverged", note=f"with every setting; the first: {tried[0][2]}")
        best = sound[best_index([tried[index][0][-1] for index in sound])]
        setting = grid[best]
        if has_statistics:
            trials += 1
            other = setting._replace(batch_statistics=True)
            curve, _, note = attempt(other, final=False)
            setting = other if not note and curve[-1] > tried[best][0][-1] else setting
    curve, steps, note = attempt(setting, final=True)
    size = min(budget.batch_size, len(data.y))
    settings = setting._asdict() | {"steps": steps[-1] if steps else 0, "batch_size": size}
    return Found(None if note else curve[-1], steps, curve, settings, trials, "diverged" if note else "done", note)


def prepare(
    model: PreTrainedModel, attacker: str, num_classes: int, seed: int, head_module: str | None = None
) -> PreTrainedModel:
    """A copy in eval mode with a new head, in which the attacker's parameters and no others take gradients."""
    head_name, old = find_head(model, head_module)
    rank = int(attacker.removeprefix("lora_r")) if attacker.startswith("lora_r") else 0
    if not rank and attacker not in _TRAINABLE:
        raise ArgumentError(f"Expected one of {', '.join(_TRAINABLE)} or lora_r<rank>, found {attacker!r}.")
    attacked = copy.deepcopy(model).float().eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(old.in_features, num_classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        parent, _, leaf = head_name.rpartition(".")
        setattr(attacked.get_submodule(parent), leaf, head.to(next(attacked.parameters()).device))
        if rank:
            attacked = _with_adapters(attacked, rank, head_name)
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
}


def _with_adapters(model: Any, rank: int, head_name: str) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    # An adapter of a grouped convolution would need a rank that its groups divide.
    fits = {
        name: isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        for name, module in model.named_modules()
    }
    targets = [name for name, fit in fits.items() if fit and name != head_name]
    return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)


def frozen_part(model: PreTrainedModel, data: Part, head_module: str) -> tuple[TrunkSplit, Part] | None:
    """Where the frozen part ends and its activations, or None: no such part, or larger than twice the images."""
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    shape = tuple(data.Z.shape[1:])
    try:
        # In these attacks every module stays in eval mode.
        split = split_trunk(model, trainable, shape, eval_modules=list(model.modules()), head_module=head_module)
    except (TrunkError, HeadError):
        return None
    if torch.Size(split.activation_shape).numel() > 2 * torch.Size(shape).numel():
        return None
    device, size = next(model.parameters()).device, pass_size(model)

    def through(pixels: Tensor) -> Tensor:
        return torch.cat([split.activations(model, part.to(device)).cpu() for part in pixels.split(size)])

    return split, Part(through(data.Z), data.y, through(data.Z_test), data.y_test, data.num_classes)


def _train(
    model: PreTrainedModel, part: Part, setting: Setting, when: list[int], clock: Clock, batch_size: int, seed: int
) -> tuple[list[float], list[int], str]:
    """Accuracy at the given steps, those steps, and why it ended early, if it did."""
    if setting.optimizer not in _OPTIMIZERS:
        raise ArgumentError(f"Expected an optimizer out of {', '.join(_OPTIMIZERS)}, found {setting.optimizer!r}.")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _OPTIMIZERS[setting.optimizer](trainable, lr=setting.learning_rate)
    norms = [one for one in model.modules() if isinstance(one, _BatchNorm)] if setting.batch_statistics else []
    device = next(model.parameters()).device
    curve: list[float] = []
    steps: list[int] = []
    for step, rows in enumerate(minibatches(len(part.y), batch_size, clock.steps, seed), start=1):
        optimizer.param_groups[0]["lr"] = setting.learning_rate * half_cosine(clock.progress(step - 1))
        for norm in norms:
            norm.train(len(rows) > 1)
        logits = model(pixel_values=part.Z[rows].to(device)).logits
        loss = torch.nn.functional.cross_entropy(logits, part.y[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            return curve, steps, f"the loss was {value} at step {step}"
        ended = clock.over(step)
        if step in when or ended:
            steps.append(step)
            curve.append(_measure(model, part, norms))
        if ended:
            break
    return curve, steps, ""


@torch.no_grad()
def _measure(model: PreTrainedModel, part: Part, norms: list[_BatchNorm]) -> float:
    for norm in norms:
        norm.eval()
    device = next(model.parameters()).device
    scores = [model(pixel_values=rows.to(device)).logits.cpu() for rows in part.Z_test.split(pass_size(model))]
    return accuracy(torch.cat(scores), part.y_test)


# ---- restoring the public starting weights, wholly or in part


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


def interpolate(model: PreTrainedModel, reference: PreTrainedModel, share: float) -> PreTrainedModel:
    """A copy of the model whose weights are mixed with a share of the reference's: 0 none, 1 all."""
    restored = copy.deepcopy(model)
    state, theirs = restored.state_dict(), reference.state_dict()
    for name in changed_parameters(model, reference):
        ours = state[name]
        if ours.is_floating_point():
            mixed = (1 - share) * ours.double() + share * theirs[name].to(ours.device).double()
            state[name] = mixed.to(ours.dtype)
        elif share == 1:
            state[name] = theirs[name]
    restored.load_state_dict(state)
    return restored


def _best_share(candidates: dict[float, ProbeData], budget: ProbeBudget, seed: int) -> Found:
    """The ridge probe on the mixture of weights that validation prefers."""
    if not candidates:
        return Found(None, status="diverged", note="every mixture of the weights gave features that are not finite")
    found = {share: ridge(data, budget, seed) for share, data in candidates.items()}
    best = max(found, key=lambda share: found[share].validation or 0.0)
    settings = {"share_of_public_weights": best, **found[best].settings}
    return Found(found[best].accuracy, settings=settings, trials=sum(one.trials for one in found.values()))


# ---- the list


def _tuning(name: str, label: str, where: str, preset: str) -> Attacker:
    run = partial(fine_tune, name)
    return Attacker(name, label, "fine_tuning", False, run, preset, f"{where} and a new head")


def adapters(rank: int, preset: str = "full") -> Attacker:
    """Fine-tuning of low-rank adapters; any rank can be named."""
    return _tuning(f"lora_r{rank}", f"LoRA of rank {rank}", "low-rank adapters", preset)


def _restoring(name: str, label: str, *shares: float) -> Attacker:
    return Attacker(name, label, "fine_tuning", True, _best_share, "quick", shares=shares)


ATTACKERS = (
    _tuning("last_stage", "fine-tuning of the last stage", "last stage", "quick"),
    _tuning("whole_network", "fine-tuning of the whole network", "whole network", "quick"),
    _tuning("bias_only", "fine-tuning of the biases", "biases", "standard"),
    adapters(2),
    adapters(8, "quick"),
    adapters(32),
    _restoring("restore_swap", "restoring the public weights", 1.0),
    _restoring("restore_interpolation", "mixing the public weights back in", 0.5, 0.8),
)
