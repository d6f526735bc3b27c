"""What a model must be for the Trainer, checked before anything runs."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging

from hf_immunize.errors import ArgumentError, HeadError
from hf_immunize.text import library_words
from hf_immunize.training.arguments import ImmunizationArguments
from hf_immunize.training.method import Method
from hf_immunize.training.restoring import sharded_weights
from hf_immunize.vision.adapters import without_wrapper
from hf_immunize.vision.bare import with_linear_head
from hf_immunize.vision.precision import to_full_precision


logger = logging.get_logger(__name__)


def as_classifier(model: PreTrainedModel, args: ImmunizationArguments) -> PreTrainedModel:
    """The model to train, in float32 at least: a bare backbone gets the head that ``pooling`` asks for.

    What is done to the model is said in the log.

    Args:
        model: As the user gave it.
        args: For ``pooling``, see `with_linear_head`; None for a model that has a head.

    Returns:
        A model with a head, on whose outputs the benign task is learned.

    Raises:
        HeadError: If a classifier is given with ``pooling``.
        ArgumentError: If ``pooling`` is unknown, or the weights are quantized.
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

    Args:
        model: A model of transformers, wrapped by PEFT or not.

    Raises:
        ArgumentError: If it is no model of transformers, or adapters were put into it without PEFT's wrapper.
        HeadError: If it does not learn such a task from images alone.
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

    Args:
        model: The model, with ``requires_grad`` set.
        args: The Trainer's arguments, where there is one.

    Raises:
        ArgumentError: If the arguments or the model itself ask for it.
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
    """Refuse what cannot be done where processes hold parts of the weights.

    Args:
        args: The Trainer's arguments.
        accelerator: The Trainer's; None before there is one. Only it knows what `accelerate launch` asks for.
        harmful_eval: Harmful data to measure on, or None.

    Raises:
        ArgumentError: Under FSDP or DeepSpeed, if the method needs the starting model, the trunk is cached, κ of
            harmful data is wanted under mixed precision, or processes begin without their own starting weights.
    """
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

    Args:
        model: The model.
        accelerator: The Trainer's.

    Raises:
        ArgumentError: Under FSDP2, for such a model.
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
    """Refuse to evaluate weights that cannot be sharded yet.

    Args:
        accelerator: The Trainer's.

    Raises:
        ArgumentError: Under FSDP2, before training.
    """
    if accelerator.is_fsdp2 and not accelerator._models:
        raise ArgumentError(
            "Expected train() before evaluate() under FSDP, found none: accelerate shards a model along with its "
            "optimizer alone. For the starting weights, set eval_on_start=True."
        )


def check_reporting(args: ImmunizationArguments) -> None:
    """Refuse to report to what is not installed.

    Args:
        args: The Trainer's arguments.

    Raises:
        ArgumentError: If ``report_to`` names it, or nothing that is known.
    """
    for name in args.report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ImportError, RuntimeError, ValueError) as error:
            raise ArgumentError(
                f"Expected report_to={name!r} to be installed, found: {library_words(error)}. Install it, or set "
                "report_to='none'."
            ) from error


def check_batches(args: ImmunizationArguments, processes: int) -> None:
    """Refuse ways of dealing out batches that take benign and harmful images apart, or leave processes waiting.

    Args:
        args: The Trainer's arguments.
        processes: How many there are.

    Raises:
        ArgumentError: If accelerator_config or dataloader_drop_last ask for it.
    """
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
