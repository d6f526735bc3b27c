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
# Name, metric, form, and the flags that make it a bound from below and from above.
_ROWS = (
    ("benign accuracy", "eval_accuracy", "{:.1%}", None, None),
    ("log10 κ of benign features", "eval_benign_log10_kappa", "{:.2f}", "eval_benign_is_bound", None),
    ("log10 κ of harmful features", "eval_harmful_log10_kappa", "{:.2f}", "eval_harmful_is_bound", None),
    ("rank of benign features", "eval_benign_rank", "{:.0f}", None, None),
    ("rank of harmful features", "eval_harmful_rank", "{:.0f}", None, None),
    ("RIR (exact)", "eval_rir", "{:,.4g}", "eval_rir_is_lower_bound", "eval_rir_is_upper_bound"),
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
    rows = [dict(zip(("name", "before", "after"), row, strict=True)) for row in metric_rows(facts.before, facts.after)]
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
        >>> print(plain("<b>a|b</b>\n--- www.x.org"))
        &lt;b&gt;a\|b&lt;/b&gt; \-\-\- www&#46;x.org
    """
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", html.escape(_one_line(text), quote=False))
    # Addresses that Markdown would turn into links by themselves.
    return escaped.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def _one_line(text: str) -> str:
    """For YAML, which quotes what it must by itself."""
    return " ".join(text.split())


def metric_rows(before: dict[str, float | None], after: dict[str, float | None]) -> list[tuple[str, str, str]]:
    """Rows of a table of metrics, bounds with their direction.

    Args:
        before: Metrics of `ImmunizationTrainer.evaluate`; None where a number is not finite.
        after: The same after immunization.

    Returns:
        Name, before and after, as text.

    Example:
        >>> metric_rows({"eval_rir": 1.0}, {"eval_rir": 50.0, "eval_rir_is_lower_bound": 1.0})[-1]
        ('RIR (exact)', '1', '≥ 50')
    """

    def cell(metrics: dict[str, float | None], key: str, form: str, below: str | None, above: str | None) -> str:
        lower, upper = (bool(flag and metrics.get(flag)) for flag in (below, above))
        value = metrics.get(key)
        if value is None or value != value:
            return "undetermined" if lower and upper else "–"
        return ("≥ " if lower else "≤ " if upper else "") + form.format(value)

    return [(name, cell(before, *rest), cell(after, *rest)) for name, *rest in _ROWS]
