"""``hf-immunize train``: from a model and two sets of images to an immunized checkpoint with its figures."""

from __future__ import annotations

import json
import math
import shlex
from argparse import Action, ArgumentParser, RawTextHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoImageProcessor, HfArgumentParser, set_seed
from transformers.utils import logging

from hf_immunize.data.columns import find_columns
from hf_immunize.data.sources import HeldOut, Parts, choose, divide, divide_classes
from hf_immunize.data.views import to_distil_on
from hf_immunize.errors import ArgumentError, DataError, ImmunizationError, MissingPackageError
from hf_immunize.files import check_writable, write_whole
from hf_immunize.hub.card import INTERCEPT_ROW, metric_rows, summary_sentence
from hf_immunize.hub.collect import describe_base_model, is_hub_id
from hf_immunize.hub.record import DataRecord
from hf_immunize.text import library_words, printable, public_name
from hf_immunize.training.arguments import ImmunizationArguments
from hf_immunize.training.spectrum_figure import draw_spectra, new_figure, save_figure
from hf_immunize.training.trainer import ImmunizationTrainer
from hf_immunize.vision.loading import LOADING_ERRORS, load_backbone, load_classifier


logger = logging.get_logger(__name__)


_DESCRIPTION = """\
Immunize an image classifier against a harmful task.

  hf-immunize train --model google/vit-base-patch16-224 --benign my/pets --harmful my/weapons --output_dir runs/pets
  hf-immunize train --model ./my-model --dataset ./images --harmful_classes rifle pistol --output_dir runs/mine
  hf-immunize train --config arguments.yaml --learning_rate 0.001        (flags override the file)

Data are folders of images (one subfolder a class), folders written by save_to_disk, parquet files, or names on the
Hub. Harmful images need no labels. Every flag of transformers.TrainingArguments works as usual; all flags may be typed
with hyphens too (--harmful-classes), as the other commands have them.
"""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DataArguments:
    """What to immunize and on which images."""

    model: str = _option("", "Hub id or folder of an image classifier.")
    benign: str | None = _option(None, "Benign images with labels: folder, file or Hub id.")
    harmful: str | None = _option(None, "Harmful images: folder, file or Hub id.")
    dataset: str | None = _option(None, "One data set that holds both.")
    harmful_classes: list[str] = field(
        default_factory=list,
        metadata={"help": "With --dataset: the harmful classes, by name or number.", "action": "extend"},
    )
    distillation: str | None = _option(
        None, "Images whose outputs must stay: 'views' (augmented benign ones; default), a folder or id, or 'none'."
    )
    benign_eval: str | None = _option(None, "Benign images to measure on.")
    harmful_eval: str | None = _option(None, "Harmful images to measure on.")
    eval_fraction: float = _option(0.3, "Share held out to measure on, where there is no validation or test split.")
    model_revision: str = _option("main", "Branch, tag or commit of the model on the Hub.")
    new_head: bool = _option(False, "Replace the classifier by one for the benign classes.")
    trust_remote_code: bool = _option(False, "Run code that comes with the model.")
    max_images: int | None = _option(None, "Use at most this many images of each set.")

    def __post_init__(self) -> None:
        if not self.model:
            raise ArgumentError("Expected --model, found none. Give a Hub id or a folder; --help shows examples.")
        sources = [name for name in ("benign", "harmful", "dataset", "harmful_classes") if getattr(self, name)]
        if sources not in (["benign", "harmful"], ["dataset", "harmful_classes"]):
            raise ArgumentError(
                "Expected either --benign and --harmful, or --dataset with --harmful_classes, found "
                f"{' and '.join(f'--{name}' for name in sources) or 'none of them'}."
            )
        if self.dataset is not None and (self.benign_eval or self.harmful_eval):
            raise ArgumentError(
                "Expected --benign_eval and --harmful_eval without --dataset, found both. Leave them out: the data "
                "set's own splits are measured on."
            )
        if self.max_images is not None and self.max_images < 1:
            raise ArgumentError(f"Expected --max_images of at least 1, found {self.max_images}.")
        if self.model_revision != "main" and Path(self.model).is_dir():
            raise ArgumentError(
                f"Expected --model_revision with a model on the Hub, found the folder {self.model}. Leave it out."
            )
        if not 0 < self.eval_fraction < 1:
            raise ArgumentError(f"Expected --eval_fraction between 0 and 1, found {self.eval_fraction}.")


