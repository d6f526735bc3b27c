"""``hf-immunize train``: from a model and two sets of images to an immunized checkpoint with its figures."""

from __future__ import annotations

import json
import math
from argparse import ArgumentParser, RawTextHelpFormatter
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from datasets import ClassLabel, DatasetDict
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser, set_seed
from transformers.utils import logging

from hf_immunize.errors import ArgumentError, DataError
from hf_immunize.hub.card import CardFacts, metric_rows, write_card
from hf_immunize.training.arguments import ImmunizationArguments
from hf_immunize.training.figures import draw_spectra, new_figure, save_figure
from hf_immunize.training.trainer import ImmunizationTrainer
from hf_immunize.vision.columns import find_columns
from hf_immunize.vision.data import split_benign_harmful
from hf_immunize.vision.sources import load_image_dataset


logger = logging.get_logger(__name__)

_DESCRIPTION = """\
Immunize an image classifier against a harmful task.

  hf-immunize train --model google/vit-base-patch16-224 --benign my/pets --harmful my/weapons --output_dir runs/pets
  hf-immunize train --model ./my-model --dataset ./images --harmful_classes rifle pistol --output_dir runs/mine
  hf-immunize train --config arguments.yaml --learning_rate 0.001        (flags override the file)

Data are folders of images (one subfolder a class), folders written by save_to_disk, parquet files, or names on the
Hub. Harmful images need no labels. Every flag of transformers.TrainingArguments works as usual.
"""


