"""The command ``hf-immunize``. Heavy imports wait until a command runs, so that ``--help`` is quick."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_immunize import __version__
from hf_immunize.cli.audit import audit
from hf_immunize.cli.ceiling import ceiling
from hf_immunize.cli.hub import card, push, verify
from hf_immunize.errors import ArgumentError, ImmunizationError, named_extras
from hf_immunize.text import printable


app = typer.Typer(
    name="hf-immunize",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help=(
        "Make a vision model of Hugging Face Transformers slow to adapt to a harmful task, keep its own task, and "
        "measure both.\n\n"
        "Start with `hf-immunize demo`. For your own model and images see `hf-immunize train --help`."
    ),
)


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    """What stands before a command; the help of all is the app's."""
    if version:
        typer.echo(f"hf-immunize {__version__}")
        raise typer.Exit


@app.command(short_help="Immunize a small model on handwritten digits: two minutes, no network.")
def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for checkpoint, card and figure.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of split, weights and training.")] = 0,
) -> None:
    """Immunize a small model on handwritten digits: two minutes, no network.

    Trains a small ResNet on the handwritten digits 0 to 4 (scikit-learn), immunizes it against the digits 5 to 9,
    measures both tasks exactly, attacks the harmful one by linear probing, and says in one sentence what was achieved.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from hf_immunize.cli.demo import run_demo

    run_demo(output_dir, seed)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
    short_help="Immunize your model: benign and harmful images in, checkpoint and report out.",
)
def train(context: typer.Context) -> None:
    """Immunize a model; every flag goes to the argument parser of `train_arguments`, with its own ``--help``."""
    from hf_immunize.cli.train import run_train

    run_train(context.args)


app.command(short_help="Attack an immunized model: can the harmful task still be learnt?")(audit)
app.command(short_help="Before any training: how much immunization do two tasks allow?")(ceiling)
app.command(short_help="Publish a checkpoint with its record and card; nothing else leaves.")(push)
app.command(short_help="Measure a published checkpoint again: do its claims hold?")(verify)
app.command(short_help="Write the model card from the record.")(card)


def main() -> None:
    """Run the command line; what a person, a file or a machine can cause ends in one sentence, not in a traceback.

    Exit code 2, or 130 after an interruption. With HF_IMMUNIZE_TRACEBACK set, errors keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # Redirected on Windows they know a few hundred characters, and κ is not among them.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.setLogRecordFactory(_printable_record)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")  # of every loader on a machine without a GPU
    try:
        _check_words(sys.argv[1:])
        with named_extras():
            app()
    except SystemExit as stop:
        if stop.code == 130:
            typer.secho("Interrupted. What was finished and saved is whole.", err=True, fg="red")
        raise
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None or os.environ.get("HF_IMMUNIZE_TRACEBACK"):
            raise
        typer.secho(printable(f"{type(error).__name__}: {sentence}"), err=True, fg="red")
        sys.exit(2)


def _printable_record(*args: Any, **options: Any) -> logging.LogRecord:
    """A record of a log in which no name of a file or a class commands the terminal."""
    record = logging.LogRecord(*args, **options)
    if record.name.split(".")[0] == "hf_immunize":
        record.msg, record.args = printable(record.getMessage()), ()
    return record


def _check_words(words: list[str]) -> None:
    """Refuse empty values: most often a variable that was not set."""
    for before, word in zip(["hf-immunize", *words], words, strict=False):
        name, is_assigned, value = word.partition("=")
        if not word.strip() or (name.startswith("--") and is_assigned and not value.strip()):
            raise ArgumentError(
                f"Expected a value after {before if not word.strip() else name}, found an empty one. Give it, or "
                "leave the option out."
            )


def _sentence(error: Exception) -> str | None:
    """What to tell of an error that is no fault of this library's; None of one that may be."""
    import yaml

    said = printable(error)
    if isinstance(error, ImmunizationError):
        return said
    if isinstance(error, UnicodeError | json.JSONDecodeError | yaml.YAMLError):
        return f"Expected a file of UTF-8, JSON or YAML that can be read, found: {said}. Mend it, or write it anew."
    if isinstance(error, ImportError):
        return f"Expected an installed package, found: {said}. Install it, or leave out the option that needs it."
    if isinstance(error, OSError):
        return f"Expected files and a network that can be used, found: {said}. Check path, rights, space, connection."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"Expected enough memory, found too little ({said[:200]}). Use smaller batches or fewer images."
    return None
