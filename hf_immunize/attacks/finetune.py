"""Fine-tuning attackers: the last stage, the whole network, its biases, or low-rank adapters, with a new head."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_immunize.attacks.descent import Clock, half_cosine, minibatches
from hf_immunize.attacks.presets import TuningBudget
from hf_immunize.attacks.probe_data import Finding, accuracy, best_index, log_steps, stratified_split
from hf_immunize.errors import ArgumentError, HeadError, TrunkError
from hf_immunize.features.extract import pass_size
from hf_immunize.features.trunk import TrunkSplit, split_trunk
from hf_immunize.vision.head import find_head
from hf_immunize.vision.scope import last_stage


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FrozenPart:
    """Where a model's frozen part ends, and what it gives for the images of an attack.

    Attributes:
        split: Where it ends.
        train: Its activations for the training images, ``(N, …)``.
        test: The same for the test images.
    """

    split: TrunkSplit
    train: Tensor
    test: Tensor

    def replayed(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within, the model takes activations as its pixel values, and computes what moves alone."""
        return self.split.replayed(model)


def frozen_part(
    model: PreTrainedModel, train: Tensor, test: Tensor, head_module: str | None = None
) -> FrozenPart | None:
    """Compute the frozen part of a model for all images.

    Args:
        model: Prepared for the attack, in eval mode: what moves takes gradients.
        train: Pixel values to learn from, ``(N, C, H, W)``.
        test: Pixel values to measure on.
        head_module: The classifier's name.

    Returns:
        The frozen part; None where the model has none, or where its activations are larger than twice the images.
    """
    moving = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    shape = tuple(train.shape[1:])
    try:
        # In these attacks every module stays in eval mode.
        split = split_trunk(model, moving, shape, eval_modules=list(model.modules()), head_module=head_module)
    except (TrunkError, HeadError):
        return None
    if torch.Size(split.activation_shape).numel() > 2 * torch.Size(shape).numel():
        return None
    device, size = next(model.parameters()).device, pass_size(model)

    def through(pixels: Tensor) -> Tensor:
        return torch.cat([split.activations(model, part.to(device)).cpu() for part in pixels.split(size)])

    return FrozenPart(split, through(train), through(test))


_DEFAULT_OPTIMIZERS: dict[str, tuple[float, ...]] = {"adamw": (3e-4,), "sgd": (1e-2,)}


def fine_tune(
    model: PreTrainedModel,
    attacker: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    num_classes: int,
    seed: int,
    budget: TuningBudget,
    head_module: str | None = None,
    chosen: dict[str, Any] | None = None,
) -> Finding:
    """Fine-tune a copy of a model on a task with a new head, after trying optimizers and learning rates.

    Every setting is tried for `TuningBudget.trial_steps` on four fifths of the training images and compared on the
    rest; the best one then runs for `TuningBudget.steps` on all of them. Dropout is off and BatchNorm keeps its
    statistics, save that the best setting is also tried with the statistics of the batch. Gradients are clipped at
    norm 1, the learning rate follows a cosine. Where `TuningBudget.seconds` limits the time, every setting still gets
    its share of the search, and each run ends earlier, its rate at zero.

    Args:
        model: The model; it is left as it is.
        attacker: "last_stage", "whole_network", "bias_only" or "lora_r<rank>".
        train: Pixel values ``(N, C, H, W)`` and class numbers ``(N,)``.
        test: The same to measure on.
        num_classes: Number of classes.
        seed: Draws the head, the adapters, the batches and the split.
        budget: Steps, grid and sizes.
        head_module: The classifier's name, where it cannot be found without help.
        chosen: `Finding.settings` of an earlier seed, to be used without trying others.

    Returns:
        The finding; its curve is measured on the test images.

    Raises:
        ArgumentError: If there is no such attacker.
    """
    pixels, labels = train
    fit, validation = stratified_split(labels, 0.2, seed)
    validation = validation[: budget.max_test_images]
    grid = [(name, rate) for name, rates in (budget.optimizers or _DEFAULT_OPTIMIZERS).items() for rate in rates]
    has_statistics = any(isinstance(module, _BatchNorm) for module in model.modules())

    def clock(final: bool) -> Clock:
        half = None if budget.seconds is None else budget.seconds / 2
        among = 1 if final else len(grid) + has_statistics
        return Clock(budget.steps if final else budget.trial_steps, None if half is None else half / among)

    @cache
    def frozen() -> FrozenPart | None:
        attacked = prepare(model, attacker, num_classes, seed, head_module)
        return frozen_part(attacked, pixels, test[0], find_head(model, head_module)[0])

    def attempt(setting: tuple[str, float], batch_statistics: bool, final: bool) -> tuple[list[float], list[int], str]:
        attacked = prepare(model, attacker, num_classes, seed, head_module)
        # With the statistics of the batch the frozen part is no fixed function of an image.
        part = frozen() if attacker == "last_stage" and not batch_statistics else None
        images, others = (pixels, test[0]) if part is None else (part.train, part.test)
        learn = (images, labels) if final else (images[fit], labels[fit])
        measure = (others, test[1]) if final else (images[validation], labels[validation])
        count = budget.steps if final else budget.trial_steps
        when = log_steps(count, max(1, round(budget.evaluations / math.log10(max(count, 10))))) if final else [count]
        with nullcontext() if part is None else part.replayed(attacked):
            return _train(
                attacked, learn, measure, setting, batch_statistics, when, clock(final), budget.batch_size, seed
            )

    trials, batch_statistics = 1, False
    if chosen is not None:
        setting = (chosen["optimizer"], chosen["learning_rate"])
        batch_statistics = chosen["batch_statistics"]
    else:
        tried = [attempt(setting, False, False) for setting in grid]
        sound = [index for index, (_, _, note) in enumerate(tried) if not note]
        trials = len(grid)
        if not sound:
            note = f"with every setting; the first: {tried[0][2]}"
            return Finding(None, trials=trials, status="diverged", note=note)
        best = sound[best_index([tried[index][0][-1] for index in sound])]
        setting = grid[best]
        if has_statistics:
            trials += 1
            curve, _, note = attempt(setting, True, False)
            batch_statistics = not note and curve[-1] > tried[best][0][-1]
    curve, steps, note = attempt(setting, batch_statistics, True)
    settings = {
        "optimizer": setting[0],
        "learning_rate": setting[1],
        "batch_statistics": batch_statistics,
        "steps": steps[-1] if steps else 0,
        "batch_size": min(budget.batch_size, len(labels)),
    }
    if note:
        return Finding(None, steps, curve, settings, trials, "diverged", note)
    return Finding(curve[-1], steps, curve, settings, trials)


