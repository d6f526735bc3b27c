"""``hf-immunize push``, ``verify`` and ``card``. Heavy imports wait until a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_immunize.errors import ArgumentError
from hf_immunize.text import printable


if TYPE_CHECKING:
    from hf_immunize.hub.record import ImmunizationRecord


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of an immunized checkpoint.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub: user/name.", show_default=False)],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Visibility of a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to, created if need be.")] = None,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload an immunized checkpoint",
    benchmark: Annotated[
        str | None,
        typer.Option(help="Send benign accuracy to a benchmark's leaderboard too: user/data, or user/data:task."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files that would be pushed, and stop.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model, to load it.")] = False,
) -> None:
    """Publish an immunized checkpoint with its record and card.

    Weights (safetensors), configs, immunization.json, README.md and its figures are pushed in one commit; nothing else
    in the folder leaves it. A push that is cut off leaves the repository as it was; push again, and only what has not
    arrived is sent. Before anything is sent, the model is loaded from these files alone, and files that hold a token
    or a local path are refused.

    Example: hf-immunize push runs/mine user/mine-immunized --private
    """
    from hf_immunize.hub.push import push as push_folder

    result = push_folder(
        folder,
        repo_id,
        private=private,
        revision=revision,
        commit_message=message,
        dry_run=dry_run,
        trust_remote_code=trust_remote_code,
        benchmark=benchmark,
    )
    for name, size in result.files.items():
        typer.echo(f"{size:>14,} bytes  {printable(name)}")
    if dry_run:
        typer.echo(f"Would push these {len(result.files)} files to {result.repo_id}. Nothing was sent.")
    elif result.changed:
        typer.echo(printable(f"Pushed to {result.url}, commit {result.commit}."))
    else:
        typer.echo(f"{printable(result.url)} has all of this already; no commit was made.")
    _say_how_to_attach(folder)


def verify(
    model: Annotated[str, typer.Argument(help="Folder, or repository on the Hub.", show_default=False)],
    benign: Annotated[str | None, typer.Option(help="Benign images: folder, file or dataset on the Hub.")] = None,
    harmful: Annotated[str | None, typer.Option(help="Harmful images.")] = None,
    dataset: Annotated[str | None, typer.Option(help="One data set that holds both.")] = None,
    harmful_classes: Annotated[
        list[str] | None,
        typer.Option(help="With --dataset: a harmful class, by name or number; give it once for each."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The model before immunization, to measure its κ's too.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 64,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
) -> None:
    """Measure an immunized checkpoint again, and compare with what it claims.

    Exit code 0: the figures agree with the record. 3: they differ, or the weights are not those of the record.
    4: it cannot be said, since these are not the images of the record. 2: an error.

    Example: hf-immunize verify user/mine-immunized --benign ./pets --harmful ./weapons
    """
    from hf_immunize.hub.load import fetch
    from hf_immunize.hub.record import read_record
    from hf_immunize.hub.verify import verify as verify_model

    _check_sources(benign, harmful, dataset, harmful_classes or [])
    if revision is not None and Path(model).is_dir():
        raise ArgumentError(f"Expected --revision with a model on the Hub, found the folder {model}. Leave it out.")
    folder = fetch(model, revision=revision, with_code=trust_remote_code)
    images: tuple[Any, Any] = (benign, harmful)
    if dataset is not None:
        images = _sides(dataset, harmful_classes or [], read_record(folder))
    found = verify_model(
        folder,
        benign=images[0],
        harmful=images[1],
        reference=reference,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(f"{'':<36} {'claimed':>12} {'measured':>12}")
    for figure in found.figures:
        numbers = ("–" if value is None else f"{value:.4f}" for value in (figure.claimed, figure.measured))
        columns = "".join(f" {number:>12}" for number in numbers)
        typer.echo(f"{figure.name:<36}{columns}  {figure.outcome}  {printable(figure.note)}".rstrip())
    typer.echo(printable(found))
    raise typer.Exit(found.exit_code)


def card(
    folder: Annotated[Path, typer.Argument(help="Folder with immunization.json.", show_default=False)],
    repo_id: Annotated[str | None, typer.Option(help="Repository that the card's code loads from.")] = None,
    name: Annotated[str | None, typer.Option(help="Title of the card.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence, such as apache-2.0.")] = None,
) -> None:
    """Write the model card from the record; your own sections of an existing card stay.

    Example: hf-immunize card runs/mine --license apache-2.0
    """
    from hf_immunize.hub.card import CardOptions, write_card
    from hf_immunize.hub.record import read_record

    options = CardOptions(repo_id=repo_id, model_name=name, license=license)
    typer.echo(f"Wrote {write_card(folder, read_record(folder), options)}.")
    _say_how_to_attach(folder)


def _say_how_to_attach(folder: Path) -> None:
    """Where the record holds no audit: one may have been made all the same, in a folder that nobody can guess."""
    from hf_immunize.hub.record import read_record

    if read_record(folder).audit is None:
        typer.echo(
            f"Record and card hold no audit. hf-immunize audit {printable(folder)} … --attach adds one to both. Of "
            "one that was made, type the command again with --attach: nothing is attacked anew."
        )


def _check_sources(benign: str | None, harmful: str | None, dataset: str | None, harmful_classes: list[str]) -> None:
    """Either two sources or one with its harmful classes; anything in addition would have no effect."""
    of_one, of_two = [dataset is not None, bool(harmful_classes)], [benign is not None, harmful is not None]
    if not (all(of_one) and not any(of_two)) and not (all(of_two) and not any(of_one)):
        raise ArgumentError(
            "Expected either --benign and --harmful, or --dataset with --harmful-classes, found "
            f"benign={benign}, harmful={harmful}, dataset={dataset}, harmful classes {harmful_classes}."
        )


def _sides(dataset: str, harmful_classes: list[str], record: ImmunizationRecord) -> tuple[Any, Any]:
    """Both tasks' images to measure on, drawn from one data set as ``hf-immunize train`` drew them by the record."""
    from hf_immunize.data.sources import class_keys, measured, split_benign_harmful
    from hf_immunize.hub.collect import drawn_again, recorded_draw

    whole = measured(dataset, recorded_draw(record.harmful))
    benign, harmful = split_benign_harmful(whole, class_keys(whole, harmful_classes))
    return drawn_again(benign, record, "benign"), drawn_again(harmful, record, "harmful")
