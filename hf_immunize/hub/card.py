"""The model card of an immunized checkpoint, from the figures of the run alone."""

from __future__ import annotations

import html
import os
import re
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined


_NO_AUDIT = (
    "No audit was made. An ill-conditioned feature map leaves the attainable accuracy of a linear probe as it is: "
    "least squares, conjugate gradient or whitening before the probe are not slowed. Probes of earlier layers and "
    "fine-tuning of the network were not measured, and are not expected to be stopped."
)
_ROWS = (
    ("benign accuracy", "eval_accuracy", "{:.2%}"),
    ("log10 κ of benign features", "eval_benign_log10_kappa", "{:.2f}"),
    ("log10 κ of harmful features", "eval_harmful_log10_kappa", "{:.2f}"),
    ("rank of benign features", "eval_benign_rank", "{:.0f}"),
    ("rank of harmful features", "eval_harmful_rank", "{:.0f}"),
    ("RIR", "eval_rir", "{:,.4g}"),
)


@dataclass
class CardFacts:
    """What the card says.

    Attributes:
        base_model: Hub id or folder the run started from.
        benign, harmful: What the data are called.
        images: Sizes by "benign_train", "benign_eval", "harmful_train", "harmful_eval".
        objective, trainable, steps, seed: How it was made.
        before, after: Metrics of `ImmunizationTrainer.evaluate`; None where a number is not finite.
        summary: One plain sentence.
        not_stopped: What the immunization does not stop, by the audit, or that none was made.
        figure: File name beside the card, or None.
    """

    base_model: str
    benign: str
    harmful: str
    images: dict[str, int]
    objective: str
    trainable: str
    steps: int
    seed: int
    before: dict[str, float | None]
    after: dict[str, float | None]
    summary: str
    not_stopped: str = _NO_AUDIT
    figure: str | None = None
    tags: list[str] = field(default_factory=lambda: ["model-immunization", "hf-immunize", "image-classification"])

    @classmethod
    def from_results(cls, results: dict[str, Any], summary: str, **kwargs: Any) -> CardFacts:
        """Facts from what a run's ``results.json`` holds."""
        names = ("benign", "harmful", "images", "objective", "trainable", "steps", "seed", "before", "after")
        return cls(base_model=results["model"], summary=summary, **{name: results[name] for name in names}, **kwargs)


def render_card(facts: CardFacts) -> ModelCard:
    """Render the card.

    Names that users chose are escaped: none can open a tag, a link, a table cell or a metadata block.

    Args:
        facts: What it says.

    Returns:
        The card, with metadata that `huggingface_hub` reads back.
    """
    metrics = [("accuracy", "Accuracy", "eval_accuracy"), ("log10_rir", "log10 RIR (exact)", "eval_log10_rir")]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="benign-held-out",
            dataset_name=_one_line(facts.benign),
            metric_type=kind,
            metric_name=name,
            metric_value=round(float(value), 6),
        )
        for kind, name, key in metrics
        if (value := facts.after.get(key)) is not None
    ]
    title = f"Immunized {Path(facts.base_model).name}"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=facts.tags,
        model_name=_one_line(title),
        eval_results=results or None,
    )
    rows = [
        {"name": name, **{moment: _cell(values.get(key), form, key, values) for moment, values in moments.items()}}
        for moments in [{"before": facts.before, "after": facts.after}]
        for name, key, form in _ROWS
    ]
    source = files("hf_immunize.hub").joinpath("templates/card.md.jinja").read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(source)
    return ModelCard(
        template.render(
            card_data=data.to_yaml(),
            title=plain(title),
            summary=facts.summary,
            rows=rows,
            figure=facts.figure,
            not_stopped=facts.not_stopped,
            base_model=plain(facts.base_model),
            benign=plain(facts.benign),
            harmful=plain(facts.harmful),
            images=facts.images,
            objective=plain(facts.objective),
            trainable=plain(facts.trainable),
            steps=facts.steps,
            seed=facts.seed,
        )
    )


def write_card(path: str | os.PathLike[str], facts: CardFacts) -> None:
    """Render the card and write it.

    Args:
        path: File to write.
        facts: What it says.
    """
    Path(path).write_text(str(render_card(facts)), encoding="utf-8")


def plain(text: str) -> str:
    r"""Text as one line without meaning in Markdown or HTML.

    Args:
        text: Anything a user chose, such as the name of a class.

    Returns:
        The same to the eye.

    Example:
        >>> print(plain("<b>a|b</b>\n---"))
        &lt;b&gt;a\|b&lt;/b&gt; \-\-\-
    """
    return re.sub(r"([\\`*_{}\[\]()#+!|-])", r"\\\1", html.escape(_one_line(text), quote=False))


def _one_line(text: str) -> str:
    """For YAML, which quotes what it must by itself."""
    return " ".join(text.split())


def _cell(value: float | None, form: str, key: str, metrics: dict[str, float | None]) -> str:
    if value is None:
        return "undetermined" if key == "eval_rir" else "–"
    text = form.format(value)
    if key == "eval_rir" and metrics.get("eval_rir_is_lower_bound"):
        return f"≥ {text}"
    if key == "eval_rir" and metrics.get("eval_rir_is_upper_bound"):
        return f"≤ {text}"
    return text
