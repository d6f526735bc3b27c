"""One training step: a benign and a harmful half-batch pass the model, and one loss comes out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_immunize.errors import DataError, ImmunizationError, NonFiniteError, ScopeError
from hf_immunize.spectra.hessian_functions import Hessian
from hf_immunize.training.arguments import Method
from hf_immunize.training.checks import check_checkpointing, check_classifier
from hf_immunize.training.choice import Choice, prepare_objective
from hf_immunize.training.distillation import StartingModel, feature_error, logit_divergence, total_variation
from hf_immunize.training.distributed import (
    gather_features,
    gather_labels,
    mean_gradient_norm,
    process_mean,
    sharded_weights,
    sum_hessian,
    sum_is_smaller,
    world_size,
)
from hf_immunize.training.objectives import OBJECTIVES, Objective, Side, Terms, gradient_norm
from hf_immunize.training.weighting import Weighting
from hf_immunize.vision.head import (
    HeadInput,
    check_full_precision,
    fast_layout,
    find_head,
    in_eval_mode,
    outermost_name,
)
from hf_immunize.vision.relu import ReluInputs
from hf_immunize.vision.scope import has_batch_statistics, modules_in_eval


TaskLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class StepResult:
    """What a step gives."""

    loss: Tensor  # 0-D, to call ``backward`` on
    logged: dict[str, Tensor]  # by name, 0-D: benign_loss and its parts, the terms, their weights
    logits: Tensor  # of the benign images, (N_P, C)
    finite: dict[str, Tensor] = field(default_factory=dict)  # side to whether all features of its images are, 0-D


@dataclass(frozen=True)
class _Passed:
    """What a batch became on its way through the model: features and logits of all images, benign rows first."""

    features: Tensor
    logits: Tensor
    benign_graph: Tensor  # the features in the autograd graph of the benign logits
    inner: dict[str, Tensor]
    sides: dict[str, slice]


class ImmunizationStep:
    """The loss of a pair of batches, and all that it remembers from step to step.

    The Trainer, the callback and a bare loop share it. Trainable parameters are those that require a gradient.

    Args:
        model: An image classifier at its starting weights, with its scope set (see `select_trainable`).
        method: What is minimized.
        moving: Names of the trainable parameters; by default those that require a gradient.
        freeze_batchnorm: Keep all BatchNorm running statistics.
        head_module: The classifier's name, where it cannot be found without help.
        objective: An objective of your own, in place of the method's.

    Raises:
        ArgumentError, HeadError, ScopeError: If the model is none that can be immunized; each says what to do.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        ...                    image_size=32, patch_size=16, num_labels=3)
        >>> model = ViTForImageClassification(config)
        >>> step = ImmunizationStep(model, Method(objective="kappa"))
        >>> batch = {"benign": {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.tensor([0, 1, 2, 0])},
        ...          "harmful": {"pixel_values": torch.randn(4, 3, 32, 32)}}
        >>> result = step(model, batch, step=0)
        >>> result.loss.backward()
        >>> list(result.logged)[:4]
        ['benign_loss', 'kl', 'feature_error', 'r_well']
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method | None = None,
        *,
        moving: list[str] | None = None,
        freeze_batchnorm: bool = True,
        head_module: str | None = None,
        objective: Objective | None = None,
    ) -> None:
        check_classifier(model)
        check_checkpointing(model)
        check_full_precision(model)
        self.method = method if method is not None else Method()
        if moving is None:
            moving = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.moving = list(moving)
        self.head_name, self.head = find_head(model, head_module)
        if all(name.startswith(f"{outermost_name(self.head_name)}.") for name in moving):
            raise ScopeError(
                f"Expected parameters of the backbone that require a gradient, found {', '.join(moving) or 'none'}: "
                "no feature could move. Choose them, as hf_immunize.vision.scope.select_trainable does."
            )
        self.still = modules_in_eval(model, moving, freeze_batchnorm, head_module)
        self.together = not has_batch_statistics(model, self.still)
        copied = self.head if sharded_weights() else None
        self.start = StartingModel(model, copied) if self.method.needs_start else None
        # Micro-batches so far: the Trainer sees by it that none goes past the method.
        self.calls = 0
        # With a cached trunk, batches hold its activations, and within this context the model runs from them.
        self.replayed: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
        self.choice: Choice | None = None
        self._plain_model = model
        self._objective = objective
        self.weighting = Weighting(self.method, (objective or OBJECTIVES[self.method.objective]).weight)
        self._needs_harmful_labels = (objective or self.method).needs_harmful_labels

    # ---- the objective ----

    def prepare(self, sample: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Let the objective look at images, once, before the first step; a resumed run keeps what it found.

        Args:
            sample: Gives some dozens of benign and of harmful images, each of shape ``(N, C, H, W)``, on the first
                process, where they are needed. Without this call, the first batch is the sample.

        Raises:
            DataError: If the images' features do not differ.
        """
        if self._objective is None:
            with self.replayed(self._plain_model):
                self._set(prepare_objective(self.method, self._plain_model, self.head, self.moving, sample))

    def _set(self, choice: Choice) -> None:
        kind = OBJECTIVES[self.method.objective]
        self.choice, self._objective = choice, kind(choice.reads, self.method.scale_free, choice.directions)

    # ---- the loss ----

    def __call__(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        step: int,
        task_loss: TaskLoss | None = None,
        *,
        add_task_loss: bool = True,
    ) -> StepResult:
        """Compute the loss of one micro-batch.

        Args:
            model: The model, as wrapped for training.
            batch: ``{"benign": {"pixel_values", "labels"}, "harmful": {"pixel_values"}}``, maybe with
                ``"distillation"``; labels are only needed by losses that use them.
            step: Optimizer steps done before this one; the same for all micro-batches of a step.
            task_loss: The benign task's loss of logits and labels; by default cross-entropy.
            add_task_loss: Whether the loss holds it; False where someone else's training step does already.

        Raises:
            DataError: If a side is missing, or the benign images lack the labels that the loss needs.
            ImmunizationError: One of its kinds, with objective and step, where a term is undefined.
        """
        if missing := [side for side in ("benign", "harmful") if side not in batch]:
            raise DataError(
                f"Expected a batch of benign and harmful images, found none that are {missing[0]}. Collate pairs with "
                "hf_immunize.data.pairs.PairedCollator, or give a dictionary of both sides."
            )
        self.calls += 1
        self.prepare(lambda: (batch["benign"]["pixel_values"], batch["harmful"]["pixel_values"]))
        task_loss = task_loss or nn.functional.cross_entropy
        passed = self._forward(model, batch)
        finite = {side: torch.isfinite(passed.features[rows].detach()).all() for side, rows in passed.sides.items()}
        if passed.features.device.type == "cpu":  # elsewhere a look would stall the device; see `RunningMeans`
            self._check_sides(finite, batch, step)
        labels = batch["benign"].get("labels")
        if labels is None:
            self._check_unlabelled(add_task_loss)
        benign, harmful = self._side("benign", batch, passed), self._side("harmful", batch, passed)
        task = None
        if self.method.benign_loss != "distillation" and (add_task_loss or labels is not None):
            task = task_loss(passed.logits[passed.sides["benign"]], labels)
        distillation, logged, spent = self._distillation(batch, passed)
        nothing = passed.logits.new_zeros(())
        parts = [part for part in (task, distillation) if part is not None]
        benign_loss = torch.stack(parts).sum() if parts else nothing
        loss, weighed = self.weighting.weigh(
            benign_loss if add_task_loss else nothing if distillation is None else distillation,
            self.terms(benign, harmful, step),
            {"benign": benign.features, "harmful": harmful.features},
            lambda: self._benign_scale(benign_loss, benign, passed.benign_graph),
            spent,
        )
        logits = passed.logits[passed.sides["benign"]]
        return StepResult(loss, {"benign_loss": benign_loss, **logged, **weighed}, logits, finite)

    def terms(self, benign: Side, harmful: Side, step: int) -> Terms:
        """The objective's terms, which the weighting weighs; override it to minimize something else."""
        assert self._objective is not None  # prepared
        try:
            return self._objective(benign, harmful)
        except ImmunizationError as error:
            raise type(error)(f"Objective {self.method.objective!r} at step {step + 1}: {error}") from error

    def _forward(self, model: nn.Module, batch: dict[str, Any]) -> _Passed:
        for module in self.still:
            module.training = False
        names: list[str] = [side for side in ("benign", "harmful", "distillation") if side in batch]
        images = [batch[side]["pixel_values"] for side in names]
        ends = np.cumsum([0, *map(len, images)]).tolist()
        sides = {side: slice(*ends[index : index + 2]) for index, side in enumerate(names)}
        reads = () if self._objective is None else self._objective.reads
        inside = ReluInputs(self._plain_model, list(reads)) if reads else None
        with self.replayed(self._plain_model), inside or nullcontext():
            found = forward_both(model, self.head, images[0], torch.cat(images[1:]), together=self.together)
        return _Passed(*found, {} if inside is None else inside.values, sides)

    def _side(self, name: str, batch: dict[str, Any], passed: _Passed) -> Side:
        """A side of the global batch: with features where rows are needed, else with the smaller of them and ZᵀZ."""
        own, labels = passed.sides[name], batch[name].get("labels")
        if name == "harmful":
            labels = gather_labels(labels) if self._needs_harmful_labels else None
        inner = {layer: values[own] for layer, values in passed.inner.items()}
        features, processes = passed.features[own], world_size()
        asked = self._needs_harmful_labels or (self._objective is not None and self._objective.needs_rows)
        needs_rows = processes == 1 or asked
        summed = not needs_rows and sum_is_smaller(len(features) * processes, features.shape[1], features.dtype)
        whole = sum_hessian(features) if summed else gather_features(features)
        return Side(whole, passed.logits[own], labels, inner)

    def _distillation(
        self, batch: dict[str, Any], passed: _Passed
    ) -> tuple[Tensor | None, dict[str, Tensor], Tensor | None]:
        """The distillation loss, its parts by name, and the part of the budget that is spent; None where not used."""
        if self.start is None:
            return None, {}, None
        kept = [side for side in passed.sides if side != "harmful"]
        if all("start_logits" in batch[side] for side in kept):
            start_features, start_logits = (
                torch.cat([batch[side][name] for side in kept]) for name in ("start_features", "start_logits")
            )
        else:
            start_features, start_logits = self.run_start(torch.cat([batch[side]["pixel_values"] for side in kept]))
        logits = torch.cat([passed.logits[passed.sides[side]] for side in kept])
        parts, loss, spent = {"kl": logit_divergence(logits, start_logits)}, None, None
        if self.method.benign_loss != "task":
            now = torch.cat([passed.features[passed.sides[side]] for side in kept])
            parts["feature_error"] = feature_error(now, start_features)
            loss = parts["kl"] + self.method.feature_distillation_weight * parts["feature_error"]
        if self.method.benign_budget is not None:
            count = len(batch["benign"]["pixel_values"])
            moved = process_mean(total_variation(logits[:count].detach(), start_logits[:count]))
            parts["total_variation"], spent = moved, moved / self.method.benign_budget
        return loss, parts, spent

    def run_start(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of the starting model; with a cached trunk, of its activations."""
        assert self.start is not None
        with self.replayed(self._plain_model):
            return self.start(self._plain_model, self.head, pixel_values)

    def _benign_scale(self, benign_loss: Tensor, benign: Side, loss_features: Tensor) -> Tensor:
        """The unit in which gradients of terms on the features are measured."""
        # A distillation loss starts at its minimum, where its gradient says nothing; that of the relative feature
        # error at a displacement of ε is 2ε over the size of the features.
        if self.method.benign_loss == "distillation":
            dtype = torch.promote_types(benign.features.dtype, torch.float32)
            if isinstance(benign.features, Hessian):
                return benign.features.matrix.detach().trace().rsqrt().to(dtype)
            return 1 / torch.linalg.vector_norm(benign.features.detach(), dtype=dtype)
        return self.weighting.benign_scale(mean_gradient_norm(gradient_norm(benign_loss, loss_features)))

    # ---- what is refused ----

    def _check_unlabelled(self, add_task_loss: bool) -> None:
        """Whether labels of the benign images can be missing."""
        method = self.method
        balanced = self.weighting.own is None and "auto" in (method.benign_weight, method.harmful_weight)
        if method.needs_labels and (add_task_loss or balanced):
            raise DataError(
                f"Expected labels of the benign images, which benign_loss={method.benign_loss!r} needs, found none in "
                "the batch, which has 'pixel_values' alone. Let the collator put them under 'labels', or use "
                "benign_loss='distillation'."
            )

    def _check_sides(self, finite: dict[str, Tensor], batch: dict[str, Any], step: int) -> None:
        """Name the side that brings NaN or infinity in."""
        lost = [side for side, whole in finite.items() if not bool(whole)]
        if lost:
            given = [side for side in lost if not bool(torch.isfinite(batch[side]["pixel_values"]).all())]
            found = (
                f"NaN or infinity in the pixel values of the {' and '.join(given)} images. Look at these images"
                if given
                else "NaN or infinity. Lower the learning rate or the weights, or train in full precision"
            )
            raise NonFiniteError(
                f"Objective {self.method.objective!r} at step {step + 1}: Expected finite features of the "
                f"{' and '.join(lost)} images, found {found}; the last checkpoint is sound."
            )

    # ---- what a resumed run needs ----

    def state_dict(self) -> dict[str, Tensor]:
        """Running means, what the objective found, and starting tensors, with which a resumed run goes on exactly."""
        parts = {
            "weighting": self.weighting.state_dict(),
            "start": {} if self.start is None else self.start.state_dict(),
        }
        if self.choice is not None:
            text = json.dumps({"objective": self.method.objective, **asdict(self.choice)})
            parts["choice"] = {"json": torch.tensor(list(text.encode()), dtype=torch.uint8)}
        if self._objective is not None:
            parts["objective"] = self._objective.state_dict()
        return {f"{part}/{name}": value for part, state in parts.items() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ArgumentError: If the starting tensors are of another model, scope or method.
        """
        parts: dict[str, dict[str, Tensor]] = {"start": {}}
        for name, value in state.items():
            part, key = name.split("/", 1)
            parts.setdefault(part, {})[key] = value
        self.weighting.load_state_dict(parts["weighting"])
        if self.start is not None:
            self.start.load_state_dict(parts["start"])
        same = self._objective is not None
        if "choice" in parts:
            found = json.loads(bytes(parts["choice"]["json"].tolist()))
            same = found["objective"] == self.method.objective
            if same:
                directions = tuple(map(tuple, found["directions"]))
                self._set(Choice(tuple(found["reads"]), directions, found["separability"]))
        if same and self._objective is not None:
            self._objective.load_state_dict(parts.get("objective", {}))


def forward_both(
    model: nn.Module, head: nn.Module, benign: Tensor, others: Tensor, *, together: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Features and logits, benign rows first, and the features in the autograd graph of the benign logits.

    One pass is exact unless BatchNorm uses the statistics of its batch.
    """
    if together:
        with HeadInput(head) as captured:
            outputs = model(pixel_values=fast_layout(model, torch.cat([benign, others])))
        return captured.features, outputs["logits"], captured.features
    with HeadInput(head) as first:
        benign_logits = model(pixel_values=fast_layout(model, benign))["logits"]
    with ExitStack() as stack:
        # A harmful batch in the running statistics alone costs benign accuracy.
        for norm in (module for module in model.modules() if isinstance(module, _BatchNorm)):
            stack.enter_context(in_eval_mode(norm))
        second = stack.enter_context(HeadInput(head))
        other_logits = model(pixel_values=fast_layout(model, others))["logits"]
    logits = torch.cat([benign_logits, other_logits])
    return torch.cat([first.features, second.features]), logits, first.features


class RunningMeans:
    """Means of named scalars since they were last taken, kept on the device until then.

    Fetching every term in every step would stall a GPU: there, values are looked at when they are taken.
    """

    def __init__(self, deferred: bool | None = None) -> None:
        self._deferred = deferred
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._finite: dict[str, Tensor] = {}

    def update(self, values: dict[str, Tensor], step: int, finite: dict[str, Tensor] | None = None) -> None:
        """Add the scalars of one micro-batch; ``finite`` says of each side whether its features are, for the error."""
        for side, whole in (finite or {}).items():
            self._finite[side] = self._finite[side] & whole if side in self._finite else whole
        for name, value in values.items():
            value = value.detach()
            deferred = value.device.type != "cpu" if self._deferred is None else self._deferred
            if not deferred:
                self._check_finite(name, float(value), step)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def take(self, step: int) -> dict[str, float]:
        """The means, over all processes as well, and start anew; a collective where there are several."""
        if not self._sums:
            return {}
        totals = process_mean(torch.stack(list(self._sums.values()))).tolist()
        means = {name: total / self._count for name, total in zip(self._sums, totals, strict=True)}
        for name, mean in means.items():
            self._check_finite(name, mean, step)
        self._sums, self._count, self._finite = {}, 0, {}
        return means

    def _check_finite(self, name: str, value: float, step: int) -> None:
        if math.isfinite(value):
            return
        lost = [side for side, whole in self._finite.items() if not bool(whole)]
        where = f", with features of the {' and '.join(lost)} images that are not finite" if lost else ""
        raise NonFiniteError(
            f"Expected a finite {name} at step {step}, found {value}{where}. Lower the learning rate or the weights, "
            "or train in full precision; the last checkpoint is sound. On a GPU a term that is undefined is NaN too: "
            "features that are all zero, and for R_ill samples that are all alike."
        )
