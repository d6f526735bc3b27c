"""What was measured, tied to the weights it was measured on, until it is written beside them.

No figure is ever written beside other weights: after more steps there is no record until the next evaluation, and the
best checkpoint that is loaded at the end gets its own figures, not the last step's.
"""

from __future__ import annotations

import dataclasses
import math
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_immunize.errors import RecordError, WeightsError
from hf_immunize.features.measurement import Measurement
from hf_immunize.hub.collect import (
    describe_base_model,
    describe_dataset,
    describe_side,
    exact_ratio,
    software_versions,
)
from hf_immunize.hub.hashes import changed_weights, hash_weights
from hf_immunize.hub.parts import (
    AuditRecord,
    BaseModelRecord,
    BudgetRecord,
    DataRecord,
    MethodRecord,
    MetricRecord,
    RatioRecord,
)
from hf_immunize.hub.record import ImmunizationRecord, read_record, write_record
from hf_immunize.hub.validation import RECORD_NAME
from hf_immunize.text import printable
from hf_immunize.training.method import Method
from hf_immunize.vision.tensor_hash import tensors_hash


logger = logging.get_logger(__name__)
# Settings of the method that have fields of their own in the record.
_NAMED = ("objective", "benign_weight", "harmful_weight")


@dataclass(frozen=True)
class _Evaluated:
    weights: str
    step: int
    prefix: str
    metrics: dict[str, float]
    benign: tuple[Measurement, Measurement | None]
    harmful: tuple[Measurement | None, Measurement | None]
    budget: BudgetRecord | None


@dataclass
class Evidence:
    """What is known about a model in training, for its record.

    Attributes:
        base_model: What it started from, where the model's config does not say it.
        benign, harmful: Names, revisions and splits of the data, where the data sets do not say them; what is None is
            taken from the data sets.
        license: Licence of the weights.
        before: Metrics of the starting weights, where they were not evaluated by this Trainer.
        figures: Names of figures in the output folder.
        remarks: Plain sentences that the figures need to be understood.
    """

    base_model: BaseModelRecord | None = None
    benign: DataRecord | None = None
    harmful: DataRecord | None = None
    license: str | None = None
    before: dict[str, float | None] | None = None
    figures: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    _latest: _Evaluated | None = None
    _adopted: tuple[str, ImmunizationRecord] | None = None
    # Weights that were saved before they were evaluated: their fingerprint, their folder, the hashes of its files.
    _saved: tuple[str, str, dict[str, str]] | None = None
    _attached: tuple[str, RatioRecord | None, AuditRecord | None] | None = None
    # Size and checksum of the benign images that `before` is of.
    _before_of: tuple[int | None, float | None] = (None, None)
    # Fingerprint of weights to step and budget when they were first seen: some are gone back to.
    _seen: dict[str, tuple[int, BudgetRecord | None]] = field(default_factory=dict)

    def note(
        self,
        model: nn.Module,
        prefix: str,
        step: int,
        metrics: dict[str, float],
        benign: Measurement,
        harmful: Measurement | None,
        references: dict[str, Measurement],
        budget: BudgetRecord | None = None,
    ) -> None:
        """Keep what an evaluation of the constructor's data found.

        Args:
            model: The weights it was made of.
            prefix: Of its metrics; of several benign sets, the first one counts.
            step: Optimizer steps so far.
            metrics: With the prefix.
            benign: Features of the benign set.
            harmful: Of the harmful set.
            references: Features through the starting weights, by prefix and "harmful".
            budget: What became of the benign budget so far.
        """
        weights = weights_fingerprint(model)
        step, budget = self._seen.setdefault(weights, (step, budget))
        last = self._latest
        if last is not None and (last.weights, last.step) == (weights, step) and last.prefix != prefix:
            return
        if step == 0:
            self.know_before({name.replace(prefix, "eval", 1): value for name, value in metrics.items()}, benign)
        elif not self._is_of(benign):
            self.before = None
        sides = (benign, references.get(prefix)), (harmful, references.get("harmful"))
        self._latest = _Evaluated(weights, step, prefix, dict(metrics), *sides, budget)

    def know_before(self, metrics: dict[str, float], benign: Measurement) -> None:
        """Keep what the starting weights were found to do.

        Args:
            metrics: With the prefix "eval".
            benign: Features of the benign set through them.
        """
        self.before, self._before_of = dict(metrics), (benign.factor.num_samples, benign.checksum)

    @property
    def step(self) -> int | None:
        """The step of the weights that were evaluated last, which may be earlier ones gone back to."""
        return None if self._latest is None else self._latest.step

    @property
    def budget(self) -> BudgetRecord | None:
        """What had become of the benign budget at that step."""
        return None if self._latest is None else self._latest.budget

    def _is_of(self, benign: Measurement) -> bool:
        """Whether what was before is of these images, as far as that is known."""
        size, checksum = self._before_of
        return None in (size, checksum) or (
            size == benign.factor.num_samples and math.isclose(float(checksum or 0), benign.checksum, rel_tol=1e-6)
        )

    def attach(self, model: nn.Module, *, groups: RatioRecord | None = None, audit: AuditRecord | None = None) -> None:
        """Keep what was measured outside the Trainer, for these weights only.

        Args:
            model: The weights it was made of.
            groups: RIR over groups of images.
            audit: What an audit found.
        """
        self._attached = weights_fingerprint(model), groups, audit

    def adopt(self, model: nn.Module, folder: str | None) -> None:
        """Take over the record of a checkpoint whose weights were just loaded.

        Args:
            model: With those weights.
            folder: The checkpoint's folder.
        """
        if folder is None or not (Path(folder) / RECORD_NAME).is_file():
            return
        try:
            record = read_record(folder)
        except RecordError as error:
            logger.warning(f"Passing over the record in {folder}: {error}")
            return
        self._adopted = weights_fingerprint(model), record
        self._seen[self._adopted[0]] = record.method.steps, record.method.budget
        if self.before is None and record.metric is not None and record.metric.before is not None:
            self.before = {f"eval_{record.metric.name}": record.metric.before}
            if record.benign is not None:
                self._before_of = record.benign.size, record.benign.checksum

    def of(self, weights: str) -> _Evaluated | ImmunizationRecord | None:
        """What is known of these weights, by their fingerprint."""
        if self._latest is not None and self._latest.weights == weights:
            return self._latest
        return self._adopted[1] if self._adopted is not None and self._adopted[0] == weights else None


