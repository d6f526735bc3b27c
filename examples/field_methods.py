"""Methods of the field against harmful fine-tuning, on the library's Trainer, data and budget of steps.

Each is a function (model, benign, harmful, processor, **arguments) that returns the model, as examples/benchmark.py
takes it; ``arguments`` are those of `ImmunizationArguments`. They follow what the papers say, in the setting of this
library (the attacker brings a head of his own), and are no port of their authors' code: a figure here is one of the
idea, not of the paper.
"""

import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForImageClassification, set_seed

from examples.distil_anew import Student
from examples.experiments.backbones import fit, pixels_of
from examples.experiments.methods import METHODS as LIBRARY
from examples.experiments.methods import TITLES
from examples.experiments.settings import load_settings
from hf_immunize.data.columns import find_columns
from hf_immunize.data.images import ImageCollator, ImageRows
from hf_immunize.data.views import to_distil_on
from hf_immunize.errors import ArgumentError
from hf_immunize.training.arguments import ImmunizationArguments, Method
from hf_immunize.training.distillation import feature_error
from hf_immunize.training.objectives import Objective, Side, Terms
from hf_immunize.training.step import ImmunizationStep, StepResult
from hf_immunize.training.trainer import ImmunizationTrainer
from hf_immunize.vision.head import HeadInput, in_eval_mode, outermost_name, penultimate_features
from hf_immunize.vision.loading import random_copy


Weights = dict[str, Tensor]

# Name to title and paper; the paper's four and our default are in the library.
PAPERS = {
    "undo": (
        "UNDO",
        "Lee et al., Distillation Robustifies Unlearning, NeurIPS 2025, arXiv:2506.06278; all weights move",
    ),
    "weight_distance": (
        "weight distance",
        "Siddiqui et al., From Dormant to Deleted: Tamper-Resistant Unlearning Through Weight-Space Regularization, "
        "NeurIPS 2025, arXiv:2505.22310; all weights move",
    ),
    "contraction": (
        "contraction (CLAMP)",
        "Sarker et al., Immunizing Models Against Harmful Long-Horizon Fine-Tuning via Contractive Optimization "
        "Dynamics, CVPR 2026; after its abstract alone",
    ),
    "sophon": (
        "SOPHON-like",
        "Deng et al., SOPHON: Non-Fine-Tunable Learning to Restrain Task Transferability For Pre-trained Models, IEEE "
        "S&P 2024, arXiv:2404.12699",
    ),
    "tar": (
        "TAR-like",
        "Tamirisa et al., Tamper-Resistant Safeguards for Open-Weight LLMs, ICLR 2025, arXiv:2408.00761",
    ),
    "leace": (
        "LEACE as target",
        "Belrose et al., LEACE: Perfect linear concept erasure in closed form, NeurIPS 2023, arXiv:2306.03819",
    ),
    **{name: (TITLES[name], "the library") for name in ("default", "concentration", "dead_relu")},
    **{
        name: (TITLES[name], "Zheng et al., ICML 2025, arXiv:2505.23760, with its recipe")
        for name in ("kappa", "r_ill", "opt_kappa", "imma")
    },
    "redistilled": (
        "distilled anew",
        "Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531; a fresh network learns labels "
        "and the start's outputs on the benign images alone, as UNDO does where noise replaces all weights",
    ),
    "retrained": ("retrained", "the same network trained anew on the benign images alone, with the start's recipe"),
    "rescaled": ("rescaled weights", "a check of attackers: the same function by other weights, 0 % by definition"),
    "unchanged": ("unchanged", "the starting model itself: 0 % by definition"),
}


# ---- what they share ----


class FieldTrainer(ImmunizationTrainer):
    """The library's Trainer with a step of one's own."""

    def __init__(self, make_step: Callable[..., ImmunizationStep], *given: Any, **options: Any) -> None:
        self._make_step = make_step
        super().__init__(*given, **options)

    def create_step(self, model: Any) -> ImmunizationStep:
        """The step of the method."""
        options = {"freeze_batchnorm": self.args.freeze_batchnorm, "head_module": self.args.head_module}
        return self._make_step(model, Method.of(self.args), moving=self._moving, **options)


