"""Arguments of ``hf-immunize train``, from flags and from a YAML or JSON file."""

from __future__ import annotations

from argparse import ArgumentParser, RawTextHelpFormatter
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.integrations import get_available_reporting_integrations

from hf_immunize.errors import ArgumentError, ImmunizationError
from hf_immunize.training.arguments import ImmunizationArguments


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
        distillation: Any images, whose labels are not used, on which the model shall stay what it was; the more
            varied, the better benign accuracy is kept.
        benign_eval, harmful_eval: Images to measure on; by default the source's validation or test split, else a part
            held out by `eval_fraction`.
        eval_fraction: That part.
        model_revision: Branch, tag or commit on the Hub.
        new_head: Replace the classifier by a new one for the benign classes.
        trust_remote_code: Run code that comes with the model.
        max_images: At most so many images of each set (for a first try).
        groups: Measure RIR over groups of 100 images too, for the record; four more passes over the images.
    """

    model: str = field(default="", metadata={"help": "Hub id or folder of an image classifier."})
    benign: str | None = field(default=None, metadata={"help": "Benign images with labels: folder, file or Hub id."})
    harmful: str | None = field(default=None, metadata={"help": "Harmful images: folder, file or Hub id."})
    dataset: str | None = field(default=None, metadata={"help": "One data set that holds both."})
    harmful_classes: list[str] = field(
        default_factory=list, metadata={"help": "With --dataset: the harmful classes, by name or number."}
    )
    distillation: str | None = field(
        default=None, metadata={"help": "Any images, without labels, on which the model shall stay what it was."}
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
    groups: bool = field(
        default=False, metadata={"help": "Measure RIR over groups of 100 images too, with its spread."}
    )

    def __post_init__(self) -> None:
        if not self.model:
            raise ArgumentError("Expected --model, found none. Give a Hub id or a folder; --help shows examples.")
        one = self.dataset is not None
        of_one = [bool(self.harmful_classes)]
        of_two = [name is not None for name in (self.benign, self.harmful)]
        if not all(of_one if one else of_two) or any(of_two if one else of_one):
            raise ArgumentError(
                "Expected either --benign and --harmful, or --dataset with --harmful_classes, found "
                f"benign={self.benign}, harmful={self.harmful}, dataset={self.dataset}, "
                f"harmful_classes={self.harmful_classes}."
            )
        for name in ("benign_eval", "harmful_eval"):
            if one and getattr(self, name) is not None:
                raise ArgumentError(
                    f"Expected --{name} with --benign and --harmful alone, found it with --dataset, whose own splits "
                    "are measured on. Leave it out, or give benign and harmful images as two sources."
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
    """Says what is wrong in one sentence, without the page of flags before it."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"Expected flags with fitting values, found: {message}. --help explains them.")


def parse_arguments(words: list[str]) -> tuple[DataArguments, ImmunizationArguments]:
    """Arguments from flags and, with ``--config FILE``, from a YAML or JSON file that flags override.

    Args:
        words: What was typed after ``train``.

    Returns:
        Data arguments and training arguments.

    Raises:
        ArgumentError: If the file cannot be read or holds an unknown name.
    """
    parser = _Parser(
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
    first.error = parser.error  # type: ignore[method-assign]
    config, words = first.parse_known_args(words)
    if config.config is not None:
        words = _as_words(_read_config(config.config), parser) + words
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of arguments, which flags override.")
    # Unlike a script, the command trains unless told otherwise.
    parser.set_defaults(do_train=True)
    try:
        data, training, _, unknown = parser.parse_args_into_dataclasses(
            args=words, look_for_args_file=False, return_remaining_strings=True
        )
    except ImmunizationError:
        raise
    except (ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:  # of TrainingArguments
        said = " ".join(str(error).split())
        raise ArgumentError(f"Expected flags that fit each other and this machine, found: {said}") from error
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        near = get_close_matches(unknown[0].split("=")[0], flags, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else "--help lists all flags."
        raise ArgumentError(f"Expected known flags, found {' '.join(unknown)}. {hint}")
    for name, value in vars(training).items():
        if name.endswith("_kwargs") and isinstance(value, str):
            raise ArgumentError(f"Expected --{name} as a mapping in JSON, found {value!r}. Leave it out, or mend it.")
    missing = sorted(set(training.report_to) - set(get_available_reporting_integrations()))
    if missing:
        raise ArgumentError(
            f"Expected --report_to with installed trackers, found {missing}. Install it, or give none."
        )
    if not training.do_train or training.do_predict:
        raise ArgumentError(
            "Expected --do_train and no --do_predict, since this command trains, and measures before and after; found "
            f"do_train={training.do_train}, do_predict={training.do_predict}. hf-immunize verify measures alone."
        )
    return data, training


def _as_words(values: dict[Any, Any], parser: ArgumentParser) -> list[str]:
    """The file's arguments as they would be typed, so that flags after them override and types are checked alike."""
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    unknown = sorted(str(name) for name in values if name not in actions)
    if unknown:
        raise ArgumentError(f"Expected names of flags in the config file, found {unknown}; --help lists them all.")
    hints = get_type_hints(DataArguments) | get_type_hints(ImmunizationArguments)
    words: list[str] = []
    for name, value in values.items():
        action = actions[name]
        if action.default is None and (value is None or (value is False and action.type is str)):
            continue  # left as it is
        if action.nargs == "+" and not isinstance(value, dict) and value not in (None, "", []):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        elif isinstance(value, list | dict) and type(value) in [
            get_origin(kind) or kind for kind in get_args(hints[name])
        ]:
            parser.set_defaults(**{name: value})  # what no words can say
        elif isinstance(value, list | dict) or action.nargs == "+" or value == "":
            raise ArgumentError(f"Expected {hints[name]} for {name} in the config file, found {value!r}.")
        else:
            # YAML takes "no" and "none" for False and None.
            word = "none" if value is None else "no" if value is False else value
            words.append(f"--{name}={word}")
    return words


def _read_config(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise ArgumentError(f"Expected a YAML or JSON file in UTF-8 at {path}, found: {said}.") from error
    if not isinstance(values, dict):
        raise ArgumentError(f"Expected names and values in {path}, found {type(values).__name__}.")
    return values