def weights_fingerprint(model: nn.Module) -> str:
    """A fingerprint of all weights and statistics, by their bytes.

    Args:
        model: The model.

    Returns:
        A hash; another one as soon as a bit of them has changed.
    """
    return tensors_hash((name, value) for name, value in model.state_dict().items() if isinstance(value, Tensor))


def make_record(trainer: Any) -> ImmunizationRecord | None:
    """The record of the Trainer's weights, without their hashes.

    Args:
        trainer: An `ImmunizationTrainer`.

    Returns:
        The record; None where these weights were not evaluated.
    """
    evidence: Evidence = trainer.evidence
    if evidence._latest is None and evidence._adopted is None:
        return None
    weights = weights_fingerprint(trainer.model)
    known = evidence.of(weights)
    if known is None:
        return None
    if isinstance(known, ImmunizationRecord):
        return _completed(dataclasses.replace(known), trainer, weights)
    record = bare_record(trainer, known.prefix, known.step)
    record.method.budget = known.budget
    record.metric = _metric(evidence.before or {}, known.metrics, known.prefix)
    if record.metric is not None:
        record.metric.precision = trainer.accelerator.mixed_precision
    record.benign_features, record.harmful_features = describe_side(*known.benign), describe_side(*known.harmful)
    for data, measurement in ((record.benign, known.benign[0]), (record.harmful, known.harmful[0])):
        if data is not None and measurement is not None:
            data.size, data.checksum = measurement.factor.num_samples, measurement.checksum
    exact = exact_ratio(record.benign_features, record.harmful_features)
    record.ratios = {} if exact is None else {"exact": exact}
    return _completed(record, trainer, weights)