def train(
    make_step: Callable[..., ImmunizationStep],
    model: Any,
    benign: Any,
    harmful: Any,
    processor: Any,
    *,
    before: Callable[[Any], None] = lambda model: None,
    distillation: Any = None,
    **arguments: Any,
) -> Any:
    """The model after training; ``before`` changes it once the step knows it as it was, which it distils from."""
    rows = ImageRows(harmful, "harmful images", *find_columns(harmful))  # with labels, whatever the objective's name
    with tempfile.TemporaryDirectory() as folder:
        # A Trainer seeds everything with its own seed: the one that the caller set.
        given = {"report_to": "none", "save_strategy": "no", "seed": torch.initial_seed() % 2**32, **arguments}
        args = ImmunizationArguments(folder, **given)
        if distillation is None:
            distillation = to_distil_on(None, benign, distils=args.benign_loss != "task", seed=args.seed)
        elif args.benign_loss == "task":
            distillation = None
        data = {"train_dataset": benign, "harmful_dataset": rows, "distillation_dataset": distillation}
        trainer = FieldTrainer(make_step, model, args, **data, processing_class=processor)
        before(trainer.model)
        trainer.train()
        return trainer.model.eval()


class _Labelled(Objective):
    """Stands for terms that a step computes itself: they need rows of all harmful images with their labels."""

    needs_harmful_labels = needs_rows = True


class FieldStep(ImmunizationStep):
    """The library's step with terms of the weights and of a batch's images, which an `Objective` does not see."""

    def __init__(self, model: nn.Module, method: Method | None = None, **options: Any) -> None:
        super().__init__(model, method, objective=_Labelled(), **options)
        head = f"{outermost_name(self.head_name)}."
        named = dict(model.named_parameters())
        # Of the backbone: the attacker brings a head of his own.
        self.weights = {name: named[name] for name in self.moving if not name.startswith(head)}
        self.images: Tensor | None = None  # harmful ones of this batch

    def __call__(self, model: nn.Module, batch: dict[str, Any], *given: Any, **options: Any) -> StepResult:
        """As the library's."""
        self.images = batch["harmful"]["pixel_values"]
        return super().__call__(model, batch, *given, **options)

    def read(self, weights: Weights, rows: slice = slice(None)) -> Tensor:
        """Features of the harmful images through other weights, as an attacker reads them."""
        assert self.images is not None
        model, images = self._plain_model, {"pixel_values": self.images[rows]}
        # Fused attention has no second derivative.
        with self.replayed(model), in_eval_mode(model), HeadInput(self.head) as captured, sdpa_kernel(SDPBackend.MATH):
            torch.func.functional_call(model, weights, (), images)
        return captured.features


def squares(tensors: Any) -> Tensor:
    """The sum of squares of all entries of some tensors, whose root has no derivative at zero."""
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum()


def norm(tensors: Any) -> Tensor:
    """Of all entries of some tensors; zero counts as tiny, without a gradient."""
    return squares(tensors).clamp_min(1e-24).sqrt()


def ridge_start(features: Tensor, targets: Tensor, count: int) -> Tensor:
    """The attacker's head ``(D, C)``: ridge on features ``(N, D)``, in closed form, without a gradient."""
    rows = features.detach().float()
    kernel = rows @ rows.mT
    ridge = (0.1 * kernel.diagonal().mean()).clamp_min(1e-12) * torch.eye(len(rows), device=rows.device)
    return rows.mT @ torch.linalg.solve(kernel + ridge, F.one_hot(targets, count).float() - 1 / count)


def to_uniform(logits: Tensor) -> Tensor:
    """``KL(uniform ‖ softmax)`` of logits ``(N, C)``, mean over rows."""
    return -F.log_softmax(logits, dim=1).mean() - math.log(logits.shape[1])


# ---- noise, then distil ----


class Uniform(Objective):
    """Harmful images get the same probability for every class: what is unlearned, as outputs say it."""

    def __call__(self, benign: Side, harmful: Side) -> Terms:
        """The term ``uniform`` (harmful)."""
        assert harmful.logits is not None
        return Terms(harmful={"uniform": to_uniform(harmful.logits)})


