"""What one training step computes between the batch and the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_immunize.errors import DataError, ImmunizationError, NonFiniteError, ScopeError, ShapeError
from hf_immunize.spectra.hessian_functions import Hessian
from hf_immunize.training.arguments import Method
from hf_immunize.training.checks import check_checkpointing, check_classifier
from hf_immunize.training.choice import RectifierChoice
from hf_immunize.training.distillation import (
    MOST_OF_AN_IMAGE,
    StartingModel,
    feature_error,
    logit_divergence,
    released_logits,
    total_variation,
)
from hf_immunize.training.distributed import (
    gather_features,
    gather_labels,
    mean_gradient_norm,
    sum_hessian,
    sum_is_smaller,
    world_size,
)
from hf_immunize.training.objectives import OBJECTIVES, Side, Terms
from hf_immunize.training.weighting import Weighting, gradient_norm
from hf_immunize.vision.head import HeadInput, check_full_precision, find_head, outermost_name
from hf_immunize.vision.relu import ReluInputs
from hf_immunize.vision.scope import has_batch_statistics, modules_in_eval


class FeatureQueue:
    """The last rows of features, without gradient.

    A regularizer of ``[Z_batch; queue]`` estimates that of the population, with its gradient through the batch alone.
    The rows come from slightly older weights: a queue of 2,048 rows at batches of 64 spans 32 steps.

    Args:
        size: Rows to keep.

    Example:
        >>> queue = FeatureQueue(3)
        >>> queue.push(torch.tensor([[1.0], [2.0]]))
        >>> queue.join(torch.tensor([[3.0]])).flatten().tolist()
        [3.0, 1.0, 2.0]
        >>> queue.push(torch.tensor([[3.0], [4.0]]))  # the oldest row makes room
        >>> queue.join(torch.tensor([[5.0]])).flatten().tolist()
        [5.0, 2.0, 3.0, 4.0]
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._rows: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self._rows is None else len(self._rows)

    def join(self, features: Tensor) -> Tensor:
        """The batch's features and the queue's below them.

        Args:
            features: Shape ``(N, D)``.

        Returns:
            Shape ``(N + len(queue), D)``; gradient flows to the batch's rows alone.

        Raises:
            ShapeError: If the queue holds features of another dimension.
        """
        if self._rows is None:
            return features
        if self._rows.shape[1] != features.shape[1]:
            raise ShapeError(
                f"Expected features of dimension {self._rows.shape[1]}, which the queue holds, found "
                f"{features.shape[1]}: the checkpoint is of another model. Resume with the model of the interrupted "
                "run, or start anew."
            )
        return torch.cat([features, self._rows.to(features.device, features.dtype)])

    def push(self, features: Tensor) -> None:
        """Take in the rows of a step; the oldest ones make room.

        Args:
            features: Shape ``(N, D)``.
        """
        rows = features.detach()
        if self._rows is not None:
            rows = torch.cat([self._rows.to(rows.device, rows.dtype), rows])
        self._rows = rows[-self.size :].clone()

    def state_dict(self) -> dict[str, Tensor]:
        """The rows; empty before the first step."""
        return {} if self._rows is None else {"rows": self._rows}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        rows = state.get("rows")
        self._rows = None if rows is None else rows[-self.size :]