def bare_record(trainer: Any, prefix: str = "eval", step: int | None = None) -> ImmunizationRecord:
    """What can be said of the Trainer's model without a measurement: method, base model and data.

    Args:
        trainer: An `ImmunizationTrainer`.
        prefix: Which of several benign sets is meant.
        step: Optimizer steps; by default those taken so far.

    Returns:
        A record without figures.
    """
    args, evidence = trainer.args, trainer.evidence
    settings = dataclasses.asdict(Method.of(args))
    train = trainer.train_dataset
    benign = trainer.eval_dataset
    if isinstance(benign, dict):
        benign = benign.get(prefix.removeprefix("eval_"), next(iter(benign.values()), None))
    config = trainer.model.config
    base = evidence.base_model or describe_base_model(config._name_or_path, getattr(config, "_commit_hash", None))
    return ImmunizationRecord(
        method=MethodRecord(
            objective=trainer.objective,
            trainable=printable(args.trainable),
            steps=trainer.state.global_step if step is None else step,
            seed=args.seed,
            benign_weight=settings["benign_weight"],
            harmful_weight=settings["harmful_weight"],
            freeze_batchnorm=args.freeze_batchnorm,
            settings={name: value for name, value in settings.items() if name not in _NAMED},
        ),
        base_model=dataclasses.replace(base),
        benign=_merged(evidence.benign, describe_dataset(benign, train=getattr(train, "benign", train))),
        harmful=_merged(
            evidence.harmful, describe_dataset(trainer._harmful_eval, train=getattr(train, "harmful", None))
        ),
        image_processor=None if trainer.processing_class is None else type(trainer.processing_class).__name__,
        software=software_versions(),
        license=evidence.license,
        figures=list(evidence.figures),
        remarks=[printable(remark) for remark in evidence.remarks],
    )


def save_record(trainer: Any, staging: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Write the record beside weights that were just written, with their hashes; or take an outdated one away.

    Args:
        trainer: An `ImmunizationTrainer`.
        staging: Where the weights lie now.
        target: Where they will lie; a record there that is not of these weights is removed.
    """
    evidence, record = trainer.evidence, make_record(trainer)
    evidence._saved = None
    if record is not None:
        record.weights = hash_weights(staging)
        write_record(staging, record)
        return
    # A checkpoint of a run in progress gets a record when it is written, or none.
    if not trainer._is_sharded and not Path(target).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        evidence._saved = weights_fingerprint(trainer.model), os.fspath(target), hash_weights(staging)
    if (Path(target) / RECORD_NAME).is_file():
        logger.warning(
            f"Removing {RECORD_NAME} from {target}: these weights were not evaluated, and its figures are of others."
        )
        (Path(target) / RECORD_NAME).unlink()


def record_saved(trainer: Any) -> None:
    """Write the record of weights that were saved first and evaluated now, if they still lie where they were saved.

    Args:
        trainer: An `ImmunizationTrainer`.
    """
    evidence: Evidence = trainer.evidence
    if evidence._saved is None:
        return
    fingerprint, folder, hashes = evidence._saved
    record = make_record(trainer)
    if record is None or weights_fingerprint(trainer.model) != fingerprint:
        return
    evidence._saved = None
    with suppress(OSError, WeightsError):  # the folder is gone, or was emptied
        if not changed_weights(folder, hashes):
            record.weights = hashes
            write_record(folder, record)


def _completed(record: ImmunizationRecord, trainer: Any, weights: str) -> ImmunizationRecord:
    """With what was given from outside for these very weights."""
    evidence: Evidence = trainer.evidence
    record.figures, record.remarks = list(evidence.figures), [printable(remark) for remark in evidence.remarks]
    record.license = evidence.license or record.license
    if evidence._attached is not None and evidence._attached[0] == weights:
        _, groups, audit = evidence._attached
        record.ratios = record.ratios | ({} if groups is None else {"groups": groups})
        record.audit = audit or record.audit
    return record


def _metric(before: dict[str, Any], after: dict[str, float], prefix: str) -> MetricRecord | None:
    for name in ("accuracy", "loss"):
        value, old = after.get(f"{prefix}_{name}"), before.get(f"eval_{name}")
        if value is not None and math.isfinite(value):
            known = old is not None and math.isfinite(old)
            return MetricRecord(name, float(value), None if old is None or not known else float(old))
    return None


def _merged(given: DataRecord | None, found: DataRecord | None) -> DataRecord | None:
    if given is None or found is None:
        return given if found is None else found
    named = {item.name: getattr(given, item.name) for item in dataclasses.fields(given)}
    kept = {name: value for name, value in named.items() if value is not None}
    return dataclasses.replace(found, **kept)
