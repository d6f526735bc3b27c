"""The model card: a template over the record, its figures in the Hub's index of results, and an audit added later."""

from __future__ import annotations

import functools
import html
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined, Template

from hf_immunize.errors import CardError, WeightsError
from hf_immunize.files import write_whole
from hf_immunize.hub.collect import HUB_ID
from hf_immunize.hub.load import CARD_NAME, changed_weights, refuse_links
from hf_immunize.hub.record import (
    RECORD_NAME,
    AuditRecord,
    DataRecord,
    ImmunizationRecord,
    from_plain,
    read_record,
    write_record,
)
from hf_immunize.intervals import removal
from hf_immunize.linear.time import probing_metrics
from hf_immunize.text import printable
from hf_immunize.vision.loading import checkpoint_form


TAGS = ("model-immunization", "hf-immunize", "image-classification")
# This library's part of a card. One whose end mark is lost does not reach to the end of the next one: what stands
# between is the user's.
_BEGIN = "<!-- hf-immunize: begin. Written anew from immunization.json; your own text stays outside. -->"
_END = "<!-- hf-immunize: end -->"
_OPENED = rf"^{re.escape(_BEGIN)}\s*?$"
_OURS = re.compile(rf"{_OPENED}(?:(?!{_OPENED}).)*?^{re.escape(_END)}\s*?$", re.DOTALL | re.MULTILINE)
_FIGURES = {
    "spectra.png": "Spectra of benign and harmful features, before and after",
    "before_after.png": "Spectra of benign and harmful features and linear probing, before and after",
}
_ACCESS_WORDS = {
    "head_input": "the classifier's input",
    "any_layer": "the output of any layer",
    "fine_tuning": "all weights (fine-tuning)",
}
# Name, metric, form, and the flags that make it a bound from below and from above.
INTERCEPT_ROW = "RIR (of a probe with an intercept)"
_ROWS = (
    ("benign accuracy", "eval_accuracy", "{:.1%}", "", ""),
    ("log10 κ of benign features", "eval_benign_log10_kappa", "{:.2f}", "eval_benign_is_bound", ""),
    ("log10 κ of harmful features", "eval_harmful_log10_kappa", "{:.2f}", "eval_harmful_is_bound", ""),
    ("rank of benign features", "eval_benign_rank", "{:.0f}", "", ""),
    ("rank of harmful features", "eval_harmful_rank", "{:.0f}", "", ""),
    *(
        (
            f"steps of a {side} probe{by}",
            f"eval_{side}_{key}_steps",
            "{:,.0f}",
            f"eval_{side}_{key}_is_lower_bound",
            "",
        )
        for key, by in (("probing", ""), ("conjugate_gradient", " by conjugate gradient"))
        for side in ("benign", "harmful")
    ),
    (
        INTERCEPT_ROW,
        "eval_intercept_rir",
        "{:,.4g}",
        "eval_intercept_rir_is_lower_bound",
        "eval_intercept_rir_is_upper_bound",
    ),
    ("RIR (exact, the paper's)", "eval_rir", "{:,.4g}", "eval_rir_is_lower_bound", "eval_rir_is_upper_bound"),
)


# ---- text from outside, made harmless ----


def plain(text: str) -> str:
    r"""Text as one line without meaning in Markdown or HTML, the same to the eye.

    >>> print(plain("<b>a|b</b>\n--- www.x.org"))
    &lt;b&gt;a\|b&lt;/b&gt; --- www&#46;x.org
    >>> print(plain("- 1. item"), plain("3. item"))
    \- 1. item 3\. item
    """
    escaped = re.sub(r"([\\`*_{}\[\]()#!|~$])", r"\\\1", html.escape(printable(text), quote=False))
    # What opens a list, a heading's underline or a rule does so at the beginning of a line only.
    escaped = re.sub(r"^([-+=:])", r"\\\1", escaped)
    escaped = re.sub(r"^(\d+)([.)])", r"\1\\\2", escaped).replace("\\\\)", "\\)")
    # Addresses that Markdown would turn into links by themselves.
    escaped = re.sub(r"(?i)(https?|ftp|mailto|xmpp):", r"\1&#58;", escaped).replace("://", "&#58;//")
    return re.sub(r"(?i)www\.", lambda m: m[0][:3] + "&#46;", escaped).replace("@", "&#64;")