def forward_both(
    model: nn.Module, head: nn.Module, benign: dict[str, Any], others: dict[str, Any], *, together: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Features and logits of benign and other images, benign rows first.

    Args:
        model: The model, as wrapped for training.
        head: Its classifier, inside the wrapping.
        benign: ``pixel_values`` of shape ``(N_P, C, H, W)``.
        others: ``pixel_values`` of shape ``(N_O, C, H, W)``: harmful images, and those of the distillation set.
        together: Whether one pass over both is exact, which it is unless BatchNorm uses the statistics of its batch.

    Returns:
        Features ``(N_P + N_O, D)``, logits ``(N_P + N_O, C)``, and the features in the autograd graph of the benign
        logits: all of them after one pass, those of the benign pass after two.
    """
    if together:
        with HeadInput(head) as captured:
            outputs = model(pixel_values=torch.cat([benign["pixel_values"], others["pixel_values"]]))
        return captured.features, outputs["logits"], captured.features
    with HeadInput(head) as first:
        benign_logits = model(pixel_values=benign["pixel_values"])["logits"]
    # A harmful batch in the running statistics alone costs benign accuracy.
    with HeadInput(head) as second, _batchnorm_in_eval(model):
        other_logits = model(pixel_values=others["pixel_values"])["logits"]
    logits = torch.cat([benign_logits, other_logits])
    return torch.cat([first.features, second.features]), logits, first.features


@contextmanager
def _batchnorm_in_eval(model: nn.Module) -> Iterator[None]:
    modules = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


@dataclass(frozen=True)
class StepResult:
    """What a step gives.

    Attributes:
        loss: 0-D, to call ``backward`` on.
        logged: Name to 0-D tensor: ``benign_loss``, the terms, their weights, the divergence and the multiplier.
        logits: Of the benign images, shape ``(N_P, C)``.
        finite: Side to a 0-D boolean: whether all features of its images are finite.
    """

    loss: Tensor
    logged: dict[str, Tensor]
    logits: Tensor
    finite: dict[str, Tensor] = field(default_factory=dict)


class ImmunizationStep:
    """The loss of a pair of batches, and all that it remembers from step to step.

    The Trainer, the callback and a bare loop share it. Parameters that shall move are those that require a gradient.

    Args:
        model: An image classifier at its starting weights, with its scope set (see `select_trainable`).
        method: What is minimized.
        moving: Names of the moving parameters; by default those that require a gradient.
        freeze_batchnorm: Keep all BatchNorm running statistics.
        head_module: The classifier's name, where it cannot be found without help.

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
        ['benign_loss', 'kl', 'feature_error', 'total_variation']
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method | None = None,
        *,
        moving: list[str] | None = None,
        freeze_batchnorm: bool = True,
        head_module: str | None = None,
    ) -> None:
        check_classifier(model)
        check_checkpointing(model)
        check_full_precision(model)
        self.method = method if method is not None else Method()
        if moving is None:
            moving = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.moving = list(moving)
        head_name, self.head = find_head(model, head_module)
        if all(name.startswith(f"{outermost_name(head_name)}.") for name in moving):
            raise ScopeError(
                f"Expected parameters of the backbone that require a gradient, found {', '.join(moving) or 'none'}: "
                "no feature could move. Choose them, as hf_immunize.vision.scope.select_trainable does."
            )
        self.still = modules_in_eval(model, moving, freeze_batchnorm, head_module)
        self.together = not has_batch_statistics(model, self.still)
        self.weighting = Weighting(self.method.rule)
        self.start = StartingModel(model) if self.method.needs_start else None
        # Micro-batches so far: the Trainer sees by it that none goes past the method.
        self.calls = 0
        # With a cached trunk, batches hold its activations, and within this context the model runs from them.
        self.replayed: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
        self._plain_model = model
        size = self.method.queue_size
        self._choice = RectifierChoice(model, self.moving) if self.method.looks_inside else None
        self._queues = {side: FeatureQueue(size) for side in ("benign", "harmful")} if size else {}

    def __call__(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        step: int,
        task_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
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

        Returns:
            Loss, terms and benign logits.

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
        for module in self.still:
            module.training = False
        counts = [len(batch[side]["pixel_values"]) for side in ("benign", "harmful")]
        benign_end, harmful_end = counts[0], sum(counts)
        rest = [batch[side]["pixel_values"] for side in ("harmful", "distillation") if side in batch]
        others = {"pixel_values": torch.cat(rest)}
        rectifiers = self._rectifiers_of(batch)
        with self.replayed(self._plain_model), ReluInputs(self._plain_model, rectifiers) as inside:
            features, logits, loss_features = forward_both(
                model, self.head, batch["benign"], others, together=self.together
            )
        ends = {"benign": features[:benign_end], "harmful": features[benign_end:harmful_end]}
        ends |= {"distillation": features[harmful_end:]} if "distillation" in batch else {}
        finite = {side: torch.isfinite(rows.detach()).all() for side, rows in ends.items()}
        if features.device.type == "cpu":  # elsewhere a look would stall the device; see `RunningMeans`
            self._check_sides(finite, batch, step)
        rectified = inside.values
        if rectifiers and not rectified and self._choice is not None and torch.is_grad_enabled():
            self._choice.names = []  # no gradient reaches what enters it: what moves comes after
        labels = batch["benign"].get("labels")
        if labels is None:
            self._check_unlabelled(add_task_loss)
        benign = Side(
            self._of_all_processes(features[:benign_end]),
            logits[:benign_end],
            labels,
            {name: values[:benign_end] for name, values in rectified.items()},
        )
        harmful = Side(
            self._of_all_processes(features[benign_end:harmful_end]),
            logits[benign_end:harmful_end],
            gather_labels(batch["harmful"].get("labels")) if self.method.needs_harmful_labels else None,
            {name: values[benign_end:harmful_end] for name, values in rectified.items()},
        )
        task_loss = task_loss or nn.functional.cross_entropy
        task = None
        if self.method.benign_loss != "distillation" and (add_task_loss or labels is not None):
            task = task_loss(logits[:benign_end], labels)
        distillation, logged, measured = self._distillation(
            batch, features, logits, benign_end, harmful_end, task_loss
        )
        if measured is not None:
            self.weighting.observe(measured, step)
        parts = [part for part in (task, distillation) if part is not None]
        benign_loss = torch.stack(parts).sum() if parts else logits.new_zeros(())
        added = benign_loss if add_task_loss else (distillation if distillation is not None else logits.new_zeros(()))
        terms = self.terms(benign, harmful, step)
        loss, weighed = self.weighting.weigh(
            added,
            terms,
            {"benign": benign.features, "harmful": harmful.features},
            lambda: self._benign_scale(benign_loss, benign, loss_features),
            step,
        )
        for side, queue in self._queues.items():
            queue.push(_rows({"benign": benign, "harmful": harmful}[side]))
        return StepResult(loss, {"benign_loss": benign_loss, **logged, **weighed}, logits[:benign_end], finite)

    @property
    def objective(self) -> str:
        """The objective by name; what "auto" stands for is known from the first step on."""
        if self.method.objective != "auto":
            return self.method.objective
        names = self._choice.names if self._choice is not None else []
        return "auto" if names is None else "silence" if names else "concentration"

    def _rectifiers_of(self, batch: dict[str, Any]) -> list[str]:
        """Rectifiers that the objective looks at; the first batch has the images to try them on."""
        if self._choice is None:
            return []
        if self._choice.names is not None:
            return self._choice.names
        both = [batch[side]["pixel_values"] for side in ("benign", "harmful")]

        def features(images: Tensor) -> Tensor:
            with torch.no_grad(), self.replayed(self._plain_model), HeadInput(self.head) as captured:
                released_logits(self._plain_model, images)
            return captured.features

        few = torch.cat([images[:2] for images in both])
        # A user who asks for rectifiers off by name gets them.
        sides = (lambda: (features(both[0]), features(both[1]))) if self.method.objective == "auto" else None
        return self._choice.seek(lambda: features(few), few.device, sides)

    def _of_all_processes(self, features: Tensor) -> Tensor | Hessian:
        """The global batch: features where rows are needed, else whichever of features and Hessian moves less."""
        rows = len(features) * world_size()
        needs_rows = world_size() == 1 or self._queues or self.method.needs_harmful_labels
        if needs_rows or not sum_is_smaller(rows, features.shape[1], features.dtype):
            return gather_features(features)
        return sum_hessian(features)

    def _distillation(
        self,
        batch: dict[str, Any],
        features: Tensor,
        logits: Tensor,
        benign_end: int,
        harmful_end: int,
        task_loss: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor | None, dict[str, Tensor], Tensor | None]:
        """The distillation loss, its parts by name, and what the budget is measured by; None where not wanted."""
        if self.start is None:
            return None, {}, None
        images = [batch[side]["pixel_values"] for side in ("benign", "distillation") if side in batch]
        with self.replayed(self._plain_model):
            start_features, start_logits = self.start(self._plain_model, self.head, torch.cat(images))
        rows = [slice(0, benign_end), slice(harmful_end, None)]
        kl = logit_divergence(torch.cat([logits[part] for part in rows]), start_logits)
        parts, loss, measured = {"kl": kl}, None, kl
        if self.method.benign_loss != "task":
            parts["feature_error"] = feature_error(torch.cat([features[part] for part in rows]), start_features)
            loss = kl + self.method.feature_distillation_weight * parts["feature_error"]
        if self.method.benign_budget is not None:
            now = (logits[:benign_end].detach(), start_logits[:benign_end], batch["benign"].get("labels"))
            measured, name = self._spent(kl, now, batch.get("held_out"), task_loss)
            parts |= {name: measured} if name != "kl" else {}
        return loss, parts, measured

    def _spent(
        self,
        kl: Tensor,
        trained: tuple[Tensor, Tensor, Tensor | None],
        held_out: dict[str, Any] | None,
        task_loss: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, str]:
        """How much of the budget is spent, and its name in the log: on held-out images where there are any."""
        logits, start_logits, labels = trained
        if held_out is not None:
            labels = held_out.get("labels")
            with self.replayed(self._plain_model):
                logits = released_logits(self._plain_model, held_out["pixel_values"])
                assert self.start is not None  # a budget needs the starting model
                _, start_logits = self.start(self._plain_model, self.head, held_out["pixel_values"])
        prefix = "" if held_out is None else "held_out_"
        if self.method.budget_measure == "kl":
            return (kl if held_out is None else logit_divergence(logits, start_logits)), f"{prefix}kl"
        if self.method.budget_measure == "total_variation":
            return total_variation(logits, start_logits, MOST_OF_AN_IMAGE), f"{prefix}total_variation"
        assert labels is not None  # checked before training began
        with torch.no_grad():
            return task_loss(logits, labels) - task_loss(start_logits, labels), f"{prefix}task_loss_rise"

    def _check_unlabelled(self, add_task_loss: bool) -> None:
        """Whether labels of the benign images can be missing."""
        method = self.method
        balanced = "auto" in (method.benign_weight, method.harmful_weight)
        spent = method.benign_budget is not None and method.budget_measure == "loss"
        if method.needs_labels and (add_task_loss or balanced or spent):
            raise DataError(
                f"Expected labels of the benign images, which benign_loss={method.benign_loss!r} with "
                f"budget_measure={method.budget_measure!r} needs, found none in the batch, which has "
                "'pixel_values' alone. Let the collator put them under 'labels', or use benign_loss='distillation'."
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

    def terms(self, benign: Side, harmful: Side, step: int) -> Terms:
        """The objective's terms; override it to minimize something else.

        Args:
            benign: The benign side of the batch.
            harmful: The harmful side.
            step: Optimizer steps done before this one.

        Returns:
            The terms, which the weighting weighs.

        Raises:
            ImmunizationError: One of its kinds, with objective and step, where a term is undefined.
        """
        sides = {"benign": benign, "harmful": harmful}
        for name, queue in self._queues.items():
            sides[name] = replace(sides[name], features=queue.join(_rows(sides[name])))
        try:
            return OBJECTIVES[self.method.objective](sides["benign"], sides["harmful"], self.method.scale_free)
        except ImmunizationError as error:
            raise type(error)(f"Objective {self.method.objective!r} at step {step + 1}: {error}") from error

    def _benign_scale(self, benign_loss: Tensor, benign: Side, loss_features: Tensor) -> Tensor:
        """The unit in which gradients of terms on the features are measured.

        A distillation loss starts at its minimum, where its gradient says nothing; that of the relative feature error
        at a displacement of ε is 2ε over the size of the features.
        """
        if self.method.benign_loss == "distillation":
            dtype = torch.promote_types(benign.features.dtype, torch.float32)
            if isinstance(benign.features, Hessian):
                return benign.features.matrix.detach().trace().rsqrt().to(dtype)
            return 1 / torch.linalg.vector_norm(benign.features.detach(), dtype=dtype)
        return self.weighting.benign_scale(mean_gradient_norm(gradient_norm(benign_loss, loss_features)))

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, queues, chosen rectifiers and starting tensors, with which a resumed run goes on exactly."""
        parts: dict[str, dict[str, Tensor]] = {"weighting": self.weighting.state_dict()}
        parts |= {f"queue_{side}": queue.state_dict() for side, queue in self._queues.items()}
        if self.start is not None:
            parts["start"] = self.start.state_dict()
        if self._choice is not None:
            parts["rectifiers"] = self._choice.state_dict()
        return {f"{part}/{name}": value for part, state in parts.items() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave.

        Args:
            state: Name to tensor.

        Raises:
            ArgumentError: If the starting tensors are of another model, scope or method.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in state.items():
            part, key = name.split("/", 1)
            parts.setdefault(part, {})[key] = value
        self.weighting.load_state_dict(parts["weighting"])
        for side, queue in self._queues.items():
            queue.load_state_dict(parts.get(f"queue_{side}", {}))
        if self._choice is not None:
            self._choice.load_state_dict(parts.get("rectifiers", {}))
        if self.start is not None:
            self.start.load_state_dict(parts.get("start", {}))


def _rows(side: Side) -> Tensor:
    assert isinstance(side.features, Tensor)  # where there is a queue, features are gathered
    return side.features