@dataclass
class DataArguments:
    """What to immunize and on which images.

    Args:
        model: Hub id or folder of an image classifier.
        benign: Benign images with labels.
        harmful: Harmful images.
        dataset: One data set with both, in place of `benign` and `harmful`.
        harmful_classes: Its harmful classes, by name or number.
        benign_eval, harmful_eval: Images to measure on; by default the source's validation or test split, else a part
            held out by `eval_fraction`.
        eval_fraction: That part.
        model_revision: Branch, tag or commit on the Hub.
        new_head: Replace the classifier by a new one for the benign classes.
        trust_remote_code: Run code that comes with the model.
        max_images: At most so many images of each set (for a first try).
    """

    model: str = field(default="", metadata={"help": "Hub id or folder of an image classifier."})
    benign: str | None = field(default=None, metadata={"help": "Benign images with labels: folder, file or Hub id."})
    harmful: str | None = field(default=None, metadata={"help": "Harmful images: folder, file or Hub id."})
    dataset: str | None = field(default=None, metadata={"help": "One data set that holds both."})
    harmful_classes: list[str] = field(
        default_factory=list, metadata={"help": "With --dataset: the harmful classes, by name or number."}
    )
    benign_eval: str | None = field(default=None, metadata={"help": "Benign images to measure on."})
    harmful_eval: str | None = field(default=None, metadata={"help": "Harmful images to measure on."})
    eval_fraction: float = field(
        default=0.3, metadata={"help": "Part held out for measuring where the data have no validation or test split."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    new_head: bool = field(default=False, metadata={"help": "Replace the classifier by one for the benign classes."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    max_images: int | None = field(default=None, metadata={"help": "At most so many images of each set."})

    def __post_init__(self) -> None:
        if not self.model:
            raise ArgumentError("Expected --model, found none. Give a Hub id or a folder; --help shows examples.")
        one, two = self.dataset is not None, self.benign is not None and self.harmful is not None
        if one == two or (one and not self.harmful_classes):
            raise ArgumentError(
                "Expected either --benign and --harmful, or --dataset with --harmful_classes, found "
                f"benign={self.benign}, harmful={self.harmful}, dataset={self.dataset}, "
                f"harmful_classes={self.harmful_classes}."
            )
        if not 0 < self.eval_fraction < 1:
            raise ArgumentError(f"Expected --eval_fraction between 0 and 1, found {self.eval_fraction}.")


def parse_arguments(words: list[str]) -> tuple[DataArguments, ImmunizationArguments]:
    """Arguments from flags and, with ``--config FILE``, from a YAML or JSON file that flags override.

    Args:
        words: What was typed after ``train``.

    Returns:
        Data arguments and training arguments.

    Raises:
        ArgumentError: If the file cannot be read or holds an unknown name.
    """
    parser = HfArgumentParser(
        (DataArguments, ImmunizationArguments),
        prog="hf-immunize train",
        description=_DESCRIPTION,
        formatter_class=RawTextHelpFormatter,
    )
    words = list(words)
    if len(words) == 1 and not words[0].startswith("-") and words[0].endswith((".yaml", ".yml", ".json")):
        words = ["--config", words[0]]
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", metavar="FILE", help="YAML or JSON file of arguments, which flags override.")
    config, words = first.parse_known_args(words)
    if config.config is not None:
        values = _read_config(config.config)
        known = {action.dest for action in parser._actions}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ArgumentError(f"Expected names of flags in the config file, found {unknown}; --help lists them all.")
        parser.set_defaults(**values)
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of arguments, which flags override.")
    data, training, _, unknown = parser.parse_args_into_dataclasses(
        args=words, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        near = get_close_matches(unknown[0].split("=")[0], flags, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else "--help lists all flags."
        raise ArgumentError(f"Expected known flags, found {' '.join(unknown)}. {hint}")
    return data, training


def run_train(words: list[str]) -> dict[str, Any]:
    """Load, measure, immunize, measure again, and write everything to ``output_dir``.

    Args:
        words: What was typed after ``train``.

    Returns:
        What ``results.json`` holds.
    """
    data, args = parse_arguments(words)
    set_seed(args.seed)
    (benign, benign_eval), (harmful, harmful_eval) = load_splits(data, args)
    try:
        model = _load_model(data, benign, args)
        processor = AutoImageProcessor.from_pretrained(
            data.model, revision=data.model_revision, trust_remote_code=data.trust_remote_code
        )
    except OSError as error:
        raise ArgumentError(
            f"Expected an image classifier with its processor at --model {data.model}, found: "
            f"{str(error).splitlines()[0]} Check the spelling, the connection and your rights."
        ) from error
    if not data.new_head:
        parts = (benign, benign_eval)
        benign, benign_eval = (match_labels(part, model.config, args.label_column_name) for part in parts)
    trainer = ImmunizationTrainer(
        model,
        args,
        train_dataset=benign,
        harmful_dataset=harmful,
        eval_dataset=benign_eval,
        harmful_eval_dataset=harmful_eval,
        processing_class=processor,
    )
    before_path = Path(args.output_dir) / "before.json"
    if args.resume_from_checkpoint and before_path.is_file():
        before = json.loads(before_path.read_text())
    else:
        before = trainer.evaluate()
        if trainer.is_world_process_zero():
            before_path.parent.mkdir(parents=True, exist_ok=True)
            before_path.write_text(json.dumps(before, indent=2))
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint={"True": True, "true": True}.get(resume, resume) if resume else None)
    after = trainer.evaluate()
    trainer.save_model()
    results = {
        "model": public_name(data.model),
        "benign": public_name(str(data.benign or data.dataset)),
        "harmful": public_name(str(data.harmful or data.dataset))
        + (f": {', '.join(map(str, data.harmful_classes))}" if data.harmful_classes else ""),
        "images": {
            "benign_train": len(benign),
            "harmful_train": len(harmful),
            "benign_eval": len(benign_eval),
            "harmful_eval": len(harmful_eval),
        },
        "objective": args.objective,
        "trainable": args.trainable,
        "steps": trainer.state.global_step,
        "seed": args.seed,
        "before": finite(before),
        "after": finite(after),
    }
    if trainer.is_world_process_zero():
        write_outputs(Path(args.output_dir), trainer, results)
    return results


def load_splits(data: DataArguments, args: ImmunizationArguments) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Benign and harmful images, each to train on and to measure on.

    Args:
        data: Where they come from.
        args: For the seed and the names of columns.

    Returns:
        (benign, benign_eval), (harmful, harmful_eval).
    """
    if data.dataset is not None:
        whole, whole_eval = _train_and_eval(data.dataset, None, data, args)
        names = _class_keys(whole, data.harmful_classes, args.label_column_name)
        # Both splits in one call, so that a class has the same number in both.
        benign_parts, harmful_parts = split_benign_harmful(
            DatasetDict({"train": whole, "test": whole_eval}), names, args.label_column_name
        )
        benign, benign_eval = benign_parts["train"], benign_parts["test"]
        harmful, harmful_eval = harmful_parts["train"], harmful_parts["test"]
    else:
        benign, benign_eval = _train_and_eval(str(data.benign), data.benign_eval, data, args)
        harmful, harmful_eval = _train_and_eval(str(data.harmful), data.harmful_eval, data, args)
    parts = [_first(part, data.max_images, args.seed) for part in (benign, benign_eval, harmful, harmful_eval)]
    return (parts[0], parts[1]), (parts[2], parts[3])


def public_name(source: str) -> str:
    """What results and cards call a source: a Hub id as it is, a local path by its last part, since it may tell more.

    Example:
        >>> public_name("."), public_name("user/name")
        ('.', 'user/name')
    """
    path = Path(source).expanduser()
    return (path.resolve().name if path.name not in ("", ".", "..") else source) if path.exists() else source


def summary_sentence(results: dict[str, Any]) -> str:
    """One plain sentence of what was achieved, from the figures alone.

    Args:
        results: With metrics "before" and "after".

    Returns:
        The sentence.
    """
    before, after = results["before"], results["after"]
    gain = 100 * (after.get("eval_accuracy", math.nan) - before.get("eval_accuracy", math.nan))
    rir = after.get("eval_rir")
    if rir is None and after.get("eval_rir_is_lower_bound") and after.get("eval_rir_is_upper_bound"):
        ratio = "the ratio of condition numbers is undetermined, since the ranks of both tasks' features changed"
    elif rir is None:
        ratio = "the ratio of condition numbers was not measured"
    else:
        bound = "at least " if after.get("eval_rir_is_lower_bound") else ""
        bound = "at most " if after.get("eval_rir_is_upper_bound") else bound
        ratio = (
            f"the condition number of harmful probing grew {bound}{rir:,.3g} times as much as that of benign probing "
            "(exact RIR)"
        )
    return (
        f"On held-out images {ratio}, and benign accuracy changed by {gain:+.1f} points; a large ratio slows gradient "
        "descent on these features, and by itself stops neither least squares, nor probes of earlier layers, nor "
        "fine-tuning."
    )


def write_outputs(folder: Path, trainer: ImmunizationTrainer, results: dict[str, Any]) -> None:
    """Results as JSON, a figure, a card, and a table in the terminal.

    Args:
        folder: The run's folder.
        trainer: For the spectra.
        results: What to write.
    """
    sentence = summary_sentence(results)
    (folder / "results.json").write_text(json.dumps({**results, "summary": sentence}, indent=2))
    figure, (axes,) = new_figure(1)
    draw_spectra(axes, trainer.last_spectra)
    save_figure(figure, folder / "spectra.png")
    write_card(folder / "README.md", CardFacts.from_results(results, sentence, figure="spectra.png"))
    print_table(results)
    Console(soft_wrap=True).print(
        f"\n{sentence}\n\nCheckpoint, card and figure: {folder}/", highlight=False, markup=False
    )


def print_table(results: dict[str, Any]) -> None:
    """Metrics before and after, in the terminal."""
    table = Table(title="Immunization, measured on held-out images", title_justify="left")
    for name, justify in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in metric_rows(results["before"], results["after"]):
        table.add_row(*row)
    Console().print(table)


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """Metrics with None in place of NaN and infinity, which JSON does not know."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _read_config(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ArgumentError(f"Expected a YAML or JSON file at {path}, found: {error}.") from error
    if not isinstance(values, dict):
        raise ArgumentError(f"Expected names and values in {path}, found {type(values).__name__}.")
    return values


def _train_and_eval(
    source: str, eval_source: str | None, data: DataArguments, args: ImmunizationArguments
) -> tuple[Any, Any]:
    train = load_image_dataset(source)
    if eval_source is not None:
        evaluated = load_image_dataset(eval_source)
        classes = [_class_names(part, args.label_column_name) for part in (train, evaluated)]
        if classes[0] and classes[1] and classes[0] != classes[1]:
            raise DataError(
                f"Expected the classes of {source} in {eval_source} too, in the same order, found {classes[1][:5]} "
                f"for {classes[0][:5]}. Add the missing folders, empty if need be."
            )
        return train, evaluated
    for split in ("validation", "test"):
        try:
            return train, load_image_dataset(source, split)
        except DataError:
            continue
    # By image. Not stratified: many data sets have classes with a single image.
    parts = train.train_test_split(data.eval_fraction, seed=args.seed)
    logger.warning(f"{source} has no validation or test split: {data.eval_fraction:.0%} held out (seed {args.seed}).")
    return parts["train"], parts["test"]


def _class_names(dataset: Any, label_column: str | None) -> list[str]:
    _, label = find_columns(dataset, label_column=label_column, need_label=False)
    return getattr(dataset.features.get(label), "names", None) or []


def _class_keys(dataset: Any, asked: list[Any], label_column: str | None) -> list[str | int]:
    """Classes as typed: by name where there is such a name, else by number."""
    names = _class_names(dataset, label_column)
    return [key if key in names or not key.isdigit() else int(key) for key in map(str, asked)]


def _first(dataset: Any, limit: int | None, seed: int) -> Any:
    if limit is None or len(dataset) <= limit:
        return dataset
    return dataset.shuffle(seed=seed).select(range(limit))


def match_labels(dataset: Any, config: Any, label_column: str | None) -> Any:
    """A data set with its classes numbered as the model numbers them, by name where both have names.

    Args:
        dataset: A `datasets.Dataset` with class names.
        config: The model's config, whose ``id2label`` names its outputs.
        label_column: The label column, where it cannot be found.

    Returns:
        The data set; unchanged where one side has no names, or where no name is shared, which is logged.

    Raises:
        DataError: If some names are the model's and some are not.
    """
    _, label = find_columns(dataset, label_column=label_column)
    names = getattr(dataset.features.get(label), "names", None)
    known = {name: int(index) for index, name in config.id2label.items()}
    if names is None or all(name == f"LABEL_{index}" for name, index in known.items()):
        return dataset
    missing = [name for name in names if name not in known]
    if len(missing) == len(names):
        logger.warning(
            f"No class of the data ({', '.join(names[:5])}, …) is named like one of the model's "
            f"({', '.join(known)[:80]}…): label i is taken for output i. Use --new_head for another task."
        )
        return dataset
    if missing:
        raise DataError(
            f"Expected all benign classes among the model's, found {missing[:5]} that are not. Rename them, drop "
            "them, or use --new_head."
        )
    if all(known[name] == index for index, name in enumerate(names)):
        return dataset
    numbers = [known[names[value]] for value in dataset.with_format(None)[label]]
    every = [name for name, _ in sorted(known.items(), key=lambda item: item[1])]
    return dataset.remove_columns(label).add_column(label, numbers, feature=ClassLabel(names=every))


def _load_model(data: DataArguments, benign: Any, args: ImmunizationArguments) -> Any:
    if data.new_head:
        return _model_with_new_head(data, benign, args)
    return AutoModelForImageClassification.from_pretrained(
        data.model, revision=data.model_revision, trust_remote_code=data.trust_remote_code
    )


def _model_with_new_head(data: DataArguments, benign: Any, args: ImmunizationArguments) -> Any:
    _, label = find_columns(benign, args.image_column_name, args.label_column_name)
    names = getattr(benign.features[label], "names", None)
    if names is None:
        raise DataError(
            f"Expected class names in column {label!r} for --new_head, found plain values. Encode them with "
            "dataset.class_encode_column."
        )
    config = AutoConfig.from_pretrained(
        data.model,
        revision=data.model_revision,
        trust_remote_code=data.trust_remote_code,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return AutoModelForImageClassification.from_pretrained(
        data.model,
        config=config,
        revision=data.model_revision,
        trust_remote_code=data.trust_remote_code,
        ignore_mismatched_sizes=True,
    )
