"""``hf-immunize train``: from a model and two sets of images to an immunized checkpoint with its figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoImageProcessor, set_seed

from hf_immunize.errors import ArgumentError
from hf_immunize.hub.card import CardFacts, metric_rows, write_card
from hf_immunize.train_arguments import parse_arguments
from hf_immunize.train_data import load_distillation, load_model, load_splits, match_labels
from hf_immunize.training.figures import draw_spectra, new_figure, save_figure
from hf_immunize.training.trainer import ImmunizationTrainer


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
    distillation = load_distillation(data, args)
    try:
        model = load_model(data, benign, args)
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
        distillation_dataset=distillation,
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
            **({} if distillation is None else {"distillation": len(distillation)}),
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
