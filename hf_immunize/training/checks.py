"""Model, arguments and data sets as a user gives them, checked and made ready before anything runs."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging

from hf_immunize.data.columns import find_columns, has_classes, label_outputs, validate_labels
from hf_immunize.data.images import ImageRows, OnePass, StreamedRows, is_stream
from hf_immunize.data.pairs import PairedDataset
from hf_immunize.errors import ArgumentError, DataError, HeadError
from hf_immunize.text import library_words
from hf_immunize.training.arguments import ImmunizationArguments, Method
from hf_immunize.training.distributed import sharded_weights, world_size
from hf_immunize.vision.bare import with_linear_head
from hf_immunize.vision.head import to_full_precision, without_wrapper


logger = logging.get_logger(__name__)


_GATHERED = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
_OWN_LOOP = "use the functions of hf_immunize.training.objectives in your own loop"


def as_classifier(model: PreTrainedModel, args: ImmunizationArguments) -> PreTrainedModel:
    """The model to train, in float32 at least: a bare backbone gets the head that ``pooling`` asks for."""
    model = to_full_precision(model)
    # Of FSDP2 or a tensor-parallel plan, and of ZeRO 3.
    if any(hasattr(part, "full_tensor") or hasattr(part, "ds_id") for part in model.parameters()):
        raise ArgumentError(
            f"Expected a {type(model).__name__} with whole weights, found them loaded in parts, of which no process "
            "could keep or measure the starting model. Load it without distributed_config= or tp_plan=; for ZeRO 3, "
            "before its ImmunizationArguments are made (with a launcher, zero3_init_flag: false)."
        )
    if args.pooling is None:
        return model
    kind = type(model).__name__
    model = with_linear_head(model, pooling=args.pooling)
    held = ", and is held near it: train the classifier first, or set benign_loss='task'"
    logger.warning(
        f"The linear head of {model.config.num_labels} outputs on {kind} (pooling={args.pooling!r}) is new and "
        f"untrained: benign accuracy starts at chance{held if Method.of(args).needs_start else ''}."
    )
    return model


def check_classifier(model: Any) -> None:
    """Refuse a model whose task is not to choose one label out of several for an image."""
    # κ of the features is defined whatever the head does; the benign loss and accuracy that go with it are not.
    plain = without_wrapper(model)
    kind = type(plain).__name__
    if not isinstance(plain, PreTrainedModel):
        raise ArgumentError(
            f"Expected a model of transformers (or one wrapped by peft.get_peft_model), found {kind}. For a network "
            f"of your own, {_OWN_LOOP}."
        )
    if plain is model and getattr(model, "_hf_peft_config_loaded", False):
        raise ArgumentError(
            f"Expected adapters in a wrapper of PEFT, found some of {kind}.add_adapter, which the Trainer cannot "
            "resume. Use peft.get_peft_model(model, config) on the model without them."
        )
    arguments = list(inspect.signature(type(plain).forward).parameters)
    labels, problem = plain.config.num_labels, plain.config.problem_type
    wrong = None
    if "spatial_shapes" in arguments:
        wrong = (
            f"a model that takes images of one size, found {kind}, which takes patches of any number (NaFlex). Use a "
            "checkpoint with a fixed resolution, such as google/siglip2-base-patch16-224."
        )
    elif "pixel_values" not in arguments:
        wrong = f"a model that takes pixel_values, found {kind}, which takes {', '.join(arguments[1:4])}."
    elif labels == 1 or problem == "regression":
        wrong = (
            f"a classifier of at least two labels, found a regression ({kind} with num_labels={labels}, "
            f"problem_type={problem!r}). Load the model with num_labels= of the benign task."
        )
    elif problem == "multi_label_classification":
        wrong = (
            f"one label an image, found {kind} with problem_type={problem!r}. Set 'single_label_classification' in "
            f"its config if each image has one; for several, {_OWN_LOOP}."
        )
    elif kind.endswith("WithTeacher"):
        wrong = (
            f"one head, found the two of {kind}, which is for inference alone. Load the same checkpoint as "
            f"{kind.removesuffix('WithTeacher')}."
        )
    if wrong is not None:
        raise HeadError(f"Expected {wrong}")


def check_checkpointing(model: Any, args: TrainingArguments | None = None) -> None:
    """Refuse reentrant activation checkpointing of a model of which a part is frozen."""
    # A reentrant block passes gradients to its own parameters only if its input has one; what is frozen gives none.
    if all(parameter.requires_grad for parameter in model.parameters()):
        return
    asked = args is not None and args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {})
    set_up = [
        # transformers keeps it as a partial of torch.utils.checkpoint.checkpoint.
        getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    ]
    if any(options.get("use_reentrant") for options in (asked or {}, *set_up)):
        raise ArgumentError(
            "Expected gradient checkpointing with use_reentrant=False, found use_reentrant=True, under which blocks "
            "behind a frozen part get no gradient. Leave gradient_checkpointing_kwargs at its default."
        )


def check_sharding(args: ImmunizationArguments, accelerator: Any = None, harmful_eval: Any = None) -> None:
    """Refuse what cannot be done where processes hold parts of the weights, or of the images."""
    parallel = getattr(args if accelerator is None else accelerator, "parallelism_config", None)
    if parallel is not None and parallel.non_data_parallel_size > 1:
        raise ArgumentError(
            f"Expected parallelism over images alone, found parallelism_config of {parallel.non_dp_dim_names}, under "
            "which several processes hold the same images and κ of a batch would count them several times. Leave "
            "tensor, context and sequence parallelism out."
        )
    asked = bool(args.fsdp or args.deepspeed)
    sharded = asked if accelerator is None else sharded_weights()
    if asked and not sharded:
        raise ArgumentError(
            f"Expected accelerators for fsdp or deepspeed, found the device {args.device}, where accelerate leaves "
            "weights whole. Leave the option out there."
        )
    if not sharded:
        return
    if args.cache_trunk != "no":
        raise ArgumentError(
            "Expected cache_trunk='no' under FSDP or DeepSpeed, which do not see that the trunk's modules are "
            f"replaced, found {args.cache_trunk!r}. Change it, or train with DDP."
        )
    if accelerator is None:
        return
    if accelerator.mixed_precision != "no":
        if harmful_eval is not None:
            raise ArgumentError(
                "Expected full precision under FSDP or DeepSpeed with harmful_eval_dataset=, found "
                f"{accelerator.mixed_precision}, in which κ is rounding noise. Leave the option out and measure the "
                "saved model, or train with DDP."
            )
        logger.warning(
            f"Evaluations will report no κ: sharded weights run in {accelerator.mixed_precision} alone, in which it "
            "would be mostly rounding noise. Measure the saved model."
        )
    wrong = None
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    zero = getattr(getattr(accelerator.state, "deepspeed_plugin", None), "hf_ds_config", None)
    if getattr(plugin, "cpu_ram_efficient_loading", False):
        wrong = (
            "cpu_ram_efficient_loading=False for FSDP, found True: each process measures its part of the data through "
            "the starting weights. Set it to False."
        )
    elif getattr(plugin, "fsdp_version", 2) != 2:
        wrong = f"version 2 of FSDP, found {plugin.fsdp_version}, which transformers drops. Set fsdp_version to 2."
    elif "SHARDED" in str(getattr(plugin, "state_dict_type", "")):
        wrong = (
            "FULL_STATE_DICT for FSDP, found SHARDED_STATE_DICT, under which no model is saved that could be loaded. "
            "Set state_dict_type to FULL_STATE_DICT."
        )
    elif zero is not None and zero.is_zero3() and zero.get_value(_GATHERED) is not True:
        wrong = (
            f"{_GATHERED}=true for DeepSpeed, found {zero.get_value(_GATHERED)}, under which no model is saved that "
            "could be loaded. Set it (zero3_save_16bit_model, with a launcher)."
        )
    if wrong is not None:
        raise ArgumentError(f"Expected {wrong}")


def check_shardable(model: Any, accelerator: Any) -> None:
    """Refuse a model that accelerate cannot shard by FSDP2, and leave its embeddings out of what is wrapped."""
    if not accelerator.is_fsdp2:
        return
    # Here, since it takes longer to import than all else in this module, and hardly anyone needs it.
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    kind = type(without_wrapper(model)).__name__
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError as error:
        raise ArgumentError(
            f"Expected a model whose input embeddings accelerate can find for FSDP, found {kind}. Train it with DDP."
        ) from error
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.auto_wrap_policy
    if getattr(policy, "func", policy) is not transformer_auto_wrap_policy:
        return
    wrapped = set(plugin.transformer_cls_names_to_wrap or model._no_split_modules or ())
    modules = [module for module in model.modules() if type(module).__name__ in wrapped]
    around = [module for module in modules if module is not embeddings and embeddings in list(module.modules())]
    holding, present = ({type(module).__name__ for module in each} for each in (around, modules))
    if holding and plugin.transformer_cls_names_to_wrap:
        raise ArgumentError(
            f"Expected modules for FSDP without the input embeddings, which would be sharded twice, found {kind}'s "
            f"{', '.join(sorted(holding))}. Leave transformer_layer_cls_to_wrap at its default."
        )
    if holding:  # of the model's own list
        plugin.transformer_cls_names_to_wrap = sorted(present - holding)


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
            f"Expected one GPU per process, found {args.n_gpu}, over which κ of a batch would be torn apart. Start "
            "with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one of them."
        )


def check_batches(args: ImmunizationArguments, processes: int) -> None:
    """Refuse ways of dealing out batches that take benign and harmful images apart, or leave processes waiting."""
    config: Any = args.accelerator_config
    wrong = None
    if config.dispatch_batches:
        wrong = "dispatch_batches=True, found it: it would cut all sides where the benign images end"
    elif processes > 1 and config.split_batches:
        wrong = "split_batches=True, found it: processes would get unequal numbers of harmful images"
    elif processes > 1 and not config.even_batches:
        wrong = "even_batches=False, found it: processes with fewer batches would keep the others waiting for ever"
    if wrong is not None:
        raise ArgumentError(f"Expected accelerator_config without {wrong}. Leave it at its default.")
    if processes > 1 and not args.dataloader_drop_last:
        raise ArgumentError(
            f"Expected dataloader_drop_last=True on {processes} processes, found False: they would get unequal "
            "numbers of harmful images. Leave it at its default; for few images, lower per_device_train_batch_size."
        )


def image_rows(dataset: Any, name: str, args: ImmunizationArguments, config: Any, labels: str = "needed") -> Any:
    """A dataset as rows of an image (or pixel values) and of an output's index; with labels "own", of its classes."""
    if isinstance(dataset, (ImageRows, OnePass)):
        return dataset
    if is_stream(dataset):
        streamed = _streamed(dataset, name, args, raw=True)
        rows = image_rows(streamed.first, name, args, config, labels)
        # Of what comes later, nothing tells whether it has classes.
        label = None if labels == "own" else rows.label_column
        streamed.about = rows.image_column, label, rows.num_labels, rows.outputs
        return streamed if name == "train_dataset" else OnePass(streamed)
    needed = labels == "needed"
    about = (
        "Labels are needed by benign_loss='task' and 'both', not by 'distillation'."
        if name == "train_dataset"
        else "Labels are needed for eval_loss and eval_accuracy; of the harmful data, none are."
    )
    image, label = columns(dataset, name, args.image_column_name, args.label_column_name, needed, about)
    if labels == "own" or label is None:
        return ImageRows(dataset, name, image, label if label is not None and has_classes(dataset, label) else None)
    try:
        outputs = label_outputs(dataset, label, config, name)
    except DataError as error:
        if needed:
            raise
        logger.warning(f"{error} Until then, the labels are not used.")
        return ImageRows(dataset, name, image)
    validate_labels(dataset, label, config.num_labels if outputs is None else len(outputs), name)
    return ImageRows(dataset, name, image, label, config.num_labels, outputs)


