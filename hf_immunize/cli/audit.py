"""`hf-immunize audit`: attack an immunized model before its critics do.

Heavy imports wait until the command runs, so that ``--help`` is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import partial
from inspect import Parameter, Signature
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_immunize.audit.settings import AuditSettings
from hf_immunize.errors import ArgumentError
from hf_immunize.text import printable


if TYPE_CHECKING:
    from hf_immunize.attacks.presets import Preset
    from hf_immunize.data.sources import HeldOut


def _option(kind: Any, text: str, default: Any = None, *flags: str, **limits: Any) -> tuple[Any, Any]:
    return Annotated[kind, typer.Option(*flags, help=text, **limits)], default


# What the command has beyond the fields of `AuditSettings`, or spells in another way.
_OPTIONS: dict[str, tuple[Any, Any]] = {
    "dataset": _option(str | None, "One data set with both tasks, in place of --harmful and --benign."),
    "harmful_classes": _option(
        list[str] | None, "With --dataset: a harmful class, by name or number; give it once for each."
    ),
    "harmful_test": _option(str | None, "Harmful images to measure on."),
    "benign_test": _option(str | None, "Benign images to measure on."),
    "output_dir": _option(Path, "Folder of the report, and of finished attacks to resume from.", Path("runs/audit")),
    "quick": _option(bool, "Small budgets: two minutes on a small model.", False, "--quick"),
    "full": _option(bool, "Every attacker, large budgets: hours, and a GPU.", False, "--full"),
    "attackers": _option(str | None, "Run these alone, separated by commas, such as ridge,adamw,lora_r8."),
    "steps": _option(int | None, "Steps of fine-tuning and of probes on batches, in place of the preset's."),
    "seeds": _option(int | None, "Seeds of every attack, in place of the preset's."),
    "attach": _option(
        bool, "Write the findings into MODEL's record and card; MODEL is a folder with both.", False, "--attach"
    ),
}


# By the annotation in `AuditSettings`, whose data sets are named here.
_KINDS: dict[str, Any] = {
    "Any": str | None,
    "str": str,
    "str | None": str | None,
    "int | None": int | None,
    "float | None": float | None,
    "bool": bool,
}


def _signature() -> Signature:
    """The options of the command: the fields of `AuditSettings` that have a help, and its own."""
    (model, *shared) = [one for one in fields(AuditSettings) if one.metadata]
    options: dict[str, tuple[Any, Any]] = {}
    for one in shared:
        flags = [f"--{one.name.replace('_', '-')}"] if one.type == "bool" else []
        default = None if one.default is MISSING else one.default
        limits = {name: value for name, value in one.metadata.items() if name != "help"}
        options[one.name] = _option(_KINDS[str(one.type)], one.metadata["help"], default, *flags, **limits)
    first = Annotated[str, typer.Argument(help=model.metadata["help"], show_default=False)]
    return Signature(
        [Parameter("model", Parameter.POSITIONAL_OR_KEYWORD, annotation=first)]
        + [Parameter(n, Parameter.KEYWORD_ONLY, annotation=k, default=d) for n, (k, d) in (options | _OPTIONS).items()]
    )


def audit(model: str, **given: Any) -> None:
    """Can the harmful task still be learnt? Attack an immunized model as somebody who downloaded it would.

        hf-immunize audit runs/mine --harmful my/weapons --benign my/pets --reference my/model-before --quick

    Attackers learn the harmful task from what the classifier sees (gradient descent, Adam, least squares, nearest
    neighbours), from every earlier layer, by fine-tuning (LoRA too), and by putting the public weights back. Each
    chooses its settings on a held-out part of its own training images. The same attacks run on the reference and on
    copies with random weights, to compare with. The result is that of the strongest attacker.

    The output folder keeps finished attacks: after an interruption the same command goes on there. Processes that
    `torchrun` started share the attacks out. If you set --steps or --seeds, the
    report says that the preset was changed.

    The exit code says whether the audit ran, not what it found: the lines printed and report.html say that.
    """
    import transformers

    from hf_immunize.audit.run import audit as run_audit
    from hf_immunize.features.ranks import process_index
    from hf_immunize.hub.card import attach_audit
    from hf_immunize.hub.load import CARD_NAME
    from hf_immunize.hub.record import RECORD_NAME

    asked = SimpleNamespace(model=model, **given)
    if asked.quick and asked.full:
        raise ArgumentError("Expected --quick or --full, found both. Leave one out.")
    preset = _preset(asked)
    _check_folders(asked)
    transformers.utils.logging.set_verbosity_error()
    shared = {one.name: given[one.name] for one in fields(AuditSettings) if one.metadata and one.name in given}
    shared["harmful"], shared["benign"] = _data(asked, partial(_draw, asked))
    first = process_index() == 0
    shared |= {"attackers": _names(asked.attackers), "preset": preset, "run_dir": asked.output_dir, "progress": first}
    report = run_audit(model, **shared)
    if not first:
        return
    report.write(asked.output_dir)
    typer.echo(report.summary())
    typer.echo(f"Report: {printable(asked.output_dir / 'report.html')}")
    if asked.attach:
        attach_audit(model, report.for_card())
        typer.echo(f"Attached to {RECORD_NAME} and {CARD_NAME} in {printable(model)}.")
    elif (Path(model) / RECORD_NAME).is_file():
        typer.echo(f"Not yet in {RECORD_NAME} and {CARD_NAME}: type --attach in addition; nothing is attacked anew.")


audit.__signature__ = _signature()  # type: ignore[attr-defined]
audit.__annotations__ = {name: one.annotation for name, one in _signature().parameters.items()}


def _preset(asked: SimpleNamespace) -> Preset:
    """The preset with the budget that was asked for."""
    from hf_immunize.attacks.presets import find_preset

    preset = find_preset("quick" if asked.quick else "full" if asked.full else "standard")
    return preset.changed(steps=asked.steps, seeds=asked.seeds)


def _names(words: str | None) -> list[str] | None:
    return None if words is None else [name.strip() for name in words.split(",") if name.strip()]


def _check_folders(asked: SimpleNamespace) -> None:
    """Before hours of attacks: what will be written can be."""
    from hf_immunize.files import check_writable, remove_leftovers
    from hf_immunize.hub.card import attachable_record

    check_writable(asked.output_dir, "--output-dir")
    remove_leftovers(asked.output_dir)
    if asked.attach:
        if not Path(asked.model).is_dir():
            raise ArgumentError(
                f"Expected a folder as MODEL with --attach, found {asked.model!r}. Download the checkpoint, or leave "
                "--attach out."
            )
        attachable_record(asked.model)
        check_writable(asked.model, "MODEL")


def _data(asked: SimpleNamespace, draw: Callable[[], HeldOut]) -> tuple[object, object]:
    """The harmful and the benign task."""
    if asked.dataset is None:
        amiss = asked.harmful is None or asked.harmful_classes or (asked.benign_test and asked.benign is None)
    else:
        amiss = not asked.harmful_classes or asked.harmful or asked.benign or asked.harmful_test or asked.benign_test
    if amiss:
        raise ArgumentError(
            "Expected either --harmful (and --benign, each with its --…-test), or --dataset with --harmful-classes, "
            "found neither or parts of both. Leave out what belongs to the other way."
        )
    if asked.dataset is None:
        sides = ((asked.harmful, asked.harmful_test), (asked.benign, asked.benign_test))
        harmful, benign = (train if test is None else (train, test) for train, test in sides)
        return harmful, benign
    from hf_immunize.data.sources import divide, divide_classes

    benign_part, harmful_part = divide_classes(
        divide(asked.dataset, draw()), asked.harmful_classes, asked.label_column
    )
    return harmful_part, benign_part


def _draw(asked: SimpleNamespace) -> HeldOut:
    """How images are held out: as training did, where the model has a record."""
    from hf_immunize.hub.collect import draw_like
    from hf_immunize.hub.record import find_record

    return draw_like(find_record(asked.model, asked.revision), "harmful", asked.test_fraction, asked.seed)