class _Parser(HfArgumentParser):
    """Says what is wrong in one sentence, without the page of flags before it; explains its own flags first."""

    def format_help(self) -> str:
        """The flags in three groups, without the list of all in front."""
        kinds = {"what and on which images": DataArguments, "immunization": ImmunizationArguments}
        named = {title: set(kind.__annotations__) for title, kind in kinds.items()}
        named["what and on which images"] |= {"help", "config", "output_dir"}
        named["transformers.TrainingArguments"] = {one.dest for one in self._actions}.difference(*named.values())
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        for title, names in named.items():
            formatter.start_section(title)
            formatter.add_arguments([one for one in self._actions if one.dest in names])
            formatter.end_section()
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"Expected flags with fitting values, found: {message}. --help explains them.")


def parse_arguments(words: list[str]) -> tuple[DataArguments, ImmunizationArguments]:
    """Arguments from flags and, with ``--config FILE``, from a YAML or JSON file that flags override."""
    parser = _Parser(
        (DataArguments, ImmunizationArguments),
        prog="hf-immunize train",
        description=_DESCRIPTION,
        formatter_class=RawTextHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of arguments, which flags override.")
    # Unlike a script, the command trains unless told otherwise.
    parser.set_defaults(do_train=True)
    typed, _ = parser.parse_known_args(words)
    if typed.config is not None:
        given = _read_config(typed.config, parser)
        if typed.harmful_classes:
            given.pop("harmful_classes", None)  # flags override the file, and do not add to it
        parser.set_defaults(**given)
    try:
        data, training, _, unknown = parser.parse_args_into_dataclasses(
            args=words, look_for_args_file=False, return_remaining_strings=True
        )
    except ImmunizationError:
        raise
    except (ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:  # of TrainingArguments
        raise ArgumentError(f"Expected flags that fit each other, found: {printable(error)}") from error
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        near = get_close_matches(unknown[0].split("=")[0], flags, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else "--help lists all flags."
        raise ArgumentError(f"Expected known flags, found {' '.join(unknown)}. {hint}")
    _check_training(training)
    return data, training


def _check_training(training: ImmunizationArguments) -> None:
    """Refuse what TrainingArguments takes without a word, and what this command does not do."""
    for name, value in vars(training).items():
        if name.endswith("_kwargs") and isinstance(value, str):
            raise ArgumentError(f"Expected --{name} as a mapping in JSON, found {value!r}. Leave it out, or mend it.")
    if not training.do_train or training.do_predict:
        raise ArgumentError(
            f"Expected --do_train and no --do_predict, found do_train={training.do_train}, "
            f"do_predict={training.do_predict}. Leave them out: hf-immunize verify measures alone."
        )


def _read_config(path: str, parser: ArgumentParser) -> dict[str, Any]:
    """The arguments in a file as defaults of the parser, which converts text as if it were typed."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ArgumentError(f"Expected YAML or JSON in UTF-8 at {path}, found: {printable(error)}.") from error
    if not isinstance(values, dict):
        raise ArgumentError(f"Expected names and values in {path}, found {type(values).__name__}.")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    if unknown := sorted(str(name) for name in values if name not in actions):
        raise ArgumentError(f"Expected names of flags in the config file, found {unknown}; --help lists them all.")
    hints = get_type_hints(DataArguments) | get_type_hints(ImmunizationArguments)
    return {name: _default(name, value, actions[name], hints[name]) for name, value in values.items()}


def _default(name: str, value: Any, action: Action, hint: Any) -> Any:
    """One value of a file, for the parser; YAML takes "no" and "none" for False and None."""
    kinds = [get_origin(kind) or kind for kind in (hint, *get_args(hint))]
    if isinstance(value, list) and action.nargs == "+":
        return [str(item) for item in value]
    if isinstance(value, bool | list | dict) and type(value) in kinds:
        return value
    if action.default is None and (value is None or value is False):
        return None
    word = "none" if value is None else "no" if value is False else str(value)
    if not word or isinstance(value, list | dict) or (action.choices and word not in action.choices):
        raise ArgumentError(f"Expected {hint} for {name} in the config file, found {value!r}.")
    return [word] if action.nargs == "+" else word


def load_splits(data: DataArguments, args: ImmunizationArguments) -> tuple[Parts, Parts]:
    """Benign and harmful images, each to train on and to measure on."""
    draw = HeldOut(data.eval_fraction, args.seed)
    if data.dataset is not None:
        whole = divide(data.dataset, draw)
        sides = divide_classes(whole, data.harmful_classes, args.label_column_name)
        sources = {data.dataset: whole}
    else:
        benign = divide(data.benign, draw, test=data.benign_eval, name="benign images")
        harmful = divide(data.harmful, draw, test=data.harmful_eval, name="harmful images")
        sides, sources = (benign, harmful), {str(data.benign): benign, str(data.harmful): harmful}
    for source, parts in sources.items():
        train, test = (_class_names(part, args.label_column_name) for part in (parts.train, parts.test))
        if train and test and train != test:
            raise DataError(
                f"Expected the classes of {source} in the images to measure on too, in the same order, found "
                f"{test[:5]} for {train[:5]}. Add the missing folders, empty if need be."
            )
        if parts.held_out is not None:
            logger.warning(
                f"{source} has no validation or test split: {draw.fraction:.0%} held out (seed {draw.seed})."
            )
    benign, harmful = (
        replace(side, **{part: _first(getattr(side, part), data.max_images, args.seed) for part in ("train", "test")})
        for side in sides
    )
    return benign, harmful


def _class_names(dataset: Any, label_column: str | None) -> list[str]:
    _, label = find_columns(dataset, label_column=label_column, need_label=False)
    return getattr(dataset.features.get(label), "names", None) or []


def _first(dataset: Any, limit: int | None, seed: int) -> Any:
    return dataset if limit is None else dataset.select(choose(len(dataset), limit, seed))


def load_model(data: DataArguments, benign: Any, args: ImmunizationArguments) -> Any:
    """The model to immunize, with its own head or, with ``--new_head``, one for the benign classes."""
    options: dict[str, Any] = {"revision": data.model_revision, "trust_remote_code": data.trust_remote_code}
    if data.new_head:
        if args.benign_loss != "task" and args.pooling is None:  # of that head, the Trainer says it
            logger.warning(
                f"A new head has learned nothing yet that --benign_loss {args.benign_loss} could keep: benign "
                "accuracy stays near chance. Train the classifier first, or set --benign_loss task."
            )
        _, label = find_columns(benign, args.image_column_name, args.label_column_name)
        names = getattr(benign.features[label], "names", None)
        if names is None:
            raise DataError(
                f"Expected class names in column {label!r} for --new_head, found plain values. Encode them with "
                "dataset.class_encode_column."
            )
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        options["config"] = AutoConfig.from_pretrained(data.model, **options, num_labels=len(names), **labels)
    if args.pooling is None:
        return load_classifier(data.model, new_head=data.new_head, **options)
    return load_backbone(data.model, args.pooling, **options)  # the Trainer puts a head on it


def run_train(words: list[str]) -> dict[str, Any]:
    """Load, measure, immunize, measure again, and write everything to ``output_dir``."""
    data, args = parse_arguments(words)
    folder = Path(args.output_dir)
    check_writable(folder, "--output_dir")
    set_seed(args.seed)
    benign, harmful = load_splits(data, args)
    options: dict[str, Any] = {"image_column": args.image_column_name, "seed": args.seed, "limit": data.max_images}
    distillation = to_distil_on(data.distillation, benign.train, distils=args.benign_loss != "task", **options)
    try:
        model = load_model(data, benign.train, args)
        hub = {"revision": data.model_revision, "trust_remote_code": data.trust_remote_code}
        processor = AutoImageProcessor.from_pretrained(data.model, **hub)
    except ImmunizationError:
        raise
    except LOADING_ERRORS as error:
        raise ArgumentError(
            f"Expected an image classifier with its processor at --model {data.model}, found: {library_words(error)}. "
            "Check the spelling, the connection, your rights and whether its files are whole."
        ) from error
    trainer = ImmunizationTrainer(
        model,
        args,
        train_dataset=benign.train,
        harmful_dataset=harmful.train,
        distillation_dataset=distillation,
        eval_dataset=benign.test,
        harmful_eval_dataset=harmful.test,
        processing_class=processor,
    )
    resume = args.resume_from_checkpoint
    before: Mapping[str, float | None] = {} if resume else trainer.evaluate()
    trainer.train(resume_from_checkpoint={"True": True, "true": True}.get(resume, resume) if resume else None)
    after = trainer.evaluate()
    before = trainer.starting_metrics if resume else before
    parts = {"benign_train": benign.train, "harmful_train": harmful.train, "distillation": distillation}
    parts |= {"benign_eval": benign.test, "harmful_eval": harmful.test}
    sizes = {name: len(part) for name, part in parts.items() if part is not None}
    classes = f": {', '.join(map(str, data.harmful_classes))}" if data.harmful_classes else ""
    sources = [public_name(str(source or data.dataset)) for source in (data.benign, data.harmful)]
    names = (public_name(data.model), sources[0], sources[1] + classes)
    results = run_results(trainer, names, sizes, before, after)
    results["summary"] = summary_sentence(results["before"], results["after"], trainer.warning)
    describe(trainer, data, results["before"], {"benign": benign.held_out, "harmful": harmful.held_out})
    write_outputs(folder, trainer, results, audit_command(data, args))
    return results


def run_results(
    trainer: ImmunizationTrainer,
    names: Sequence[str],
    sizes: dict[str, int],
    before: Mapping[str, float | None],
    after: Mapping[str, float | None],
) -> dict[str, Any]:
    """What ``results.json`` holds of a run, with the names of model, benign and harmful images."""
    step = trainer.evidence.step
    return dict(zip(("model", "benign", "harmful"), names, strict=True)) | {
        "images": sizes,
        "objective": trainer.args.objective,
        "trainable": trainer.args.trainable,
        "steps": trainer.state.global_step if step is None else step,
        "seed": trainer.args.seed,
        "before": _finite(before),
        "after": _finite(after),
    }


def _finite(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Metrics with None in place of NaN and infinity, which JSON does not know."""
    return {name: None if value is None or not math.isfinite(value) else value for name, value in metrics.items()}


def describe(
    trainer: ImmunizationTrainer,
    data: DataArguments,
    before: dict[str, float | None],
    held_out: dict[str, HeldOut | None],
) -> None:
    """Give the Trainer, for its record, what the typed names stand for."""
    evidence = trainer.evidence
    evidence.before = before
    evidence.base_model = describe_base_model(data.model, data.model_revision)
    for side, source in (("benign", data.benign or data.dataset), ("harmful", data.harmful or data.dataset)):
        evaluated = getattr(data, f"{side}_eval")
        record = DataRecord(public_name(source), on_hub=is_hub_id(source))
        record.split = None if evaluated is None else f"of {public_name(evaluated)}"
        if (draw := held_out[side]) is not None:
            record.held_out_fraction, record.held_out_seed = draw.fraction, draw.seed
        if side == "harmful" and data.harmful_classes:
            record.classes = [printable(name) for name in data.harmful_classes]
        setattr(evidence, side, record)


def audit_command(data: DataArguments, args: ImmunizationArguments) -> str:
    """The command that attacks the checkpoint with the images of this run, to be pasted into a shell."""
    options: dict[str, Any] = {"dataset": data.dataset, "harmful": data.harmful, "benign": data.benign}
    options |= {"harmful-test": data.harmful_eval, "benign-test": data.benign_eval}
    options |= {"image-column": args.image_column_name, "label-column": args.label_column_name}
    if not data.new_head and args.pooling is None:  # else nobody could compare the heads
        options["reference"] = data.model
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]
    words += [word for name in data.harmful_classes for word in ("--harmful-classes", name)]
    words += ["--trust-remote-code"] * data.trust_remote_code
    return shlex.join(["hf-immunize", "audit", str(args.output_dir), *map(str, words)])


def write_outputs(folder: Path, trainer: ImmunizationTrainer, results: dict[str, Any], audit: str) -> None:
    """Figure, checkpoint and record, results as JSON, a card, and a table in the terminal."""
    first = trainer.is_world_process_zero()
    if first:
        try:
            figure, (axes,) = new_figure(1)
        except MissingPackageError as error:
            logger.warning(f"There is no figure of the spectra. {error}")
        else:
            draw_spectra(axes, trainer.last_spectra)
            save_figure(figure, folder / "spectra.png")
            trainer.evidence.figures = ["spectra.png"]
    trainer.save_model()
    if first:
        write_whole(folder / "results.json", json.dumps(results, indent=2))
        trainer.create_model_card()
        print_table(results)
        made = "record, card and figure" if trainer.evidence.figures else "record and card"
        Console(soft_wrap=True).print(
            f"\n{results['summary']}\n\nCheckpoint, {made}: {folder}/\nSee what an attacker can "
            f"still learn (about an hour; with --quick, minutes):\n{audit}",
            highlight=False,
            markup=False,
        )


def print_table(results: dict[str, Any]) -> None:
    """What to read first, before and after, in the terminal; the card has the rest."""
    table = Table(title="Immunization, measured on held-out images", title_justify="left")
    for name, justify in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in metric_rows(results["before"], results["after"]):
        if row[1:] != ("–", "–") and row[0].startswith(("benign accuracy", "steps", INTERCEPT_ROW)):
            table.add_row(*row)
    Console().print(table)