def columns(
    dataset: Any, name: str, image: str | None, label: str | None, needed: bool, about_labels: str = ""
) -> tuple[str, str | None]:
    """The image column of a data set, and the label column if there is one; refuses one without what is needed."""
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise DataError(f"Expected at least one image in {name}, found none. Check the split and its filters.")
    try:
        return find_columns(dataset, image, label if needed else None, needed)
    except DataError as error:
        raise DataError(f"In {name}: {error} {about_labels if needed else ''}".rstrip()) from error


def check_best_metric(args: ImmunizationArguments, harmful_eval: Any) -> None:
    """Refuse to choose the best model by a metric that evaluations will not have."""
    metric = args.metric_for_best_model or ""
    if harmful_eval is None and ("harmful_" in metric or metric.endswith("rir")):
        raise DataError(
            f"Expected harmful_eval_dataset= with metric_for_best_model={metric!r}, found none. Give it, or choose a "
            "benign metric such as eval_accuracy."
        )


def side_rows(dataset: Any, name: str, args: ImmunizationArguments, config: Any, raw: bool = False) -> Any:
    """A dataset that is trained on beside the benign one, stored or streamed, with labels if it needs any."""
    needed = name == "harmful_dataset" and Method.of(args).needs_harmful_labels
    if is_stream(dataset):
        return _streamed(dataset, name, args, args.label_column_name if needed else None, raw=raw)
    if raw or isinstance(dataset, ImageRows):
        return dataset
    # Labels of the harmful task are its own; they need not be outputs of this model.
    about = f"Labels of the harmful images are needed by objective={args.objective!r}."
    image, label = columns(dataset, name, args.image_column_name, args.label_column_name, needed, about)
    return ImageRows(dataset, name, image, label if needed else None)


