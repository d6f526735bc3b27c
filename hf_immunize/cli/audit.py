"""`hf-immunize audit`: attack an immunized model before its critics do.

Heavy imports wait until the command runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_immunize.errors import ArgumentError
from hf_immunize.text import printable


if TYPE_CHECKING:
    from hf_immunize.data.sources import HeldOut


def audit(
    model: Annotated[
        str, typer.Argument(help="The immunized model: a folder or a name on the Hub.", show_default=False)
    ],
    harmful: Annotated[
        str | None, typer.Option(help="Labelled images of the harmful task: folder, parquet file or Hub id.")
    ] = None,
    benign: Annotated[str | None, typer.Option(help="Labelled images of the task to keep.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="The model before immunization; without it nothing can be compared.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="One data set with both tasks, in place of --harmful and --benign.")
    ] = None,
    harmful_classes: Annotated[
        list[str] | None,
        typer.Option(help="With --dataset: a harmful class, by name or number; give it once for each."),
    ] = None,
    harmful_test: Annotated[str | None, typer.Option(help="Harmful images to measure on.")] = None,
    benign_test: Annotated[str | None, typer.Option(help="Benign images to measure on.")] = None,
    unseen: Annotated[str | None, typer.Option(help="Harmful images of classes that immunization never saw.")] = None,
    unrelated: Annotated[str | None, typer.Option(help="A third task that should be left alone.")] = None,
    output_dir: Annotated[
        Path, typer.Option(help="For the report, and for finished attacks: the same command resumes there.")
    ] = Path("runs/audit"),
    quick: Annotated[bool, typer.Option("--quick", help="Small budgets: two minutes on a small model.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every attacker, large budgets: hours, and a GPU.")] = False,
    attackers: Annotated[
        str | None, typer.Option(help="Run these alone, separated by commas, such as ridge,adamw,lora_r8.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="At most so long for each attack that trains, half of it for the search of its settings."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of fine-tuning and of mini-batch probes, not the preset's.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds of every attack, not the preset's.")] = None,
    keep_features: Annotated[
        float, typer.Option(min=0, help="GiB of features kept in the output folder for resuming; 0 keeps none.")
    ] = 2.0,
    test_fraction: Annotated[
        float | None,
        typer.Option(help="Held out where data have no validation or test split; by default as training did."),
    ] = None,
    max_images: Annotated[
        int | None, typer.Option(min=2, help="At most so many training and test images of each task.")
    ] = None,
    accuracies: Annotated[
        str | None, typer.Option(help="Count the steps to these accuracies too, such as 0.2,0.4.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of held-out splits, where MODEL has no record of the one training used.")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of images, where it cannot be found.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of labels, where it cannot be found.")] = None,
    head_module: Annotated[str | None, typer.Option(help="The classifier's name, where it cannot be found.")] = None,
    attach: Annotated[
        bool,
        typer.Option("--attach", help="Write the findings into MODEL's record and card; MODEL is a folder with both."),
    ] = False,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of MODEL on the Hub.")] = "main",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Attack an immunized model with what an adversary has, and say what is slowed, what is prevented, what is not.

        hf-immunize audit runs/mine --harmful my/weapons --benign my/pets --reference my/model-before --quick

    Attackers probe the classifier's input (gradient descent, Adam, closed forms, second-order methods, nearest
    neighbours), probe every earlier stage, fine-tune the network (also by low-rank adapters), and put the public
    starting weights back. Each tunes its own settings on a part of its training images. The same attacks with the
    same draws run on the reference. The strongest one counts.

    Finished attacks and extracted features are kept in the output folder. After an interruption the same command goes
    on where it was. --seconds, --steps and --seeds change the preset's budget; the report says so. Under
    `accelerate launch -m hf_immunize audit …` or `torchrun` all processes extract features; the attacks run on the
    first, and the others end when the features are there.

    The exit code says whether the audit ran, not what it found: report.html and the lines printed say that.
    """
    import datasets
    import transformers

    from hf_immunize.attacks.presets import find_attacker, find_preset
    from hf_immunize.audit.run import AuditSettings, audit_over_processes
    from hf_immunize.features.ranks import launched
    from hf_immunize.files import check_writable, remove_leftovers
    from hf_immunize.hub.card import attach_audit, attachable_record
    from hf_immunize.hub.record import RECORD_NAME
    from hf_immunize.hub.weights import CARD_NAME

    _refuse_without_effect(model, revision, harmful, benign, dataset, harmful_test, benign_test)
    if quick and full:
        raise ArgumentError("Expected --quick or --full, found both.")
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise ArgumentError(f"Expected --test-fraction between 0 and 1, found {test_fraction}.")
    if not math.isfinite(keep_features * 2**30):
        raise ArgumentError(f"Expected a number of GiB as --keep-features, found {keep_features}. 0 keeps none.")
    preset = find_preset("quick" if quick else "full" if full else "standard")
    preset = preset.changed(seconds=seconds, steps=steps, seeds=seeds)
    names = None if attackers is None else [name.strip() for name in attackers.split(",") if name.strip()]
    known = [find_attacker(name) for name in names or []]
    if (seconds, steps) != (None, None) and known and all(one is not None and one.closed_form for one in known):
        raise ArgumentError(
            f"Expected --seconds and --steps with an attacker that trains, found {attackers} alone. Leave them out "
            "or name one more."
        )
    # Before hours of attacks.
    check_writable(output_dir, "--output-dir")
    remove_leftovers(output_dir)
    if attach:
        attachable_record(_local(model))
        check_writable(model, "MODEL")
    processes = launched()
    if not processes.first:
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    if reference is None and processes.first and (hint := _reference_hint(model)):
        typer.echo(hint, err=True)
    transformers.utils.logging.set_verbosity_error()
    draw = partial(_draw, model, revision, test_fraction, seed)
    harmful_data, benign_data = _data(
        harmful, benign, dataset, harmful_classes, harmful_test, benign_test, label_column, draw
    )
    settings = AuditSettings(
        model,
        harmful=harmful_data,
        benign=benign_data,
        reference=reference,
        attackers=names,
        preset=preset,
        unseen=unseen,
        unrelated=unrelated,
        run_dir=output_dir,
        keep_features=int(keep_features * 2**30),
        head_module=head_module,
        image_column=image_column,
        label_column=label_column,
        test_fraction=test_fraction,
        max_images=max_images,
        seed=seed,
        accuracies=_numbers(accuracies),
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    report = audit_over_processes(processes, settings)
    if report is None:
        return  # not the first of several processes: its part is done
    report.write(output_dir)
    typer.echo(report.summary())
    typer.echo(f"Report: {printable(output_dir / 'report.html')}")
    if attach:
        attach_audit(model, _with_words(report.for_card()))
        typer.echo(f"Attached to {RECORD_NAME} and {CARD_NAME} in {printable(model)}.")


def _refuse_without_effect(
    model: str,
    revision: str,
    harmful: str | None,
    benign: str | None,
    dataset: str | None,
    harmful_test: str | None,
    benign_test: str | None,
) -> None:
    """An option that would do nothing was meant to do something."""
    for name, given, needed, there in (
        ("--harmful-test", harmful_test, "--harmful", harmful),
        ("--benign-test", benign_test, "--benign", benign),
    ):
        if given is not None and there is None:
            raise ArgumentError(f"Expected {needed} with {name}, found none. Add {needed}, or leave {name} out.")
    if dataset is not None and benign is not None:
        raise ArgumentError("Expected either --dataset or --benign, found both. Leave one of them out.")
    if revision != "main" and Path(model).is_dir():
        raise ArgumentError(
            f"Expected a name on the Hub as MODEL with --revision, found the folder {printable(model)}. Leave "
            "--revision out."
        )


def _numbers(words: str | None) -> list[float]:
    if words is None:
        return []
    try:
        return [float(word) for word in words.split(",")]
    except ValueError as error:
        raise ArgumentError(f"Expected numbers separated by commas as --accuracies, found {words!r}.") from error


def _local(model: str) -> str:
    if not Path(model).is_dir():
        raise ArgumentError(
            f"Expected a folder as MODEL with --attach, found {model!r}. Download the checkpoint, or leave --attach "
            "out."
        )
    return model


def _reference_hint(model: str) -> str | None:
    """How to name the reference, where the record of a local checkpoint tells what it was made from."""
    from hf_immunize.audit.names import clean
    from hf_immunize.errors import RecordError
    from hf_immunize.hub.record import read_record

    try:
        base = read_record(model).base_model
    except RecordError:
        return None
    return (
        "No --reference was given, so that what immunization changed cannot be told. By its record the model was "
        f"made from {clean(base.name)}: if you have it or trust it, add --reference with its folder or its name on "
        "the Hub."
    )


def _with_words(found: dict[str, Any]) -> dict[str, Any]:
    """The findings with the attackers named for people, as a card has them."""
    from hf_immunize.audit.names import label

    named = {
        access: attack and attack | {"attacker": label(attack["attacker"])}
        for access, attack in found["strongest"].items()
    }
    return found | {"strongest": named}


def _data(
    harmful: str | None,
    benign: str | None,
    dataset: str | None,
    harmful_classes: list[str] | None,
    harmful_test: str | None,
    benign_test: str | None,
    label_column: str | None,
    draw: Callable[[], HeldOut],
) -> tuple[object, object]:
    if (dataset is None) == (harmful is None) or (dataset is None) != (not harmful_classes):
        raise ArgumentError(
            "Expected either --harmful (and --benign), or --dataset with --harmful-classes, found "
            f"harmful={harmful}, dataset={dataset}, harmful_classes={harmful_classes}."
        )
    if dataset is None:
        assert harmful is not None
        return (
            harmful if harmful_test is None else (harmful, harmful_test),
            benign if benign is None or benign_test is None else (benign, benign_test),
        )
    from hf_immunize.data.sources import divide, divide_classes

    benign_part, harmful_part = divide_classes(divide(dataset, draw()), harmful_classes or [], label_column)
    return harmful_part, benign_part


def _draw(model: str, revision: str, fraction: float | None, seed: int | None) -> HeldOut:
    """How images are held out: as training did, where the model has a record."""
    from hf_immunize.errors import RecordError
    from hf_immunize.hub.collect import draw_like
    from hf_immunize.hub.record import find_record

    try:
        record = find_record(model, revision)
    except RecordError:  # the audit itself says so
        record = None
    return draw_like(record, "harmful", fraction, seed)
