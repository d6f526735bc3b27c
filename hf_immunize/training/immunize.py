"""The common case in one call: a model, benign and harmful images in; an immunized checkpoint with its record out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, PreTrainedModel

from hf_immunize.data.sources import HeldOut, divide
from hf_immunize.data.views import to_distil_on
from hf_immunize.hub.card import summary_sentence
from hf_immunize.hub.record import ImmunizationRecord, read_record
from hf_immunize.training.arguments import ImmunizationArguments
from hf_immunize.training.trainer import ImmunizationTrainer
from hf_immunize.vision.loading import load_classifier


def immunize(
    model: str | os.PathLike[str] | PreTrainedModel,
    benign: Any,
    harmful: Any,
    output_dir: str | os.PathLike[str] = "immunized",
    *,
    processing_class: Any = None,
    distillation: Any = None,
    **arguments: Any,
) -> tuple[PreTrainedModel, ImmunizationRecord]:
    """Immunize an image classifier against what the harmful images show, measure it, and save it.

    Of each side 30 % of the images are held out to measure on, unless it has a validation or test split.

    Args:
        model: A classifier that has learned the benign task, or its folder or name on the Hub.
        benign: Benign images with labels: a `datasets.Dataset` or `DatasetDict`, a folder, parquet files, or a name on
            the Hub.
        harmful: Harmful images, likewise; labels, where there are any, serve to measure how long a probe takes.
        output_dir: Folder for the checkpoint and its record, ``immunization.json``.
        processing_class: The image processor; by default the one beside the model.
        distillation: Images, without labels, on which the model shall stay what it was too; by default `Views` of
            the benign ones, "none" for none.
        **arguments: Further `ImmunizationArguments`, such as ``max_steps=2000``.

    Returns:
        The immunized model, and its record.

    Raises:
        ArgumentError, DataError, HeadError, ScopeError: Before anything runs; each says what to do.

    Example:
        >>> import datasets, tempfile, torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        ...                    image_size=8, patch_size=4, num_labels=2)
        >>> images = [{"pixel_values": torch.randn(3, 8, 8).tolist(), "label": i % 2} for i in range(40)]
        >>> data = datasets.Dataset.from_list(images).with_format("torch")
        >>> quiet = {"use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "per_device_train_batch_size": 8}
        >>> model, record = immunize(  # doctest: +ELLIPSIS
        ...     ViTForImageClassification(config), data, data, tempfile.mkdtemp(), max_steps=2, **quiet)
        {'train_runtime': ...
        >>> record.method.objective, sorted(record.ratios)
        ('time', ['exact', 'intercept'])
    """
    args = ImmunizationArguments(str(output_dir), **{"report_to": "none", "save_strategy": "no", **arguments})
    if not isinstance(model, PreTrainedModel):
        if processing_class is None:
            processing_class = AutoImageProcessor.from_pretrained(model)
        model = load_classifier(model)
    draw = HeldOut(seed=args.seed)
    good, bad = divide(benign, draw, name="benign images"), divide(harmful, draw, name="harmful images")
    if distillation is None or isinstance(distillation, (str, os.PathLike)):
        source = None if distillation is None else os.fspath(distillation)
        options: dict[str, Any] = {"image_column": args.image_column_name, "seed": args.seed}
        distillation = to_distil_on(source, good.train, distils=args.benign_loss != "task", **options)
    trainer = ImmunizationTrainer(
        model,
        args,
        train_dataset=good.train,
        harmful_dataset=bad.train,
        distillation_dataset=distillation,
        eval_dataset=good.test,
        harmful_eval_dataset=bad.test,
        processing_class=processing_class,
    )
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(summary_sentence(trainer.starting_metrics, after, trainer.warning))
    return trainer.model, read_record(Path(args.output_dir))
