"""Immunization added to someone else's Trainer: the regularizers as a callback."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from hf_immunize.data.images import ImageCollator, ImageRows, StreamedRows, is_stream
from hf_immunize.data.pairs import BatchSizes, PairedDataset, PairedSampler, check_one_shape
from hf_immunize.errors import ArgumentError, CheckpointError, DataError
from hf_immunize.files import staged_directory
from hf_immunize.training.arguments import Method
from hf_immunize.training.checkpoints import load_step, load_weights, save_step
from hf_immunize.training.checks import columns
from hf_immunize.training.choice import draw_sample
from hf_immunize.training.distributed import sharded_weights, world_size
from hf_immunize.training.step import ImmunizationStep, RunningMeans


_STEP_FILE = "immunization_callback.safetensors"


class ImmunizationCallback(TrainerCallback):
    """Add the immunization loss to the training of an unmodified `transformers.Trainer`.

    For users whose Trainer is a subclass of someone else's, which keeps the task's own loss. At the beginning of each
    optimizer step the callback runs benign and harmful images of its own through the model and adds the gradient of
    regularizers and distillation to ``.grad``: once a step whatever the accumulation, within what gradient clipping
    sees, at the scale of fp16's loss scaler, and averaged over processes by DDP. What requires a gradient is trained
    (see `select_trainable`); no harmful image reaches running statistics.

    Compared with `ImmunizationTrainer` it costs a forward and backward pass over benign images more, and measures no
    κ in evaluations; terms are in ``trainer.state.log_history``. DeepSpeed and FSDP, which own the gradients, are
    refused.

    Args:
        harmful_dataset: Harmful images, stored or streamed; labels are needed by ``objective="imma"`` alone.
        benign_dataset: Benign images; by default the Trainer's training data, collated as the Trainer does. Labels
            are needed by ``benign_loss="task"`` and "both".
        distillation_dataset: Any images on which the model shall stay what it was.
        processing_class: Image processor, where these data sets hold images rather than ``pixel_values``.
        batch_size: Images of each side a process and step; by default the Trainer's.
        head_module: The classifier's name, where it cannot be found without help.
        image_column_name: Column of images (or of pixel values) in these data sets, likewise.
        label_column_name: Column of labels, likewise.
        seed: Seed of the callback's draws; by default the Trainer's.
        **method: The settings of `Method`, such as ``objective="kappa"`` or ``harmful_weight=0.1``.

    Raises:
        ArgumentError: At once, for unknown or impossible settings.
        DataError, HeadError: At the beginning of training, where data are missing or the model cannot be immunized.
        CheckpointError: On resuming, where the checkpoint was written without this callback.

    Example:
        >>> harmful = [{"pixel_values": torch.randn(3, 8, 8)} for _ in range(8)]
        >>> callback = ImmunizationCallback(harmful, objective="r_ill", benign_loss="task")
        >>> callback.method.objective
        'r_ill'
    """

    def __init__(
        self,
        harmful_dataset: Any,
        benign_dataset: Any = None,
        distillation_dataset: Any = None,
        *,
        processing_class: Any = None,
        batch_size: int | None = None,
        head_module: str | None = None,
        image_column_name: str | None = None,
        label_column_name: str | None = None,
        seed: int | None = None,
        **method: Any,
    ) -> None:
        unknown = sorted(set(method) - set(Method.__dataclass_fields__))
        if unknown:
            raise ArgumentError(
                f"Expected settings out of {', '.join(Method.__dataclass_fields__)}, found {', '.join(unknown)}."
            )
        self.method = Method(**method)
        self.batch_size = batch_size
        self.head_module = head_module
        self._columns = image_column_name, label_column_name
        self.seed = seed
        self._datasets = (benign_dataset, harmful_dataset, distillation_dataset)
        self._collator = ImageCollator(processing_class)
        self._step: ImmunizationStep | None = None
        self._means = RunningMeans()

    # ---- the Trainer's events ----

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Find the head, keep the starting weights, prepare the data; on resuming, load the state of the run."""
        if args.deepspeed or getattr(args, "fsdp", None) or sharded_weights():
            raise ArgumentError(
                "Expected plain or distributed data parallel training with ImmunizationCallback, found DeepSpeed or "
                "FSDP, which own the gradients. Use ImmunizationTrainer there."
            )
        self._means = RunningMeans()
        self._step = ImmunizationStep(kwargs["model"], self.method, head_module=self.head_module)
        self._prepare_data(args, kwargs.get("train_dataloader"))
        if state.global_step > 0:
            folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            if not os.path.isfile(os.path.join(folder, _STEP_FILE)):
                raise CheckpointError(
                    f"Expected {_STEP_FILE} in {folder}, found none: the starting weights and the state of the "
                    "immunization are lost. Resume from a checkpoint written with this callback, or start anew."
                )
            load_step(self._step, os.path.join(folder, _STEP_FILE))
            # As of transformers 5.23 a plain Trainer leaves whole blocks of a ViT at the values they had before.
            if isinstance(kwargs["model"], PreTrainedModel):
                load_weights(kwargs["model"], folder)
        device, seed = next(kwargs["model"].parameters()).device, self._sampler.seed
        self._step.prepare(lambda: draw_sample(self._data, seed, device, self._collate_benign, self._collator))

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the gradient of this step, before the Trainer's own backward passes."""
        assert self._step is not None  # training has begun
        model: nn.Module = kwargs["model"]
        batch = send_to_device(self._draw(state.global_step), next(model.parameters()).device)
        modes = {module: module.training for module in model.modules()}
        try:
            result = self._step(model, batch, state.global_step, add_task_loss=False)
        finally:
            for module, training in modes.items():
                module.training = training
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        loss = result.loss if scaler is None else scaler.scale(result.loss)
        loss.backward()
        self._means.update(result.logged, state.global_step + 1, result.finite)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        """Log the means of all terms with the Trainer's loss."""
        if logs is not None and "loss" in logs:
            means = self._means.take(state.global_step)
            logs.update(means)
            # The Trainer has put its own copy there before it calls the callbacks.
            state.log_history[-1].update(means)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what a resumed run needs into the checkpoint."""
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        if self._step is not None and state.is_world_process_zero and os.path.isdir(folder):
            with staged_directory(folder) as staging:
                save_step(self._step, staging / _STEP_FILE)

    # ---- data ----

    def _prepare_data(self, args: Any, train_dataloader: Any) -> None:
        benign, harmful, distillation = self._datasets
        batch = self.batch_size or args.per_device_train_batch_size
        if batch < 2:
            raise DataError(
                f"Expected batch_size= of at least 2, found {batch}: κ of a single image is 1. Raise it, or "
                "per_device_train_batch_size."
            )
        self._collate_benign = self._collator
        if benign is None:
            benign = getattr(train_dataloader, "dataset", None)
            if isinstance(benign, PairedDataset):
                raise ArgumentError(
                    "Expected a Trainer that does not immunize, found an ImmunizationTrainer: its steps have the "
                    "regularizers already. Leave ImmunizationCallback out."
                )
            if not hasattr(benign, "__len__"):
                raise DataError(
                    "Expected benign_dataset=, since the Trainer's training data cannot be indexed, found none. Give "
                    "the callback a stored data set of benign images."
                )
            self._collate_benign = train_dataloader.collate_fn
        else:
            benign = self._rows(benign, "benign_dataset")
        self._data = PairedDataset(
            benign,
            self._rows(harmful, "harmful_dataset"),
            harmful_labels=True,
            distillation=None if distillation is None else self._rows(distillation, "distillation_dataset"),
            batch_sizes=BatchSizes(batch, batch, max(1, batch // 2)),
        )
        seed = next(seed for seed in (self.seed, args.data_seed, args.seed) if seed is not None)
        self._sampler: PairedSampler = self._data.make_sampler(seed)
        self._epoch = -1

    def _rows(self, dataset: Any, name: str) -> Any:
        image, label = self._columns
        needed = {"harmful_dataset": self.method.needs_harmful_labels, "benign_dataset": self.method.needs_labels}
        needs_label = needed.get(name, False)
        if is_stream(dataset) and name != "benign_dataset":  # whose length makes the epochs
            return StreamedRows(dataset, name, image, label if needs_label else None)
        image, label = columns(dataset, name, image, label, needs_label)
        return ImageRows(dataset, name, image, label if needs_label else None)

    def _draw(self, step: int) -> dict[str, Any]:
        """This process's batch of a step, a function of the step alone."""
        size = self._data.batch_sizes.benign
        per_epoch = max(1, len(self._data) // size)
        rank = torch.distributed.get_rank() if world_size() > 1 else 0
        epoch, within = divmod(step * world_size() + rank, per_epoch)
        if epoch != self._epoch:
            self._sampler.set_epoch(epoch)
            self._draws, self._epoch = list(self._sampler), epoch
        items = [self._data[draw] for draw in self._draws[within * size : (within + 1) * size]]
        batch = {"benign": self._collate_benign([item["benign"] for item in items])}
        sides = {side: [row for item in items for row in item[side]] for side in ("harmful", "distillation")}
        batch |= {side: self._collator(rows) for side, rows in sides.items() if rows}
        check_one_shape(batch)
        return batch