def _streamed(dataset: Any, name: str, args: Any, label: str | None = None, *, raw: bool) -> StreamedRows:
    if args.dataloader_num_workers:
        raise DataError(
            f"Expected dataloader_num_workers=0 with a streamed {name}, found {args.dataloader_num_workers}: its "
            "shards would be dealt out among them. Set it to 0 or store the data set."
        )
    return StreamedRows(dataset, name, args.image_column_name, label, raw=raw)


def paired_rows(benign: Any, harmful: Any, args: ImmunizationArguments, distillation: Any = None) -> PairedDataset:
    """Benign, harmful and distillation rows as one dataset, long enough for a batch."""
    # ImageRows of harmful data have no labels unless the objective reads them; a user's own collator gets all items.
    sizes = args.batch_sizes
    batch, harmful_batch = sizes.benign * world_size(), sizes.harmful * world_size()
    # A stream has no epoch but the run.
    count = 0 if hasattr(benign, "__len__") else args.max_steps * args.gradient_accumulation_steps * batch
    if count < 0:
        raise DataError(
            "Expected max_steps with a streamed train_dataset, whose length is not known, found epochs. Say how many "
            "steps to take."
        )
    paired = PairedDataset(benign, harmful, True, distillation, sizes, count)
    if min(batch, harmful_batch) < 2:
        raise DataError(
            f"Expected global batches of at least 2, found {batch} benign and {harmful_batch} harmful: κ of one image "
            "is 1. Raise per_device_train_batch_size and harmful_batch_size; accumulation of gradients does not help."
        )
    if args.dataloader_drop_last and len(paired) < batch:
        raise DataError(
            f"Expected at least one full batch of {batch}, found {len(paired)} benign images. Lower "
            "per_device_train_batch_size or give more images."
        )
    return paired
