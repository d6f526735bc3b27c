"""``hf-immunize train``: from a model and two sets of images to an immunized checkpoint with its figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from transformers import AutoImageProcessor, set_seed

from hf_immunize.cli.train_arguments import DataArguments, parse_arguments
from hf_immunize.cli.train_data import load_distillation, load_model, load_splits
from hf_immunize.data.splits import HeldOut
from hf_immunize.errors import ArgumentError, ImmunizationError
from hf_immunize.files import check_writable, checked, with_checksum, write_whole
from hf_immunize.hub import rows
from hf_immunize.hub.collect import describe_base_model, is_hub_id, public_name
from hf_immunize.hub.measure import Measured, groups_ratio, measure
from hf_immunize.hub.parts import BudgetRecord, DataRecord
from hf_immunize.hub.rows import metric_rows
from hf_immunize.hub.schema import from_plain, to_plain
from hf_immunize.text import library_words, printable
from hf_immunize.training.checks import as_classifier
from hf_immunize.training.figures import draw_spectra, new_figure, save_figure
from hf_immunize.training.preparation import image_rows
from hf_immunize.training.trainer import ImmunizationTrainer


def run_train(words: list[str]) -> dict[str, Any]:
    """Load, measure, immunize, measure again, and write everything to ``output_dir``.

    Args:
        words: What was typed after ``train``.

    Returns:
        What ``results.json`` holds.
    """
    data, args = parse_arguments(words)
    check_writable(args.output_dir, "--output_dir")
    set_seed(args.seed)
    benign, harmful = load_splits(data, args)
    distillation = load_distillation(data, args)
    try:
        model = load_model(data, benign.train, args)
        processor = AutoImageProcessor.from_pretrained(
            data.model, revision=data.model_revision, trust_remote_code=data.trust_remote_code
        )
    except ImmunizationError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:  # of from_pretrained
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
    before_path = Path(args.output_dir) / "before.json"
    if not args.resume_from_checkpoint:
        before = trainer.evaluate()
        if trainer.is_world_process_zero():
            write_whole(before_path, with_checksum(before) + "\n")
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint={"True": True, "true": True}.get(resume, resume) if resume else None)
    after = trainer.evaluate()
    if args.resume_from_checkpoint:
        before = before_resuming(trainer, before_path)
    results = {
        "model": public_name(data.model),
        "benign": public_name(str(data.benign or data.dataset)),
        "harmful": public_name(str(data.harmful or data.dataset))
        + (f": {', '.join(map(str, data.harmful_classes))}" if data.harmful_classes else ""),
        "images": {
            "benign_train": len(benign.train),
            "harmful_train": len(harmful.train),
            **({} if distillation is None else {"distillation": len(distillation)}),
            "benign_eval": len(benign.test),
            "harmful_eval": len(harmful.test),
        },
        "objective": trainer.objective,
        "trainable": args.trainable,
        "steps": trainer.state.global_step if trainer.evidence.step is None else trainer.evidence.step,
        "seed": args.seed,
        "before": finite(before),
        "after": finite(after),
        "budget": to_plain(trainer.evidence.budget),
    }
    describe(trainer, data, finite(before), {"benign": benign.held_out, "harmful": harmful.held_out})
    if data.groups:
        measure_groups(trainer, data, benign.test, harmful.test)
    if trainer.is_world_process_zero():
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_figure(Path(args.output_dir), trainer)
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_outputs(Path(args.output_dir), trainer, results)
    return results


def before_resuming(trainer: ImmunizationTrainer, path: Path) -> dict[str, Any]:
    """Metrics of the starting weights of a resumed run, on the images that it is measured on now.

    Args:
        trainer: After an evaluation.
        path: Where the interrupted run wrote its metrics, which may be of other images, or damaged.

    Returns:
        What was written, or where that is of other images, what the Trainer knows of the present ones.
    """
    known = trainer.starting_metrics
    try:
        written = checked(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # lost, or damaged
        return known
    shared = [(written[name], new) for name, new in known.items() if new is not None and written.get(name) is not None]
    same = all(old == new or math.isclose(old, new, rel_tol=1e-6) for old, new in shared)
    return written if same and shared else known


def describe(
    trainer: ImmunizationTrainer,
    data: DataArguments,
    before: dict[str, float | None],
    held_out: dict[str, HeldOut | None],
) -> None:
    """Tell the Trainer, for its record, what the typed names stand for.

    Args:
        trainer: The Trainer.
        data: What was typed.
        before: Metrics of the starting weights, which a resumed Trainer has not measured.
        held_out: By side, how the images measured on were drawn.
    """
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


def measure_groups(trainer: ImmunizationTrainer, data: DataArguments, benign: Any, harmful: Any) -> None:
    """RIR over groups of images, against the model loaded once more as it was.

    Args:
        trainer: With the immunized model.
        data: For the model before.
        benign: Benign images to measure on.
        harmful: Harmful images to measure on.
    """
    reference = as_classifier(load_model(data, benign, trainer.args), trainer.args).to(trainer.args.device)
    found: dict[str, tuple[Measured, Measured]] = {}
    for side, images in (("benign", benign), ("harmful", harmful)):
        rows_of = image_rows(images, side, trainer.args, trainer.model.config, labels="ignored")
        options: dict[str, Any] = {"head_module": trainer.args.head_module, "keep_features": True}
        options |= {"progress": not trainer.args.disable_tqdm}
        after, before = (
            measure(model, rows_of, trainer.processing_class, name=f"{side} (groups)", **options)
            for model in (trainer.model, reference)
        )
        found[side] = after, before
    ratio = groups_ratio(found["harmful"], found["benign"], seed=trainer.args.seed)
    trainer.evidence.attach(trainer.model, groups=ratio)


def summary_sentence(results: dict[str, Any]) -> str:
    """What was achieved, and in the last sentence what was not, from the figures alone.

    Args:
        results: With metrics "before" and "after", and maybe the state of the "budget".

    Returns:
        The sentences.
    """
    budget = results.get("budget")
    return rows.summary_sentence(
        results["before"], results["after"], None if budget is None else from_plain(BudgetRecord, budget, "budget")
    )


def write_figure(folder: Path, trainer: ImmunizationTrainer) -> None:
    """The spectra before and after, as a figure that the record names.

    Args:
        folder: The run's folder.
        trainer: For the spectra.
    """
    figure, (axes,) = new_figure(1)
    draw_spectra(axes, trainer.last_spectra)
    save_figure(figure, folder / "spectra.png")
    trainer.evidence.figures = ["spectra.png"]


def write_outputs(folder: Path, trainer: ImmunizationTrainer, results: dict[str, Any]) -> None:
    """Results as JSON, a card, and a table in the terminal.

    Args:
        folder: The run's folder.
        trainer: For the card.
        results: What to write.
    """
    sentence = summary_sentence(results)
    write_whole(folder / "results.json", json.dumps({**results, "summary": sentence}, indent=2))
    trainer.create_model_card()
    print_table(results)
    Console(soft_wrap=True).print(
        f"\n{sentence}\n\nCheckpoint, record, card and figure: {folder}/", highlight=False, markup=False
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