def slug(text: str) -> str:
    """Text as an identifier of letters, digits and ``-._/``, as dataset types and licences are on the Hub.

    >>> slug("scikit-learn digits 0 to 4"), slug("日本"), slug("user/name")
    ('scikit-learn-digits-0-to-4', 'unnamed', 'user/name')
    """
    if HUB_ID.fullmatch(text):
        return text
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")[:96].rstrip("-") or "unnamed"


# ---- figures as rows and sentences ----


def metric_rows(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, before and after of the metrics of `ImmunizationTrainer.evaluate`, as text, bounds with their direction.

    >>> metric_rows({"eval_rir": 1.0}, {"eval_rir": 50.0, "eval_rir_is_lower_bound": 1.0})[-1]
    ("RIR (exact, the paper's)", '1', '≥ 50')
    """

    def cell(metrics: dict[str, Any], key: str, form: str, below: str, above: str) -> str:
        lower, upper = bool(metrics.get(below)), bool(metrics.get(above))
        value = metrics.get(key)
        if value is None or value != value:
            return "undetermined" if lower and upper else "–"
        return ("≥ " if lower else "≤ " if upper else "") + form.format(value)

    rows = []
    for name, key, form, below, above in _ROWS:
        old, new = (cell(metrics, key, form, below, above) for metrics in (before, after))
        if name.startswith("steps") and after.get(below) and (before.get(key) or 0) >= after[key]:
            old, new = f"not in {old}", f"not in {old} either: no slowing can be told"
        rows.append((name, old, new))
    return rows


def _metrics_of(record: ImmunizationRecord) -> tuple[dict[str, Any], dict[str, Any]]:
    """A record's figures before and after, by the names of `ImmunizationTrainer.evaluate`."""
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    if (metric := record.metric) is not None:
        before[f"eval_{metric.name}"], after[f"eval_{metric.name}"] = metric.before, metric.after
        if metric.change is not None and metric.change_interval is not None:
            names = (f"eval_accuracy_change{end}" for end in ("", "_low", "_high"))
            after |= dict(zip(names, (metric.change, *metric.change_interval), strict=True))
    for side, features in (("benign", record.benign_features), ("harmful", record.harmful_features)):
        for metrics, part in ((before, features.before), (after, features.after)):
            if part is not None:
                metrics[f"eval_{side}_log10_kappa"] = part.log10_kappa
                metrics[f"eval_{side}_is_bound"] = part.is_bound
                metrics[f"eval_{side}_rank"] = part.rank
        if (steps := features.probing) is not None:
            taken = {"probing": steps.before, "conjugate_gradient": steps.conjugate_before}
            before |= {f"eval_{side}_{method}_steps": number for method, number in taken.items()}
    times = {"benign": record.benign_features.probing, "harmful": record.harmful_features.probing}
    after |= {f"eval_{name}": value for name, value in probing_metrics(times).items()}
    for protocol, name in (("exact", "eval_rir"), ("intercept", "eval_intercept_rir")):
        if (ratio := record.ratios.get(protocol)) is not None:
            before[name] = 1.0
            after[name] = None if ratio.log10_rir is None else _power(ratio.log10_rir)
            after[f"{name}_is_lower_bound"] = ratio.bound in ("lower", "undetermined")
            after[f"{name}_is_upper_bound"] = ratio.bound in ("upper", "undetermined")
    return before, after


def record_rows(record: ImmunizationRecord) -> list[tuple[str, str, str]]:
    """Rows of the card's table: those of which something is known."""
    rows = [row for row in metric_rows(*_metrics_of(record)) if row[1:] != ("–", "–")]
    if record.metric is not None and record.metric.name != "accuracy":
        old, new = ("–" if value is None else f"{value:.4g}" for value in (record.metric.before, record.metric.after))
        rows.insert(0, (f"benign {plain(record.metric.name)}", old, new))
    exact = record.ratios.get("exact")
    for side, number in (("harmful", "(i)"), ("benign", "(ii)")):
        value = getattr(exact, f"log10_{side}_ratio", None)
        if value is not None:
            features = getattr(record, f"{side}_features")
            now, then = features.after, features.before
            gained = now is not None and then is not None and now.rank > then.rank
            sign = "≥ " if now is not None and now.is_bound else "≤ " if gained else ""
            rows.append((f"{number}, growth of {side} κ", "1", f"{sign}{_power(value):,.4g}"))
    return rows


def _power(exponent: float) -> float:
    """10 to a power, saturating at the largest float."""
    return 10.0**exponent if exponent < math.log10(1.7e308) else 1.7e308


def summary_sentence(before: dict[str, Any], after: dict[str, Any], warning: str = "") -> str:
    """What was achieved by the metrics of `ImmunizationTrainer.evaluate`; where that is little, what to do and why."""
    summary = _template("sentences.jinja").module.summary  # type: ignore[attr-defined]
    return " ".join([*summary(before, after).split(), *warning.split()])


# ---- metadata ----


def eval_results(record: ImmunizationRecord) -> list[EvalResult]:
    """Accuracy, ratios and attacks as the Hub's index of results knows them; finite numbers only."""
    results: list[EvalResult] = []

    def add(side: str, kind: str, name: str, value: float, **arguments: str) -> None:
        data = getattr(record, side) or DataRecord("")
        title = printable(data.name)
        results.append(
            EvalResult(
                task_type="image-classification",
                task_name="Image classification",
                # The Hub groups by type, configuration, split and revision: one data set may serve both tasks.
                dataset_type=slug(title),
                dataset_name=title or f"{side} images",
                dataset_config=side,
                dataset_split=printable(data.split) if data.split else None,
                dataset_revision=printable(data.revision) if data.revision else None,
                metric_type=kind,
                metric_name=name,
                metric_value=float(f"{value:.8g}"),
                metric_args=arguments or None,
            )
        )

    if (metric := record.metric) is not None:
        add("benign", slug(metric.name), f"Benign {printable(metric.name)}", metric.after)
    for name, ratio in record.ratios.items():
        if ratio.log10_rir is not None:
            protocol = printable(name)
            bound = {} if ratio.bound is None else {"bound": ratio.bound}
            words = {"lower": ", bound from below", "upper": ", bound from above"}.get(ratio.bound or "", "")
            title = f"log10 RIR, relative immunization ratio{words} ({protocol})"
            add("harmful", "log10_rir", title, ratio.log10_rir, protocol=protocol, **bound)
    for kind, attack in (record.audit.strongest if record.audit else {}).items():
        if attack is not None:
            access = printable(kind)
            title = f"Strongest attacker with {access.replace('_', ' ')}: {printable(attack.attacker)}"
            add("harmful", "accuracy", title, attack.accuracy, access=access)
    return results


@dataclass
class CardOptions:
    """What a card says that the record does not know."""

    repo_id: str | None = None  # where the model can be loaded from; without it the code shows a folder
    model_name: str | None = None  # title, and name in the index of results
    license: str | None = None  # otherwise the existing card's, or the record's
    language: str | Sequence[str] | None = None
    tags: Sequence[str] = field(default_factory=tuple)
    datasets: Sequence[str] = field(default_factory=tuple)  # further ids on the Hub
    form: str = "plain"  # how the checkpoint loads, see `checkpoint_form`; `write_card` looks at the folder


def _metadata(record: ImmunizationRecord, options: CardOptions, name: str, old: ModelCard | None) -> ModelCardData:
    data: Any = old.data if old is not None else ModelCardData()
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or "image-classification"
    data.tags = _union(data.tags, [*TAGS, *(printable(tag) for tag in options.tags)])
    if options.language:
        languages = [options.language] if isinstance(options.language, str) else options.language
        data.language = [printable(language) for language in languages]
    licence = options.license or (None if data.license else record.license)
    if licence:
        known = re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,63}", licence)
        data.license, data.license_name = (licence, None) if known else ("other", slug(licence))
    if record.base_model.on_hub and HUB_ID.fullmatch(record.base_model.name):
        data.base_model = record.base_model.name
    named = [part.name for part in (record.benign, record.harmful) if part is not None and part.on_hub]
    data.datasets = _union(data.datasets, filter(HUB_ID.fullmatch, [*named, *options.datasets])) or None
    others = [result for result in data.eval_results or [] if result.dataset_config not in ("benign", "harmful")]
    results = eval_results(record) + others
    data.model_name, data.eval_results = (name, results) if results else (None, None)
    return data


