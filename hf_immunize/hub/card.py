"""The model card of an immunized checkpoint, from its record alone."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined
from transformers.utils import logging

from hf_immunize.errors import CardError
from hf_immunize.files import write_whole
from hf_immunize.hub.collect import HUB_ID
from hf_immunize.hub.outgoing import refuse_links
from hf_immunize.hub.parts import DataRecord, RatioRecord
from hf_immunize.hub.record import ImmunizationRecord
from hf_immunize.hub.rows import attack_rows, not_stopped, record_metrics, record_rows, summary_sentence
from hf_immunize.hub.text import code_place, plain, slug
from hf_immunize.text import printable
from hf_immunize.vision.loading import checkpoint_form


logger = logging.get_logger(__name__)
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
