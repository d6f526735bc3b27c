"""Model, arguments and data sets as a user gives them, checked and made ready before anything runs."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging

from hf_immunize.data.columns import find_columns, label_outputs, validate_labels
from hf_immunize.data.images import ImageRows
from hf_immunize.data.pairs import PairedDataset
from hf_immunize.data.streams import StreamedRows, is_stream
from hf_immunize.errors import ArgumentError, DataError, HeadError
from hf_immunize.text import library_words
from hf_immunize.training.arguments import ImmunizationArguments, Method
from hf_immunize.training.distributed import sharded_weights, world_size
from hf_immunize.vision.bare import with_linear_head
from hf_immunize.vision.head import to_full_precision, without_wrapper


logger = logging.get_logger(__name__)


def as_classifier(model: PreTrainedModel, args: ImmunizationArguments) -> PreTrainedModel:
    """The model to train, in float32 at least: a bare backbone gets the head that ``pooling`` asks for.

    What is done to the model is said in the log.
    """
    model = to_full_precision(model)
    if args.pooling is None:
        return model
    kind = type(model).__name__
    model = with_linear_head(model, pooling=args.pooling)
    kept = (
        ""
        if args.benign_loss == "task" and args.benign_budget is None
        else ", and stays near it: what holds the benign side to the starting model holds it to this head. Train the "
        "classifier first, or set benign_loss='task' and benign_budget=None"
    )
    logger.warning(
        f"The linear head of {model.config.num_labels} outputs on {kind} (pooling={args.pooling!r}) is new and "
        f"untrained: benign accuracy starts at chance{kept}."
    )
    return model


def check_classifier(model: Any) -> None:
    """Refuse a model whose task is not to choose one label out of several for an image.

    κ of the features is defined whatever the head does; the benign loss and accuracy that go with it are not.
    """
    plain = without_wrapper(model)
    kind = type(plain).__name__
    if not isinstance(plain, PreTrainedModel):
        raise ArgumentError(
            f"Expected a model of transformers (or one wrapped by peft.get_peft_model), found {kind}. Load it with "
            "AutoModelForImageClassification.from_pretrained; for a network of your own, use the functions of "
            "hf_immunize.training.objectives in your own loop."
        )
    if plain is model and getattr(model, "_hf_peft_config_loaded", False):
        raise ArgumentError(
            f"Expected adapters in a wrapper of PEFT, found some that {kind}.add_adapter put in place, which the "
            "Trainer cannot resume. Use peft.get_peft_model(model, config) on the model without them."
        )
    arguments = inspect.signature(type(plain).forward).parameters
    if "spatial_shapes" in arguments:
        raise HeadError(
            f"Expected a model that takes images of one size, found {kind}, which takes patches with their masks and "
            "shapes (NaFlex). Use a checkpoint of SigLIP 2 with a fixed resolution, such as "
            "google/siglip2-base-patch16-224, which is a SiglipForImageClassification."
        )
    if "pixel_values" not in arguments:
        raise HeadError(
            f"Expected a model that takes pixel_values, found {kind}, which takes {', '.join(list(arguments)[1:4])}."
        )
    labels = plain.config.num_labels
    if labels == 1 or plain.config.problem_type == "regression":
        raise HeadError(
            f"Expected a classifier of at least two labels, found a regression ({kind} with num_labels={labels}, "
            f"problem_type={plain.config.problem_type!r}). Load the model with num_labels= of the benign task."
        )
    if plain.config.problem_type == "multi_label_classification":
        raise HeadError(
            f"Expected one label an image, found {kind} with problem_type='multi_label_classification', whose "
            "accuracy is not defined. Set model.config.problem_type = 'single_label_classification' if each image "
            "has one label; for several, use the functions of hf_immunize.training.objectives in your own loop."
        )
    if kind.endswith("WithTeacher"):
        raise HeadError(
            f"Expected one head, found the two of {kind}, which is for inference alone: its logits are the mean of "
            f"both. Load the same checkpoint as {kind.removesuffix('WithTeacher')}."
        )


def check_checkpointing(model: Any, args: TrainingArguments | None = None) -> None:
    """Refuse reentrant activation checkpointing of a model of which a part is frozen.

    A reentrant block passes gradients to its own parameters only if its input has one, and the output of the frozen
    part has none: the last stage would stay where it is, without a word.
    """
    if all(parameter.requires_grad for parameter in model.parameters()):
        return
    asked = (
        args is not None
        and args.gradient_checkpointing
        and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    )
    set_up = any(
        getattr(module, "gradient_checkpointing", False)
        # transformers keeps it as a partial of torch.utils.checkpoint.checkpoint.
        and getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant")
        for module in model.modules()
    )
    if asked or set_up:
        raise ArgumentError(
            "Expected gradient checkpointing with use_reentrant=False, found use_reentrant=True, under which blocks "
            "behind a frozen part get no gradient. Leave gradient_checkpointing_kwargs at its default."
        )


def check_sharding(args: ImmunizationArguments, accelerator: Any = None, harmful_eval: Any = None) -> None:
    """Refuse what cannot be done where processes hold parts of the weights."""
    asked = bool(args.fsdp or args.deepspeed)
    sharded = asked if accelerator is None else sharded_weights()
    if asked and not sharded:
        raise ArgumentError(
            f"Expected accelerators for fsdp or deepspeed, found the device {args.device}, where accelerate leaves "
            "weights whole. Leave the option out there."
        )
    if not sharded:
        return
    if Method.of(args).needs_start:
        raise ArgumentError(
            "Expected benign_loss='task' and benign_budget=None under FSDP or DeepSpeed, found "
            f"benign_loss={args.benign_loss!r} and benign_budget={args.benign_budget}: these run the starting model "
            "through the trained one's modules, whose parameters are sharded there. Change them, or train with DDP."
        )
    if args.cache_trunk != "no":
        raise ArgumentError(
            f"Expected cache_trunk='no' under FSDP or DeepSpeed, found {args.cache_trunk!r}: the trunk's modules are "
            "replaced while the rest runs, which these do not see. Change it, or train with DDP."
        )
    if accelerator is None:
        return
    if accelerator.mixed_precision != "no":
        if harmful_eval is not None:
            raise ArgumentError(
                "Expected full precision under FSDP or DeepSpeed with harmful_eval_dataset=, found "
                f"{accelerator.mixed_precision}, in which alone sharded weights run then: κ would be mostly rounding "
                "noise. Leave harmful_eval_dataset out and measure the saved model, or train with DDP."
            )
        logger.warning(
            f"Evaluations will report no κ: weights that are sharded run in {accelerator.mixed_precision} alone, in "
            "which it would be mostly rounding noise. Measure the saved model."
        )
    if getattr(getattr(accelerator.state, "fsdp_plugin", None), "cpu_ram_efficient_loading", False):
        raise ArgumentError(
            "Expected cpu_ram_efficient_loading=False for FSDP, found True: each process measures its part of the "
            "data through the starting weights, before these are sharded. Set it to False."
        )


def check_shardable(model: Any, accelerator: Any) -> None:
    """Refuse a model that accelerate 1.15 cannot shard by FSDP2, which it would say in other words.

    It shards the input embeddings by themselves, and fails where a model does not name them, as convolutional ones,
    or where they lie within a module that is sharded too, as those of ViT by default.
    """
    if not accelerator.is_fsdp2:
        return
    # Here, since it takes longer to import than all else in this module, and hardly anyone needs it.
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    kind = type(without_wrapper(model)).__name__
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError as error:
        raise ArgumentError(
            f"Expected a model for FSDP whose input embeddings accelerate can find, found {kind}, which does not name "
            "any. Train it with DDP."
        ) from error
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.auto_wrap_policy
    if getattr(policy, "func", policy) is not transformer_auto_wrap_policy:
        return
    names = sorted(plugin.transformer_cls_names_to_wrap or model._no_split_modules or ())
    holding = {
        type(module).__name__
        for module in model.modules()
        if type(module).__name__ in names
        and module is not embeddings
        and any(part is embeddings for part in module.modules())
    }
    if holding:
        present = {type(module).__name__ for module in model.modules()} - holding
        rest = [name for name in names if name in present]
        raise ArgumentError(
            f"Expected modules for FSDP outside of which the input embeddings lie, found {', '.join(sorted(holding))} "
            f"of {kind}: accelerate shards the embeddings by themselves, and cannot shard them twice. Set "
            f"fsdp_config={{'transformer_layer_cls_to_wrap': {rest}}}."
        )


def check_prepared(accelerator: Any) -> None:
    """Refuse to evaluate weights that cannot be sharded yet."""
    if accelerator.is_fsdp2 and not accelerator._models:
        raise ArgumentError(
            "Expected train() before evaluate() under FSDP, found none: accelerate shards a model along with its "
            "optimizer alone. For the starting weights, set eval_on_start=True."
        )


def check_reporting(args: ImmunizationArguments) -> None:
    """Refuse to report to what is not installed."""
    for name in args.report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ImportError, RuntimeError, ValueError) as error:
            raise ArgumentError(
                f"Expected report_to={name!r} to be installed, found: {library_words(error)}. Install it, or set "
                "report_to='none'."
            ) from error


def check_arguments(args: Any) -> None:
    """Refuse arguments of another Trainer, and several GPUs in one process."""
    if not isinstance(args, ImmunizationArguments):
        raise ArgumentError(f"Expected args of type ImmunizationArguments, found {type(args).__name__}.")
    if args.n_gpu > 1:
        raise ArgumentError(
            f"Expected one GPU a process, found {args.n_gpu} in this one, over which κ of a batch would be torn "
            "apart. Start with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one of them."
        )


def check_batches(args: ImmunizationArguments, processes: int) -> None:
    """Refuse ways of dealing out batches that take benign and harmful images apart, or leave processes waiting."""
    config: Any = args.accelerator_config
    wrong, why = None, ""
    if config.dispatch_batches:
        wrong, why = "dispatch_batches=True", "it would cut all sides where the benign images end"
    elif processes > 1 and config.split_batches:
        wrong, why = "split_batches=True", "processes would get unequal numbers of harmful images"
    elif processes > 1 and not config.even_batches:
        wrong, why = "even_batches=False", "processes with fewer batches would keep the others waiting for ever"
    if wrong is not None:
        raise ArgumentError(
            f"Expected accelerator_config without {wrong}, found it: {why}. Leave it at its default; images that fill "
            "up the last batch of an evaluation are not counted twice."
        )
    if processes > 1 and not args.dataloader_drop_last:
        raise ArgumentError(
            f"Expected dataloader_drop_last=True on {processes} processes, found False: the last batch of an epoch "
            "would be filled up with images seen before, and processes would get unequal numbers of harmful ones. "
            "Leave it at its default; where the images are too few for a batch, lower per_device_train_batch_size."
        )


# Of fewer images, the mean divergence says little.
_FEWEST_HELD_OUT = 8


def image_rows(dataset: Any, name: str, args: ImmunizationArguments, config: Any, labels: str = "needed") -> Any:
    """A dataset as rows of an image (or pixel values) and a label."""
    if isinstance(dataset, ImageRows):
        return dataset
    # A streamed dataset has no length; `find_columns` says what to do about it.
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise DataError(f"Expected at least one image in {name}, found none. Check the split and its filters.")
    wanted = args.label_column_name if labels == "needed" else None
    try:
        image, label = find_columns(dataset, args.image_column_name, wanted, labels == "needed")
    except DataError as error:
        raise DataError(f"In {name}: {error}{_labels_are_for(name) if labels == 'needed' else ''}") from error
    if labels == "ignored" or label is None:
        return ImageRows(dataset, name, image)
    try:
        outputs = label_outputs(dataset, label, config, name)
    except DataError as error:
        if labels == "needed":
            raise
        logger.warning(f"{error} Until then, the labels are not used.")
        return ImageRows(dataset, name, image)
    validate_labels(dataset, label, config.num_labels if outputs is None else len(outputs), name)
    return ImageRows(dataset, name, image, label, config.num_labels, outputs)


def _labels_are_for(name: str) -> str:
    if name == "train_dataset":
        return " Labels are needed by benign_loss='task' and 'both', not by 'distillation'."
    return " Labels are needed for eval_loss and eval_accuracy; of the harmful data, none are."


def check_best_metric(args: ImmunizationArguments, harmful_eval: Any) -> None:
    """Refuse to choose the best model by a metric that evaluations will not have."""
    metric = args.metric_for_best_model or ""
    if harmful_eval is None and ("harmful_" in metric or metric.endswith("rir")):
        raise DataError(
            f"Expected harmful_eval_dataset= with metric_for_best_model={metric!r}, found none. Give harmful images "
            "to measure on, or choose a benign metric such as eval_accuracy."
        )


def side_rows(dataset: Any, name: str, args: ImmunizationArguments, config: Any, raw: bool = False) -> Any:
    """A dataset of a side that is trained on beside the benign one: stored or streamed, with labels if it has any."""
    needs_labels = name == "harmful_dataset" and Method.of(args).needs_harmful_labels
    if is_stream(dataset):
        if args.dataloader_num_workers:
            raise DataError(
                f"Expected dataloader_num_workers=0 with a streamed {name}, found {args.dataloader_num_workers}: its "
                "shards would be dealt out among them. Set it to 0 or store the data set."
            )
        label = args.label_column_name if needs_labels else None
        return StreamedRows(dataset, name, args.image_column_name, label, raw=raw)
    if raw:
        return dataset
    if not needs_labels or isinstance(dataset, ImageRows):
        return image_rows(dataset, name, args, config, labels="ignored")
    if len(dataset) == 0:
        raise DataError(f"Expected at least one image in {name}, found none. Check the split and its filters.")
    # Labels of the harmful task are its own; they need not be outputs of this model.
    try:
        image, label = find_columns(dataset, args.image_column_name, args.label_column_name, True)
    except DataError as error:
        raise DataError(
            f"In {name}: {error} Labels of the harmful images are needed by objective={args.objective!r}."
        ) from error
    return ImageRows(dataset, name, image, label)


def paired_rows(benign: Any, harmful: Any, args: ImmunizationArguments, distillation: Any = None) -> PairedDataset:
    """Benign, harmful and distillation rows as one dataset, long enough for a batch."""
    # ImageRows of harmful data have no labels unless the objective reads them; a user's own collator gets all items.
    benign, held_out = hold_out(benign, args)
    paired = PairedDataset(
        benign,
        harmful,
        harmful_labels=True,
        distillation=distillation,
        batch_sizes=args.batch_sizes,
        held_out=held_out,
    )
    batch, harmful_batch = (size * world_size() for size in (args.batch_sizes.benign, args.batch_sizes.harmful))
    if min(batch, harmful_batch) < 2:
        raise DataError(
            f"Expected global batches of at least 2, found {batch} benign and {harmful_batch} harmful: κ of a single "
            "image is 1. Raise per_device_train_batch_size and harmful_batch_size; gradient accumulation does not "
            "help, since κ is taken of each micro-batch."
        )
    if args.dataloader_drop_last and len(paired) < batch:
        raise DataError(
            f"Expected at least one full batch of {batch}, found {len(paired)} benign images. Lower "
            "per_device_train_batch_size or give more images."
        )
    return paired


def hold_out(benign: Any, args: ImmunizationArguments) -> tuple[Any, Any]:
    """Keep a part of the benign rows from training, to measure the budget on."""
    count = int(args.budget_holdout * len(benign))
    if args.benign_budget is None or count < _FEWEST_HELD_OUT:
        return benign, None
    seed = args.data_seed if args.data_seed is not None else args.seed
    order = np.random.default_rng([seed, len(benign)]).permutation(len(benign)).tolist()
    parts = sorted(order[count:]), sorted(order[:count])
    if isinstance(benign, ImageRows):
        return benign.subset(parts[0]), benign.subset(parts[1])
    return torch.utils.data.Subset(benign, parts[0]), torch.utils.data.Subset(benign, parts[1])