def _union(first: Any, second: Any) -> list[str]:
    return list(dict.fromkeys([*([first] if isinstance(first, str) else first or []), *second]))


# ---- the card ----


def render_card(
    record: ImmunizationRecord, options: CardOptions | None = None, existing: str | None = None
) -> ModelCard:
    """The card, with metadata that `huggingface_hub` reads back; of an existing one, all that is not ours is kept."""
    options = options or CardOptions()
    old = _read_card(existing) if existing and existing.strip() else None
    name = printable(options.model_name or "") or (old and old.data.get("model_name"))
    name = name or f"Immunized {printable(record.base_model.name)}"
    data = _metadata(record, options, name, old)
    body = f"{_BEGIN}\n\n{_body(record, options, name)}\n{_END}"
    text = f"\n{body}\n"
    if old is not None:
        match = _OURS.search(old.text)
        # Spliced, not substituted: a backslash in the text is a backslash.
        start, end = match.span() if match else (len(old.text), len(old.text))
        text = old.text[:start] + ("" if match else "\n") + body + (old.text[end:] or "\n")
    return ModelCard(f"---\n{data.to_yaml(line_break=chr(10))}\n---\n{text}")


def write_card(folder: str | os.PathLike[str], record: ImmunizationRecord, options: CardOptions | None = None) -> Path:
    """Render the card of a checkpoint and write it, keeping the user's own sections of the one that is there."""
    refuse_links(folder, [CARD_NAME])  # the text behind a link may not be for others
    path = Path(folder) / CARD_NAME
    try:
        existing = path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise CardError(f"Expected {CARD_NAME} in UTF-8, found: {error}. Save it as UTF-8, or remove it.") from error
    options = replace(options or CardOptions(), form=checkpoint_form(folder))
    return write_whole(path, str(render_card(record, options, existing)))


