"""The library's Trainer with a candidate's terms, under the library's benign loss, budget and multiplier."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from examples.fine_tuning import terms
from examples.fine_tuning.candidates import Candidate
from hf_immunize import ImmunizationTrainer
from hf_immunize.errors import ArgumentError
from hf_immunize.training.arguments import Method
from hf_immunize.training.objectives import Concentration, Objective, Side, Terms, relu_activity
from hf_immunize.training.step import ImmunizationStep, StepResult
from hf_immunize.training.weighting import balanced_weight, gradient_norm


# The inner fine-tuning attacker: the middle of what the audit's attackers try.
INNER_STEPS, INNER_RATE = 4, 1e-3


class CandidateObjective(Objective):
    """Terms at the classifier's input and of what enters ReLUs, as far as a candidate has them.

    Args:
        candidate: Which terms.
        relus: Modules whose inputs they look at.
    """

    def __init__(self, candidate: Candidate, relus: list[str]) -> None:
        super().__init__(relus if candidate.silence else ())
        self.candidate = candidate

    def __call__(self, benign: Side, harmful: Side) -> Terms:
        """Concentration, unless all harmful features are zero, and a term of each ReLU, which keeps its weight."""
        assert isinstance(harmful.features, Tensor)  # one process
        head = self.candidate.head and harmful.features.any()
        found = {name: relu_activity(values, benign.inner[name]) for name, values in harmful.inner.items()}
        inner = {f"activity {name}": replace(term, left=None) for name, term in found.items()}
        return replace(Concentration()(benign, harmful) if head else Terms(), inner=inner)


class Passing:
    """What leaves some modules in the first pass that takes gradients; hooks are removed on exit.

    Args:
        model: Whose modules.
        outputs: Modules whose outputs are kept.
    """

    def __init__(self, model: nn.Module, outputs: list[str]) -> None:
        self.model, self.outputs = model, outputs
        self.values: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Passing:
        for name in self.outputs:
            self._handles.append(self.model.get_submodule(name).register_forward_hook(self._after(name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _after(self, name: str) -> Any:
        return lambda module, inputs, output: self._keep(name, output)

    def _keep(self, name: str, value: Any) -> None:
        # The starting model and held-out images pass without gradients.
        if torch.is_grad_enabled():
            self.values.setdefault(name, value[0] if isinstance(value, (tuple, list)) else value)


class CandidateStep(ImmunizationStep):
    """`ImmunizationStep` with the terms of a candidate beside, or in the place of, concentration.

    A term's gradient at the layer it looks at, or on the parameters, has the norm that the multiplier says, in the
    unit of the library's: one over the size of the layer's benign values; on the parameters, what concentration at the
    classifier's input would have there.

    Args:
        model: As in `ImmunizationStep`.
        candidate: Which terms.
        layers: Modules whose outputs they look at.
        rectifiers: Modules whose inputs they look at.
        seed: Of new heads.
        **options: As in `ImmunizationStep`.
    """

    def __init__(
        self,
        model: Any,
        candidate: Candidate,
        layers: list[str],
        rectifiers: list[str],
        seed: int,
        **options: Any,
    ) -> None:
        super().__init__(model, objective=CandidateObjective(candidate, rectifiers), **options)
        self.candidate, self.seed = candidate, seed
        self.layers = layers if candidate.layers or candidate.ridge else []

    def __call__(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        step: int,
        task_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        add_task_loss: bool = True,
    ) -> StepResult:
        """As `ImmunizationStep`, with the candidate's terms."""
        plain = self._plain_model
        with Passing(plain, self.layers) as passing:
            result = super().__call__(model, batch, step, task_loss, add_task_loss=add_task_loss)
        labels = batch["harmful"].get("labels")
        benign = slice(0, len(batch["benign"]["pixel_values"]))
        harmful = slice(benign.stop, benign.stop + len(batch["harmful"]["pixel_values"]))
        loss, logged = result.loss, dict(result.logged)
        factor = self.weighting.factor
        for name, values in passing.values.items():
            unit = 1 / torch.linalg.vector_norm(values[benign].detach())
            found = {}
            if self.candidate.layers and name in self.layers and values[harmful].any():
                found["concentration"] = terms.layer_concentration(values[harmful])
            if self.candidate.ridge:
                found["ridge"] = terms.ridge_resistance(pooled(values[harmful]), labels)
            for kind, term in found.items():
                loss = loss + balanced_weight(unit, gradient_norm(term, values), factor) * term
                logged[f"{kind} {name}"] = term.detach()
        if self.candidate.tuner:
            if self.replayed is not nullcontext:
                raise ArgumentError(
                    f"Expected cache_trunk='no' with the inner attacker {self.candidate.tuner!r}, which runs the "
                    "whole network, found stored activations. Change it in the experiment's file."
                )
            parameters = {name: value for name, value in plain.named_parameters() if value.requires_grad}
            gradients, value = self._of_tuner(plain, batch["harmful"]["pixel_values"], labels, parameters, step)
            logged[self.candidate.tuner] = value
            norm = _norm(gradients.values())
            if norm > 0:
                unit = self._unit_on_parameters(plain, batch, parameters)
                weight = balanced_weight(unit, norm, factor)
                pulls = [(parameters[name] * (weight * one)).sum() for name, one in gradients.items()]
                loss = loss + torch.stack(pulls).sum()
        return replace(result, loss=loss, logged=logged)

    def _of_tuner(
        self, model: Any, pixels: Tensor, labels: Tensor, parameters: dict[str, Tensor], step: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients on the parameters by name, and what is logged."""
        seed = self.seed * 100_003 + step
        if self.candidate.tuner == "unrolled":
            options = {"steps": INNER_STEPS, "learning_rate": INNER_RATE, "seed": seed}
            found = terms.after_tuning(model, list(parameters), pixels, labels, **options)
            return found, _norm(found.values())
        features = terms.captured_features(model, pixels)
        draw = torch.Generator().manual_seed(seed)
        head = terms.HEAD_STD * torch.randn(int(labels.max()) + 1, features.shape[1], generator=draw)
        body = [value for name, value in parameters.items() if not any(value is one for one in self.head.parameters())]
        value = terms.flatness(features, labels, body, head)
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        named = zip(parameters, found, strict=True)
        return {name: one for name, one in named if one is not None}, value.detach()

    def _unit_on_parameters(self, model: Any, batch: dict[str, Any], parameters: dict[str, Tensor]) -> Tensor:
        """Norm on the parameters of concentration at the classifier's input, at a multiplier of 1."""
        features = terms.captured_features(model, batch["harmful"]["pixel_values"])
        if not features.any():
            return torch.zeros(())
        term = terms.layer_concentration(features)
        weight = balanced_weight(1 / torch.linalg.vector_norm(features.detach()), gradient_norm(term, features), 1.0)
        found = torch.autograd.grad(weight * term, list(parameters.values()), allow_unused=True)
        return _norm(one for one in found if one is not None)


def pooled(values: Tensor) -> Tensor:
    """A layer's values averaged over positions, ``(N, C)``."""
    return values.mean((2, 3)) if values.dim() == 4 else values.mean(1) if values.dim() == 3 else values


def _norm(gradients: Any) -> Tensor:
    squares = [one.detach().square().sum() for one in gradients]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


class CandidateTrainer(ImmunizationTrainer):
    """An `ImmunizationTrainer` whose steps are of a candidate.

    Args:
        candidate: Which.
        layers: Modules whose outputs its terms look at.
        rectifiers: Modules whose inputs they look at.
        *args: As in `ImmunizationTrainer`.
        **kwargs: As in `ImmunizationTrainer`.
    """

    def __init__(
        self, candidate: Candidate, layers: list[str], rectifiers: list[str], *args: Any, **kwargs: Any
    ) -> None:
        self.candidate, self.layers, self.rectifiers = candidate, layers, rectifiers
        super().__init__(*args, **kwargs)

    def create_step(self, model: Any) -> ImmunizationStep:
        """The candidate's."""
        return CandidateStep(
            model,
            self.candidate,
            self.layers,
            self.rectifiers,
            self.args.seed,
            method=Method.of(self.args),
            moving=self._moving,
            freeze_batchnorm=self.args.freeze_batchnorm,
            head_module=self.args.head_module,
        )