def prepare(
    model: PreTrainedModel, attacker: str, num_classes: int, seed: int, head_module: str | None = None
) -> PreTrainedModel:
    """A copy with a new head, in which the attacker's parameters and no others take gradients.

    Args:
        model: The model; it is left as it is.
        attacker: See `fine_tune`.
        num_classes: Outputs of the new head.
        seed: Draws the head and the adapters.
        head_module: The classifier's name, where it cannot be found without help.

    Returns:
        The copy, in eval mode.
    """
    head_name, old = find_head(model, head_module)
    attacked = copy.deepcopy(model).float().eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(old.in_features, num_classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        parent, _, leaf = head_name.rpartition(".")
        setattr(attacked.get_submodule(parent), leaf, head.to(next(attacked.parameters()).device))
        if attacker.startswith("lora_r"):
            attacked = _with_adapters(attacked, int(attacker.removeprefix("lora_r")), head_name)
    attacked.config.num_labels = num_classes
    choose = {
        "last_stage": lambda: set(last_stage(attacked, head_name)),
        "whole_network": lambda: {name for name, _ in attacked.named_parameters()},
        "bias_only": lambda: {name for name, _ in attacked.named_parameters() if name.endswith("bias")},
    }
    if attacker.startswith("lora_r"):
        moving = {name for name, _ in attacked.named_parameters() if "lora_" in name}
    elif attacker in choose:
        moving = choose[attacker]()
    else:
        raise ArgumentError(f"Expected one of {', '.join(choose)} or lora_r<rank>, found {attacker!r}.")
    for name, parameter in attacked.named_parameters():
        parameter.requires_grad_(name in moving or name.startswith(f"{head_name}."))
    return attacked


def _with_adapters(model: Any, rank: int, head_name: str) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    # An adapter of a grouped convolution would need a rank that its groups divide.
    targets = [
        name
        for name, module in model.named_modules()
        if name != head_name
        and (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
    ]
    return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)


def _train(
    model: PreTrainedModel,
    learn: tuple[Tensor, Tensor],
    measure: tuple[Tensor, Tensor],
    setting: tuple[str, float],
    batch_statistics: bool,
    when: list[int],
    clock: Clock,
    batch_size: int,
    seed: int,
) -> tuple[list[float], list[int], str]:
    """Accuracy at the given steps, those steps, and why it ended early, if it did."""
    kind, rate = setting
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer
    if kind == "sgd":
        optimizer = torch.optim.SGD(moving, lr=rate, momentum=0.9)
    else:
        makers: dict[str, Any] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
        if kind not in makers:
            raise ArgumentError(f"Expected an optimizer out of sgd, {', '.join(makers)}, found {kind!r}.")
        optimizer = makers[kind](moving, lr=rate)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)] if batch_statistics else []
    device = next(model.parameters()).device
    pixels, labels = learn
    curve: list[float] = []
    steps: list[int] = []
    for step, rows in enumerate(minibatches(len(labels), batch_size, clock.steps, seed), start=1):
        optimizer.param_groups[0]["lr"] = rate * half_cosine(clock.progress(step - 1))
        for norm in norms:
            norm.train(len(rows) > 1)
        logits = model(pixel_values=pixels[rows].to(device)).logits
        loss = torch.nn.functional.cross_entropy(logits, labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            return curve, steps, f"the loss was {value} at step {step}"
        ended = clock.over(step)
        if step in when or ended:
            steps.append(step)
            curve.append(measure_accuracy(model, *measure))
        if ended:
            break
    return curve, steps, ""


@torch.no_grad()
def measure_accuracy(model: PreTrainedModel, pixels: Tensor, labels: Tensor) -> float:
    """Accuracy of a classifier in eval mode, batch by batch."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    device = next(model.parameters()).device
    parts = pixels.split(pass_size(model))
    scores = [model(pixel_values=part.to(device)).logits.cpu() for part in parts]
    return accuracy(torch.cat(scores), labels)