@functools.cache
def _template(name: str) -> Template:
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {
        "plain": plain,
        "removal": removal,
        "share": lambda value: "–" if value is None else f"{value:.1%}",
        "line": lambda text: " ".join(text.split()),
    }
    source = files("hf_immunize.hub").joinpath("templates", name).read_text(encoding="utf-8")
    return environment.from_string(source)


def _body(record: ImmunizationRecord, options: CardOptions, title: str) -> str:
    rows = record_rows(record)
    parts = [part for side in (record.benign_features, record.harmful_features) for part in (side.before, side.after)]
    strongest = record.audit.strongest if record.audit is not None else {}
    place = options.repo_id or ""
    return _template("card.md.jinja").render(
        record=record,
        title=title,
        place=place if HUB_ID.fullmatch(place) else "path/to/this/folder",
        form=options.form,
        summary=summary_sentence(*_metrics_of(record)),
        rows=rows,
        has_bounds=any(("≥" in row[2] or "≤" in row[2]) and not row[0].startswith("steps") for row in rows),
        has_steps=any(row[0].startswith("steps") for row in rows),
        has_conjugate=any(row[0].endswith("conjugate gradient") for row in rows),
        of_components=record.harmful_features.probing and record.harmful_features.probing.targets == "components",
        short=any(part is not None and part.num_samples < part.dim for part in parts),
        set_by_norm=any(part is not None and part.set_by_norm for part in parts),
        figures={name: _FIGURES.get(name, plain(name)) for name in record.figures},
        attacks={access: attack for access, attack in strongest.items() if attack is not None},
        access_words=_ACCESS_WORDS,
        software=", ".join(f"{name} {version}" for name, version in record.software.items()) or "not recorded",
    )


def _read_card(text: str) -> ModelCard:
    try:
        return ModelCard(text)
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise CardError(
            f"Expected metadata in YAML between two lines '---' at the top of {CARD_NAME}, found: "
            f"{' '.join(str(error).splitlines()[:4])}. Repair it by hand, or remove the file to have it written anew."
        ) from error


# ---- an audit, added to the checkpoint that was attacked ----


def attachable_record(folder: str | os.PathLike[str]) -> ImmunizationRecord:
    """The record of a checkpoint, if it is of these weights, so that an audit of them can be added to it."""
    record = read_record(folder)
    if changed := changed_weights(folder, record.weights):
        raise WeightsError(
            f"Expected the weights that {RECORD_NAME} names, found that {'; '.join(changed)}. An audit of other "
            "weights cannot be added to it: measure and save the model again."
        )
    return record


def attach_audit(folder: str | os.PathLike[str], found: Mapping[str, Any]) -> AuditRecord:
    """Write the findings of an audit, of the form of `AuditRecord`, into record and card: into both or neither."""
    before = attachable_record(folder)
    audit = from_plain(AuditRecord, dict(found), "audit")
    record = replace(before, audit=audit)
    write_record(folder, record)
    try:
        write_card(folder, record)
    except BaseException:
        write_record(folder, before)
        raise
    return audit
