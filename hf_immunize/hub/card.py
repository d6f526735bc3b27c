"""The findings of an audit into the record and the card of the checkpoint that was attacked."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined
from transformers.utils import logging

from hf_immunize.errors import CardError, WeightsError
from hf_immunize.files import write_whole
from hf_immunize.hub.collect import HUB_ID
from hf_immunize.hub.outgoing import refuse_links
from hf_immunize.hub.record import (
    ACCESS,
    RECORD_NAME,
    AttackRecord,
    AuditRecord,
    BudgetRecord,
    DataRecord,
    ImmunizationRecord,
    RatioRecord,
    from_plain,
    read_record,
    write_record,
)
from hf_immunize.hub.text import code_place, plain, slug
from hf_immunize.hub.weights import changed_weights
from hf_immunize.text import printable
from hf_immunize.vision.loading import checkpoint_form


logger = logging.get_logger(__name__)


# Name, metric, form, and the flags that make it a bound from below and from above.
_ROWS = (
    ("benign accuracy", "eval_accuracy", "{:.1%}", None, None),
    ("log10 κ of benign features", "eval_benign_log10_kappa", "{:.2f}", "eval_benign_is_bound", None),
    ("log10 κ of harmful features", "eval_harmful_log10_kappa", "{:.2f}", "eval_harmful_is_bound", None),
    ("rank of benign features", "eval_benign_rank", "{:.0f}", None, None),
    ("rank of harmful features", "eval_harmful_rank", "{:.0f}", None, None),
    ("RIR (exact)", "eval_rir", "{:,.4g}", "eval_rir_is_lower_bound", "eval_rir_is_upper_bound"),
)
_ACCESS_WORDS = {
    "head_input": "the classifier's input",
    "any_layer": "the output of any layer",
    "fine_tuning": "all weights (fine-tuning)",
}
_NO_AUDIT = (
    "No audit was made. An ill-conditioned feature map leaves the attainable accuracy of a linear probe as it is: "
    "least squares, conjugate gradient or whitening before the probe are not slowed. Probes of earlier layers and "
    "fine-tuning of the network were not measured, and are not expected to be stopped."
)
# Below this ratio nothing worth the name was achieved; a larger loss of accuracy is said to be one. The default budget
# bounds a change in the probability of the right class by as much.
_ACHIEVED, _LOST = 2.0, 0.05
# Regularizers of so small a part of their first weight move nothing.
_FADED = 0.1
# Objectives that switch rectifiers off.
_HIDING = ("silence",)
_HIDDEN = (
    "Rectifiers that are off hide what enters them and do not erase it: whoever has the weights reads it there, and "
    "BatchNorm that takes the statistics of its batch, as in fine-tuning, switches them on again."
)


def metric_rows(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str]]:
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

    def cell(metrics: dict[str, Any], key: str, form: str, below: str | None, above: str | None) -> str:
        lower, upper = (bool(flag and metrics.get(flag)) for flag in (below, above))
        value = metrics.get(key)
        if value is None or value != value:
            return "undetermined" if lower and upper else "–"
        return ("≥ " if lower else "≤ " if upper else "") + form.format(value)

    return [(name, cell(before, *rest), cell(after, *rest)) for name, *rest in _ROWS]


def record_metrics(record: ImmunizationRecord) -> tuple[dict[str, Any], dict[str, Any]]:
    """A record's figures by the names `ImmunizationTrainer.evaluate` gives them, before and after.

    Args:
        record: The record.

    Returns:
        Metrics before and after; what the record does not know is left out.
    """
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    if record.metric is not None:
        after[f"eval_{record.metric.name}"] = record.metric.after
        if record.metric.before is not None:
            before[f"eval_{record.metric.name}"] = record.metric.before
    for side, features in (("benign", record.benign_features), ("harmful", record.harmful_features)):
        for metrics, part in ((before, features.before), (after, features.after)):
            if part is not None:
                metrics[f"eval_{side}_log10_kappa"] = part.log10_kappa
                metrics[f"eval_{side}_is_bound"] = float(part.is_bound)
                metrics[f"eval_{side}_rank"] = float(part.rank)
    exact = record.ratios.get("exact")
    if exact is not None:
        before["eval_rir"] = 1.0
        after["eval_rir"] = None if exact.log10_rir is None else _power(exact.log10_rir)
        after["eval_rir_is_lower_bound"] = float(exact.bound in ("lower", "undetermined"))
        after["eval_rir_is_upper_bound"] = float(exact.bound in ("upper", "undetermined"))
    return before, after


def record_rows(record: ImmunizationRecord) -> list[tuple[str, str, str]]:
    """Rows of the card's table.

    Args:
        record: The record.

    Returns:
        Name, before and after, as text; only rows of which something is known.
    """
    rows = [row for row in metric_rows(*record_metrics(record)) if row[1:] != ("–", "–")]
    if record.metric is not None and record.metric.name != "accuracy":
        old, new = ("–" if value is None else f"{value:.4g}" for value in (record.metric.before, record.metric.after))
        rows.insert(0, (f"benign {plain(record.metric.name)}", old, new))
    for side, number in (("harmful", "(i)"), ("benign", "(ii)")):
        exact = record.ratios.get("exact")
        value = None if exact is None else getattr(exact, f"log10_{side}_ratio")
        if value is not None:
            features = getattr(record, f"{side}_features")
            now, then = features.after, features.before
            gained = now is not None and then is not None and now.rank > then.rank
            sign = "≥ " if now is not None and now.is_bound else "≤ " if gained else ""
            rows.append((f"{number}, growth of {side} κ", "1", f"{sign}{_power(value):,.4g}"))
    groups = record.ratios.get("groups")
    if groups is not None:
        count = "" if groups.num_groups is None else f", {groups.num_groups} groups of {groups.group_size}"
        rows.append((f"RIR (mean ± standard deviation{count})", "1", _groups_cell(groups)))
    return rows


def summary_sentence(before: dict[str, Any], after: dict[str, Any], budget: BudgetRecord | None = None) -> str:
    """What was achieved in one plain sentence, from the figures alone, and in the last one what went wrong, and why.

    Args:
        before: Metrics of `ImmunizationTrainer.evaluate` before immunization.
        after: Metrics after.
        budget: What became of the benign budget, if that is known.

    Returns:
        The sentences.
    """
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
    old, new = before.get("eval_accuracy"), after.get("eval_accuracy")
    if new is None:
        accuracy = "benign accuracy was not measured"
    elif old is None:
        accuracy = f"benign accuracy is {new:.1%} (it was not measured before)"
    else:
        accuracy = f"benign accuracy changed by {100 * (new - old):+.1f} points"
    return (
        f"On held-out images {ratio}, and {accuracy}; a large ratio slows gradient descent on these features, and by "
        f"itself stops neither least squares, nor probes of earlier layers, nor fine-tuning. "
        f"{outcome_sentence(before, after, budget)}"
    ).rstrip()


def outcome_sentence(before: dict[str, Any], after: dict[str, Any], budget: BudgetRecord | None) -> str:
    """What a run failed at, with the reason, and the state of its budget.

    Args:
        before: Metrics before immunization.
        after: Metrics after.
        budget: What became of the benign budget, if that is known.

    Returns:
        One sentence; empty where nothing failed and no budget is known.

    Example:
        >>> outcome_sentence({"eval_accuracy": 0.5}, {"eval_accuracy": 0.4, "eval_rir": 9.0}, None)
        'This run cost 10.0 points of benign accuracy.'
    """
    rir, old, new = after.get("eval_rir"), before.get("eval_accuracy"), after.get("eval_accuracy")
    failed = []
    if rir is not None and rir < _ACHIEVED and not after.get("eval_rir_is_lower_bound"):
        failed.append(f"achieved nothing (an RIR of {rir:,.3g})")
    drop = 0.0 if old is None or new is None else old - new
    if drop > _LOST:
        failed.append(f"cost {100 * drop:.1f} points of benign accuracy")
    said = f"This run {' and '.join(failed)}" if failed else ""
    if budget is None:
        return f"{said}." if said else ""
    state = budget_words(budget)
    if not said:
        return state
    if budget.exceeded:
        return f"{said}: {_lowered(state)}"
    left = budget.spent < 0.5 * budget.limit
    remedy = (
        "lower the budget, or give more images to distil on"
        if drop > _LOST
        else "train longer or at a higher learning rate"
        if left
        else "raise the budget, train longer, or give images to distil on"
    )
    return f"{said}: {_lowered(state.rstrip('.'))}; {remedy}."


def budget_words(budget: BudgetRecord) -> str:
    """The state of a benign budget and what it means, as one sentence.

    Args:
        budget: What became of it.

    Returns:
        The sentence.

    Example:
        >>> budget_words(BudgetRecord(limit=0.05, measure="total_variation", spent=0.04, weight=1.0))
        'The benign side moved 0.04 of its budget of 0.05 (total variation).'
    """
    measure = plain(budget.measure.replace("_", " "))
    if not budget.exceeded:
        return f"The benign side moved {budget.spent:.2g} of its budget of {budget.limit:g} ({measure})."
    faded = (
        f", so that the weights of the regularizers faded to {budget.weight:.1g} of those at the start"
        if budget.weight < _FADED
        else ", so that the weights of the regularizers fade"
    )
    return (
        f"The benign side moved {budget.spent:.2g}, {budget.spent / budget.limit:.1f} times its budget of "
        f"{budget.limit:g} ({measure}){faded}: lower the learning rate, at which a few steps go past it."
    )


def _lowered(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def not_stopped(audit: AuditRecord | None, objective: str = "") -> str:
    """What the immunization does not stop, by the audit, or that none was made; and what its objective never stops.

    Args:
        audit: What it found.
        objective: What was minimized.

    Returns:
        Plain sentences, harmless in Markdown.
    """
    beside = [_HIDDEN] if objective in _HIDING else []
    if audit is None:
        return " ".join([_NO_AUDIT, *beside])
    sentences = []
    for access in ACCESS:
        attack = audit.strongest.get(access)
        words = _ACCESS_WORDS[access]
        if attack is None:
            sentences.append(
                f"An attacker with {words} was not tried; nothing is known of that, and it is not expected to be "
                "stopped."
            )
            continue
        compared = []
        if attack.reference_accuracy is not None:
            compared.append(f"{attack.reference_accuracy:.1%} on the model before immunization")
        if attack.chance is not None:
            compared.append(f"chance {attack.chance:.1%}")
        sentences.append(
            f"With {words}, the strongest attacker tried ({_attacker(access, attack)}) reaches {attack.accuracy:.1%} "
            f"of the harmful task{' (' + '; '.join(compared) + ')' if compared else ''}."
        )
    made = f"By an audit with the preset {plain(audit.preset)} (version {audit.preset_version})."
    return " ".join([made, *sentences, *beside, "Attackers with other methods or more data may reach more."])


def attack_rows(audit: AuditRecord | None) -> list[dict[str, str]]:
    """Rows of the card's table of attackers.

    Args:
        audit: What it found.

    Returns:
        Rows of text, harmless in Markdown.
    """

    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    return [
        {
            "access": _ACCESS_WORDS.get(access, plain(access)),
            "attacker": _attacker(access, attack),
            "accuracy": share(attack.accuracy),
            "reference": share(attack.reference_accuracy),
            "chance": share(attack.chance),
        }
        for access, attack in (audit.strongest if audit else {}).items()
        if attack is not None
    ]


def _attacker(access: str, attack: AttackRecord) -> str:
    where = f" at {attack.layer}" if access == "any_layer" and attack.layer else ""
    return plain(f"{attack.attacker}{where}")


def _groups_cell(ratio: RatioRecord) -> str:
    if ratio.log10_rir is None:
        return "undetermined"
    mean = _power(ratio.log10_rir)
    sign = {"lower": "≥ ", "upper": "≤ "}.get(ratio.bound or "", "")
    return f"{sign}{mean:,.4g}" + ("" if ratio.relative_std is None else f" ± {mean * ratio.relative_std:,.3g}")


def _power(exponent: float) -> float:
    """10 to a power, saturating at the largest float."""
    return 10.0**exponent if exponent < math.log10(1.7e308) else 1.7e308


CARD_NAME = "README.md"
TAGS = ("model-immunization", "hf-immunize", "image-classification")
_BEGIN = "<!-- hf-immunize: begin. Written anew from immunization.json; your own text stays outside. -->"
_END = "<!-- hf-immunize: end -->"
_OPENED = re.compile(rf"^{re.escape(_BEGIN)}\s*?$", re.MULTILINE)
# A part whose end mark is lost does not reach to the end of the next one: what stands between is the user's.
_OURS = re.compile(rf"{_OPENED.pattern}(?:(?!{_OPENED.pattern}).)*?^{re.escape(_END)}\s*?$", re.DOTALL | re.MULTILINE)
_METRICS = ("accuracy", "log10_kappa", "rir", "log10_rir", "log10_harmful_ratio", "log10_benign_ratio")
_FIGURES = {
    "spectra.png": "Spectra of benign and harmful features, before and after",
    "before_after.png": "Spectra of benign and harmful features and linear probing, before and after",
}
_NOTHING_MEASURED = (
    "Nothing was measured on these weights: what is said of the method below is what was done, not what it reached."
)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


@dataclass
class CardOptions:
    """What a card says that the record does not know.

    Attributes:
        repo_id: Where the model can be loaded from; without it the code shows a folder.
        model_name: Title and name in the index of results.
        license: Licence; otherwise the existing card's, or the record's.
        language: Language or languages.
        tags: Further tags.
        datasets: Further ids of datasets on the Hub.
        form: How the checkpoint loads, see `checkpoint_form`; `write_card` looks at the folder.
    """

    repo_id: str | None = None
    model_name: str | None = None
    license: str | None = None
    language: str | Sequence[str] | None = None
    tags: Sequence[str] = field(default_factory=tuple)
    datasets: Sequence[str] = field(default_factory=tuple)
    form: str = "plain"


def render_card(
    record: ImmunizationRecord, options: CardOptions | None = None, existing: str | None = None
) -> ModelCard:
    """Render the card.

    Names that users chose are escaped: none can open a tag, a link, a table cell or a metadata block. Of an existing
    card, the metadata and all text outside this library's own part are kept.

    Args:
        record: What it says.
        options: What the record does not know.
        existing: Text of the card to renew.

    Returns:
        The card, with metadata that `huggingface_hub` reads back.

    Raises:
        CardError: If the existing card's metadata cannot be read.
    """
    options = options or CardOptions()
    old = _read_card(existing) if existing and existing.strip() else None
    name = printable(options.model_name or "") or (old and old.data.get("model_name"))
    name = name or f"Immunized {printable(record.base_model.name)}"
    data = _metadata(record, options, name, old)
    body = f"{_BEGIN}\n\n{_body(record, options, name)}\n{_END}"
    text = "\n" + body + "\n"
    if old is not None:
        # Spliced, not substituted: a backslash in the text is a backslash.
        match = _OURS.search(old.text) or _OPENED.search(old.text)
        if match is not None and match[0].strip() == _BEGIN:
            logger.warning(
                f"The line {_END!r} is gone from {CARD_NAME}: what was written there before can't be told from your "
                "own text, and all of it stays below the new part. Take out what is outdated."
            )
        text = (
            old.text[: match.start()] + body + old.text[match.end() :] if match else f"{old.text.rstrip()}\n\n{body}\n"
        )
    return ModelCard(f"---\n{data.to_yaml(line_break=chr(10))}\n---\n{text}")


def write_card(folder: str | os.PathLike[str], record: ImmunizationRecord, options: CardOptions | None = None) -> Path:
    """Render the card of a checkpoint and write it, keeping the user's own sections of the one that is there.

    Args:
        folder: The checkpoint's folder.
        record: What it says.
        options: What the record does not know.

    Returns:
        The file.

    Raises:
        CardError: If the card that is there, or its metadata, cannot be read; it is left as it is.
        ArgumentError: If the card is a symbolic link: the text behind it may not be for others.
        CheckpointError: If it cannot be written.
    """
    refuse_links(folder, [CARD_NAME])
    path = Path(folder) / CARD_NAME
    try:
        existing = path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise CardError(f"Expected {CARD_NAME} in UTF-8, found: {error}. Save it as UTF-8, or remove it.") from error
    options = replace(options or CardOptions(), form=checkpoint_form(folder))
    text = str(render_card(record, options, existing))
    return write_whole(path, text)


def eval_results(record: ImmunizationRecord) -> list[EvalResult]:
    """The record's figures as the Hub's index of results knows them.

    Args:
        record: The record.

    Returns:
        Benign accuracy, log10 κ of both tasks, RIR with its parts, and the strongest attackers; finite numbers only.
    """
    benign, harmful = _Task("benign", record.benign), _Task("harmful", record.harmful)
    results = []
    if record.metric is not None:
        kind = slug(record.metric.name)
        results.append(benign.result(kind, f"Benign {printable(record.metric.name)}", record.metric.after))
    for task, features in ((benign, record.benign_features), (harmful, record.harmful_features)):
        if features.after is not None:
            bound = "lower" if features.after.is_bound else None
            name = f"log10 κ of {task.side} features{_bound_words(bound)}"
            results.append(task.result("log10_kappa", name, features.after.log10_kappa, _arguments("exact", bound)))
    for protocol, ratio in record.ratios.items():
        after = record.harmful_features.after
        lower = protocol == "exact" and after is not None and after.is_bound
        results += _ratio_results(harmful, printable(protocol), ratio, "lower" if lower else None)
    for access, attack in (record.audit.strongest if record.audit else {}).items():
        if attack is not None:
            words = f"Strongest attacker with {printable(access).replace('_', ' ')}: {printable(attack.attacker)}"
            results.append(harmful.result("accuracy", words, attack.accuracy, {"access": printable(access)}))
    return results


@dataclass
class _Task:
    side: str
    data: DataRecord | None

    def result(self, kind: str, name: str, value: float, arguments: dict[str, Any] | None = None) -> EvalResult:
        data = self.data
        title = printable(data.name) if data is not None else ""
        return EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            # The Hub groups results by type, configuration, split and revision: one data set may serve both tasks.
            dataset_type=slug(title),
            dataset_name=title or f"{self.side} images",
            dataset_config=self.side,
            dataset_split=printable(data.split) if data is not None and data.split else None,
            dataset_revision=printable(data.revision) if data is not None and data.revision else None,
            metric_type=kind,
            metric_name=name,
            metric_value=float(f"{value:.8g}"),
            metric_args=arguments,
        )


def _ratio_results(task: _Task, protocol: str, ratio: RatioRecord, harmful_bound: str | None) -> list[EvalResult]:
    arguments = _arguments(protocol, ratio.bound)
    words = f"log10 RIR, relative immunization ratio{_bound_words(ratio.bound)}"
    growth = f"log10 of (i), growth of harmful κ{_bound_words(harmful_bound)}"
    named = {
        "log10_rir": (words, ratio.log10_rir, arguments),
        "log10_harmful_ratio": (growth, ratio.log10_harmful_ratio, _arguments(protocol, harmful_bound)),
        "log10_benign_ratio": ("log10 of (ii), growth of benign κ", ratio.log10_benign_ratio, _arguments(protocol)),
    }
    results = []
    if ratio.log10_rir is not None and abs(ratio.log10_rir) < 300:
        words = f"RIR, relative immunization ratio{_bound_words(ratio.bound)}"
        results.append(task.result("rir", f"{words} ({protocol})", 10.0**ratio.log10_rir, arguments))
    return results + [
        task.result(kind, f"{name} ({protocol})", value, given)
        for kind, (name, value, given) in named.items()
        if value is not None
    ]


def _arguments(protocol: str, bound: str | None = None) -> dict[str, Any]:
    return {"protocol": protocol} | ({"bound": bound} if bound else {})


def _bound_words(bound: str | None) -> str:
    return {"lower": ", bound from below", "upper": ", bound from above"}.get(bound or "", "")


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
        data.license, data.license_name = licence_fields(licence)
    if record.base_model.on_hub and HUB_ID.fullmatch(record.base_model.name):
        data.base_model = record.base_model.name
    on_hub = [
        d.name for d in (record.benign, record.harmful) if d is not None and d.on_hub and HUB_ID.fullmatch(d.name)
    ]
    data.datasets = _union(data.datasets, [*on_hub, *(d for d in options.datasets if HUB_ID.fullmatch(d))]) or None
    others = [result for result in data.eval_results or [] if not _is_ours(result)]
    results = eval_results(record) + others
    data.model_name, data.eval_results = (name, results) if results else (None, None)
    return data


def licence_fields(licence: str) -> tuple[str, str | None]:
    """A licence as the Hub's metadata has it: an identifier, or "other" with a name.

    Example:
        >>> licence_fields("apache-2.0"), licence_fields("My Own: licence")
        (('apache-2.0', None), ('other', 'my-own-licence'))
    """
    return (licence, None) if _LICENSE.fullmatch(licence) else ("other", slug(licence))


def _is_ours(result: EvalResult) -> bool:
    return result.dataset_config in ("benign", "harmful") and (
        result.metric_type in _METRICS or str(result.metric_name).startswith("Benign ")
    )


def _union(first: Any, second: Sequence[str]) -> list[str]:
    given = [first] if isinstance(first, str) else list(first or [])
    return list(dict.fromkeys([*given, *second]))


def _body(record: ImmunizationRecord, options: CardOptions, title: str) -> str:
    source = files("hf_immunize.hub").joinpath("templates/card.md.jinja").read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(source)
    rows = record_rows(record)
    parts = [part for side in (record.benign_features, record.harmful_features) for part in (side.before, side.after)]
    return template.render(
        title=plain(title),
        processor=record.image_processor is not None,
        place=code_place(options.repo_id),
        form=options.form,
        summary=summary_sentence(*record_metrics(record), record.method.budget) if rows else _NOTHING_MEASURED,
        rows=[dict(zip(("name", "before", "after"), row, strict=True)) for row in rows],
        has_bounds=any("≥" in row[2] or "≤" in row[2] for row in rows),
        short=any(part is not None and part.num_samples < part.dim for part in parts),
        figures=[{"name": name, "words": _FIGURES.get(name, plain(name))} for name in record.figures],
        remarks=[plain(remark) for remark in record.remarks],
        not_stopped=not_stopped(record.audit, record.method.objective),
        attacks=attack_rows(record.audit),
        base_model=plain(record.base_model.name) + _at(record.base_model.revision),
        benign=_data_words(record.benign),
        harmful=_data_words(record.harmful),
        objective=plain(record.method.objective),
        trainable=plain(record.method.trainable),
        steps=record.method.steps,
        seed=record.method.seed,
        software=plain(", ".join(f"{k} {v}" for k, v in record.software.items())) or "not recorded",
    )


def _data_words(data: DataRecord | None) -> str:
    if data is None:
        return "none was given"
    words = plain(data.name) + _at(data.revision)
    if data.classes:
        words += f", classes {', '.join(plain(name) for name in data.classes)}"
    sizes = [f"{data.train_size} images to train on"] * (data.train_size is not None)
    split = f" ({plain(data.split)})" if data.split else ""
    sizes += [f"{data.size} to measure on{split}"] * (data.size is not None)
    return words + (f"; {', '.join(sizes)}" if sizes else "")


def _at(revision: str | None) -> str:
    return f", revision {plain(revision)}" if revision else ""


def _read_card(text: str) -> ModelCard:
    try:
        return ModelCard(text)
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        first = str(error).splitlines()
        raise CardError(
            f"Expected metadata in YAML between two lines '---' at the top of {CARD_NAME}, found: "
            f"{' '.join(first[:4])}. Repair it by hand, or remove the file to have it written anew."
        ) from error


def attachable_record(folder: str | os.PathLike[str]) -> ImmunizationRecord:
    """The record of a checkpoint to which the findings of an audit can be added.

    Args:
        folder: The checkpoint's folder.

    Returns:
        Its record.

    Raises:
        RecordError: If there is no record, or it is damaged.
        WeightsError: If the weights are not those of the record, so that an audit of them is none of what it names.
    """
    record = read_record(folder)
    changed = changed_weights(folder, record.weights)
    if changed:
        raise WeightsError(
            f"Expected the weights that {RECORD_NAME} names, found that {'; '.join(changed)}. An audit of other "
            "weights cannot be added to it: measure and save the model again."
        )
    return record


def attach_audit(folder: str | os.PathLike[str], found: Mapping[str, Any]) -> AuditRecord:
    """Write the findings of an audit into a checkpoint's record and its card, into both or neither.

    An earlier audit in the record is replaced; all else in it stays, as do the user's own sections of the card.

    Args:
        folder: The checkpoint's folder.
        found: Plain JSON of the form of `AuditRecord`.

    Returns:
        The findings as the record has them now.

    Raises:
        RecordError: If there is no record, or the findings have another form.
        WeightsError: If the weights are not those of the record.
        CardError: If the card that is there cannot be read; the record is then as it was.
    """
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