@torch.no_grad()
def mix_in_noise(model: nn.Module, share: float, seed: int) -> None:
    """``θ ← (1 − share)·θ + share·θ_random`` of the trainable weights, in place."""
    fresh = dict(random_copy(model, seed).named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.lerp_(fresh[name].to(parameter.device), share)


def undo(model: Any, *data: Any, noise: float = 0.3, max_steps: int = 1000, **arguments: Any) -> Any:
    """UNDO: unlearn for a quarter of the steps, mix noise into the weights, distil on outputs for the rest."""
    make, first = partial(ImmunizationStep, objective=Uniform()), max(1, max_steps // 4)
    # Statistics of weights that are gone fit no longer.
    whole = {"trainable": "all", "harmful_weight": 1.0, **arguments, "cache_trunk": "no", "freeze_batchnorm": False}
    teacher = train(make, model, *data, max_steps=first, **whole)
    add = partial(mix_in_noise, share=noise, seed=torch.initial_seed() % 2**32)
    # On outputs alone: the teacher's features are what shall be left behind.
    whole |= {"feature_distillation_weight": 0.0, "max_steps": max(1, max_steps - first)}
    return train(make, teacher, *data, before=add, **whole)


# ---- far away in the space of weights ----


class WeightDistance(FieldStep):
    """Weights move away from what they were, up to as far as they are long."""

    # Weights before a norm layer may grow without a change of the function: distance alone proves nothing.

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.origin = {name: value.detach().clone() for name, value in self.weights.items()}

    def terms(self, benign: Side, harmful: Side, step: int) -> Terms:
        """The term ``closeness`` (inner), ``−log min(1, ‖θ − θ₀‖/‖θ₀‖)``."""
        moved = squares(value - self.origin[name].to(value.device) for name, value in self.weights.items())
        share = moved / squares(self.origin.values()).to(moved.device)
        return Terms(inner={"closeness": -share.clamp(1e-12, 1).log() / 2})


def weight_distance(model: Any, *data: Any, noise: float = 0.05, **arguments: Any) -> Any:
    """Weight distance: some noise, then ever further from the starting weights while benign outputs are kept."""
    # Without noise there is no direction to begin with: at the starting weights the distance has no gradient.
    add = partial(mix_in_noise, share=noise, seed=torch.initial_seed() % 2**32)
    whole = {"trainable": "all", "harmful_weight": 0.1, **arguments, "cache_trunk": "no"}
    return train(WeightDistance, model, *data, before=add, **whole)


# ---- the attack, unrolled ----


class Unrolled(FieldStep):
    """The attacker fine-tunes for some steps; the held-out harmful images shall get the same logits afterwards.

    To first order: the gradient at the attacked weights is applied to the weights before the attack.
    """

    steps, reach, along = 4, 0.01, False  # `reach`: a step's share of the weights' length

    def terms(self, benign: Side, harmful: Side, step: int) -> Terms:
        """The term ``adapted`` (inner): `to_uniform` after the attack, or with ``along`` after each of its steps."""
        assert isinstance(harmful.features, Tensor) and harmful.labels is not None
        classes, targets = torch.unique(harmful.labels, return_inverse=True)
        fit, held = slice(0, None, 2), slice(1, None, 2)
        head = ridge_start(harmful.features[fit], targets[fit], len(classes))
        moved, found = {name: value.detach() for name, value in self.weights.items()}, []
        for turn in range(self.steps):
            moved, head = self._attack(moved, head, targets[fit], fit)
            if self.along or turn == self.steps - 1:
                # The straight way through: the value is at the attacked weights, the gradient goes to these.
                there = {name: value + (moved[name] - value).detach() for name, value in self.weights.items()}
                found.append(to_uniform(self.read(there, held) @ head))
        return Terms(inner={"adapted": torch.stack(found).mean()})

    def _attack(self, weights: Weights, head: Tensor, targets: Tensor, rows: slice) -> tuple[Weights, Tensor]:
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        head = head.clone().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(self.read(leaves, rows) @ head, targets)
        *gradients, of_head = torch.autograd.grad(loss, [*leaves.values(), head], materialize_grads=True)
        # As long whatever the loss's scale: attackers search for their rate.
        rate = self.reach * norm(weights.values()) / norm(gradients)
        moved = {name: value - rate * one for (name, value), one in zip(weights.items(), gradients, strict=True)}
        return moved, (head - rate * of_head).detach()


class UnrolledAlong(Unrolled):
    """The same after each step of the attack."""

    along = True


def sophon(model: Any, *data: Any, **arguments: Any) -> Any:
    """SOPHON-like: what a simulated fine-tuning ends with is of no use."""
    return train(Unrolled, model, *data, **{"harmful_weight": 1.0, **arguments})


def tar(model: Any, *data: Any, **arguments: Any) -> Any:
    """TAR-like: the same along the whole attack."""
    return train(UnrolledAlong, model, *data, **{"harmful_weight": 1.0, **arguments})


# ---- contraction of the attack's dynamics ----


class Contraction(FieldStep):
    """Each of the attacker's updates is smaller than the last, so that all of them together lead nowhere.

    With ``‖u₁‖/‖u₀‖ = ρ`` of two steps, the way that is ahead is ``‖u₀‖·Σ_{t<T} ρᵗ``, in the limit ``‖u₀‖/(1 − ρ)``.
    """

    # The paper's curvature penalty is left out.
    horizon, reach = 30, 0.01

    def terms(self, benign: Side, harmful: Side, step: int) -> Terms:
        """The term ``way_ahead`` (inner), its logarithm."""
        assert isinstance(harmful.features, Tensor) and harmful.labels is not None
        classes, targets = torch.unique(harmful.labels, return_inverse=True)
        head = ridge_start(harmful.features, targets, len(classes))
        first = self._update(self.weights, head, targets)
        size = norm(first)
        rate = (self.reach * norm(self.weights.values()) / size).detach()
        moved = {
            name: value - (rate * one).detach() for (name, value), one in zip(self.weights.items(), first, strict=True)
        }
        log_ratio = (norm(self._update(moved, head, targets)) / size).log()
        turns = torch.arange(self.horizon, device=size.device)
        return Terms(inner={"way_ahead": size.log() + torch.logsumexp(turns * log_ratio, dim=0)})

    def _update(self, weights: Weights, head: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """The gradient of the attacker's loss, itself in the autograd graph of the weights."""
        loss = F.cross_entropy(self.read(weights) @ head, targets)
        return torch.autograd.grad(loss, [*weights.values()], create_graph=True, materialize_grads=True)


def contraction(model: Any, *data: Any, **arguments: Any) -> Any:
    """Contraction of the attack's dynamics, after CLAMP."""
    return train(Contraction, model, *data, **{"harmful_weight": 0.1, **arguments})


# ---- closed-form erasure as a target ----


def leace_eraser(features: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """``x ↦ x − W⁺PW(x − μ)``: the least change after which no linear classifier beats a constant.

    ``W`` whitens the features ``(N, D)``, ``P`` projects onto the whitened covariance of features and labels.
    """
    rows = features.double()
    mean, centred = rows.mean(dim=0), rows - rows.mean(dim=0)
    wanted = F.one_hot(torch.unique(labels, return_inverse=True)[1]).double()
    values, vectors = torch.linalg.eigh(centred.mT @ centred / len(rows))
    kept = values > 1e-10 * values[-1]
    roots, vectors = values[kept].sqrt(), vectors[:, kept]
    shared = vectors.mT @ centred.mT @ (wanted - wanted.mean(dim=0)) / len(rows) / roots[:, None]
    left, sizes, _ = torch.linalg.svd(shared, full_matrices=False)
    left = left[:, sizes > 1e-10 * sizes[0]]
    matrix = (vectors * roots) @ left @ left.mT @ (vectors / roots).mT

    def erase(found: Tensor) -> Tensor:
        given = (found.double() - mean.to(found.device)) @ matrix.mT.to(found.device)
        return (found.double() - given).to(found.dtype)

    return erase


class Erasure(FieldStep):
    """Harmful features go to what erasure makes of the starting model's."""

    def __init__(self, *given: Any, erase: Callable[[Tensor], Tensor], **options: Any) -> None:
        super().__init__(*given, **options)
        self.erase = erase

    def terms(self, benign: Side, harmful: Side, step: int) -> Terms:
        """The term ``to_erased`` (inner)."""
        assert isinstance(harmful.features, Tensor) and self.images is not None
        return Terms(inner={"to_erased": feature_error(harmful.features, self.erase(self.run_start(self.images)[0]))})


def leace(model: Any, benign: Any, harmful: Any, processor: Any, **arguments: Any) -> Any:
    """LEACE, fitted to the starting model's features of all harmful images and distilled into the weights."""
    rows = ImageRows(harmful, "harmful images", *find_columns(harmful))
    loader = torch.utils.data.DataLoader(rows, 64, collate_fn=ImageCollator(processor))
    with torch.no_grad():
        batches = [(penultimate_features(model.eval(), one["pixel_values"]), one["labels"]) for one in loader]
    erase = leace_eraser(*(torch.cat(part) for part in zip(*batches, strict=True)))
    make = partial(Erasure, erase=erase)
    return train(make, model, benign, harmful, processor, **{"harmful_weight": 20.0, **arguments})


# ---- a network made anew, which never sees the harmful images ----


def recipe_of(model: Any) -> dict[str, Any]:
    """How a starting model of this architecture was trained: arguments of a Trainer, of settings.yaml."""
    starts = [one["start"] for one in load_settings()["backbones"].values() if one["start"].get("make") == "trained"]
    for start in starts:
        if start["config"]["model_type"] == model.config.model_type:
            return start["arguments"]
    raise ArgumentError(
        "Expected a model like one of the starting models that the settings train, found "
        f"{model.config.model_type!r}. Train one there first."
    )


def _anew(model: Any, benign: Any, processor: Any, **options: Any) -> Any:
    recipe, seed = recipe_of(model), torch.initial_seed() % 2**32
    pixels, labels = pixels_of(benign, processor)
    set_seed(seed)  # loading has drawn
    fresh = AutoModelForImageClassification.from_config(model.config)
    with tempfile.TemporaryDirectory() as folder:
        return fit(fresh, pixels, labels, Path(folder), **options, seed=seed, **recipe).model.eval()


def retrained(model: Any, benign: Any, harmful: Any, processor: Any) -> Any:
    """The same network from random weights, trained on the benign images as starting models are.

    What it gives an attacker is what the benign classes teach: forgetting cannot remove more.
    """
    return _anew(model, benign, processor)


def redistilled(model: Any, benign: Any, harmful: Any, processor: Any, *, share: float = 0.5) -> Any:
    """The same network from random weights learns labels and the starting model's outputs on the benign images."""
    return _anew(model, benign, processor, make=partial(Student, teacher=model, share=share))


# ---- nothing at all, behind other weights ----


@torch.no_grad()
def rescaled(model: Any, benign: Any, harmful: Any, processor: Any, factor: float = 1000.0) -> Any:
    """The same function: what a norm reads or gives is scaled, and what stands behind it scales back.

    No usual step moves a weight that is a thousand times as large: what this seems to remove is removed by nothing.
    """
    makers: dict[int, tuple[nn.Module, Any]] = {}  # by what they give, which is kept so that no other gets its number
    pairs: list[tuple[Any, Any]] = []

    def gives(module: nn.Module, inputs: Any, output: Any) -> None:
        makers[id(output)] = module, output

    def reads(module: nn.Module, inputs: Any) -> None:
        if id(inputs[0]) in makers:
            pairs.append((makers[id(inputs[0])][0], module))

    hooks = []
    for module in model.eval().modules():
        if isinstance(module, (nn.LayerNorm, nn.Conv2d)):
            hooks.append(module.register_forward_hook(gives))
        if isinstance(module, (nn.Linear, nn.BatchNorm2d)):
            hooks.append(module.register_forward_pre_hook(reads))
    rows = ImageRows(benign, "benign images", *find_columns(benign))
    model(pixel_values=ImageCollator(processor)([rows[0]])["pixel_values"])
    for hook in hooks:
        hook.remove()
    for maker in dict.fromkeys(maker for maker, _ in pairs):
        readers = [reader for one, reader in pairs if one is maker]
        if isinstance(maker, nn.LayerNorm):
            maker.weight /= factor
            maker.bias /= factor
            for reader in readers:
                reader.weight *= factor
        else:
            maker.weight *= factor
            for reader in readers:
                reader.running_mean *= factor
                reader.running_var.copy_((reader.running_var + reader.eps) * factor**2 - reader.eps)
    return model


# ---- the library's own, and none ----


def _library(name: str, model: Any, *data: Any, **arguments: Any) -> Any:
    return train(ImmunizationStep, model, *data, **{**LIBRARY[name], **arguments})


default, concentration, dead_relu = (partial(_library, name) for name in ("default", "concentration", "dead_relu"))
kappa, r_ill, opt_kappa, imma = (partial(_library, name) for name in ("kappa", "r_ill", "opt_kappa", "imma"))


def unchanged(model: Any, benign: Any, harmful: Any, processor: Any) -> Any:
    """The starting model, as a check of the benchmark: nothing is removed."""
    return model
