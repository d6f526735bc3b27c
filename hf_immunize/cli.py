"""The command ``hf-immunize``. Heavy imports wait until a command runs, so that ``--help`` is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_immunize.audit_command import audit
from hf_immunize.ceiling_command import ceiling
from hf_immunize.errors import ImmunizationError
from hf_immunize.hub_commands import card, push, verify


app = typer.Typer(
    name="hf-immunize",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help=(
        "Immunize vision models of Hugging Face Transformers: make adapting them to a harmful task by linear probing "
        "hard, keep the benign task, and measure both.\n\n"
        "Start with `hf-immunize demo`; then `hf-immunize train --help` for your own model and images."
    ),
)


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Where the checkpoint, the card and the figure go.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the split, the weights and the training.")] = 0,
) -> None:
    """The main job on real data in under two minutes, without a network.

    Trains a small ViT on the handwritten digits 0 to 4 (scikit-learn), immunizes it against the digits 5 to 9,
    measures both tasks exactly, attacks the harmful one by linear probing, and says in one sentence what was achieved.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from hf_immunize.demo import run_demo

    run_demo(output_dir, seed)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
    short_help="Immunize your model: benign and harmful images in, checkpoint and report out.",
)
def train(context: typer.Context) -> None:
    """Immunize a model; every flag goes to the argument parser of `train_arguments`, with its own ``--help``."""
    from hf_immunize.train_command import run_train

    run_train(context.args)


app.command(short_help="Attack an immunized model: what is slowed, what is prevented, what is not.")(audit)
app.command(short_help="Before any training: how far can these two tasks be told apart?")(ceiling)
app.command(short_help="Publish a checkpoint with its record and card; nothing else leaves.")(push)
app.command(short_help="Measure a published checkpoint again: do its claims hold?")(verify)
app.command(short_help="Write the model card from the record.")(card)


def main() -> None:
    """Run the command line; errors of this library end in one sentence and exit code 2, not in a traceback."""
    try:
        app()
    except ImmunizationError as error:
        if os.environ.get("HF_IMMUNIZE_TRACEBACK"):
            raise
        typer.secho(f"{type(error).__name__}: {error}", err=True, fg="red")
        sys.exit(2)
