"""What a Trainer publishes of its model: record, card, the push, and pushes during training."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from hf_immunize.data.views import Views
from hf_immunize.errors import ImmunizationError, RecordError, WeightsError
from hf_immunize.features.extract import Measurement
from hf_immunize.files import staged_directory, weights_fingerprint
from hf_immunize.hub.card import CardOptions, write_card
from hf_immunize.hub.collect import (
    dataset_name,
    describe_base_model,
    describe_dataset,
    describe_side,
    exact_ratio,
    innermost,
    intercept_ratio,
    software_versions,
)
from hf_immunize.hub.load import changed_weights, hash_weights, name_outcome
from hf_immunize.hub.push import PushResult, check_loads_back, files_to_push, push
from hf_immunize.hub.record import (
    RECORD_NAME,
    AuditRecord,
    BaseModelRecord,
    DataRecord,
    ImmunizationRecord,
    MethodRecord,
    MetricRecord,
    read_record,
    write_record,
)
from hf_immunize.text import printable, public_name
from hf_immunize.training.arguments import Method
from hf_immunize.vision.head import without_wrapper


logger = logging.get_logger(__name__)


# ---- what is known of the weights ----


@dataclass(frozen=True)
class _Evaluated:
    weights: str  # fingerprint
    step: int
    prefix: str
    metrics: dict[str, float]
    benign: tuple[Measurement, Measurement | None]
    harmful: tuple[Measurement | None, Measurement | None]


@dataclass
class Evidence:
    """What is known about a model in training, for its record."""

    # Where the model's config or the data sets do not say it.
    base_model: BaseModelRecord | None = None
    benign: DataRecord | None = None
    harmful: DataRecord | None = None
    license: str | None = None
    before: dict[str, float | None] | None = None  # metrics of the starting weights
    figures: list[str] = field(default_factory=list)  # names of files in the output folder
    remarks: list[str] = field(default_factory=list)
    _latest: _Evaluated | None = None
    # Fingerprints of weights, each with what is known of them.
    _adopted: tuple[str, ImmunizationRecord] | None = None
    _saved: tuple[str, str, dict[str, str]] | None = None  # before their evaluation: folder, hashes of its files
    _attached: tuple[str, AuditRecord] | None = None
    _seen: dict[str, int] = field(default_factory=dict)  # the step at first sight
    # Size and checksum of the benign images that `before` is of.
    _before_of: tuple[int | None, float | None] = (None, None)

    def note(
        self,
        model: nn.Module,
        prefix: str,
        step: int,
        metrics: dict[str, float],
        benign: Measurement,
        harmful: Measurement | None,
        references: dict[str, Measurement],
    ) -> None:
        """Keep what an evaluation of the constructor's data found; of several benign sets, the first one counts."""
        weights = weights_fingerprint(model)
        step = self._seen.setdefault(weights, step)
        last = self._latest
        if last is not None and (last.weights, last.step) == (weights, step) and last.prefix != prefix:
            return
        if step == 0:
            self.know_before({name.replace(prefix, "eval", 1): value for name, value in metrics.items()}, benign)
        elif not self._is_of(benign):
            self.before = None
        sides = (benign, references.get(prefix)), (harmful, references.get("harmful"))
        self._latest = _Evaluated(weights, step, prefix, dict(metrics), *sides)

    def know_before(self, metrics: dict[str, float], benign: Measurement) -> None:
        """Keep what the starting weights were found to do."""
        self.before, self._before_of = dict(metrics), (benign.factor.num_samples, benign.checksum)

    @property
    def step(self) -> int | None:
        """The step of the weights that were evaluated last, which may be earlier ones gone back to."""
        return self._latest.step if self._latest else None

    def _is_of(self, benign: Measurement) -> bool:
        """Whether what was before is of these images, as far as that is known."""
        size, checksum = self._before_of
        if size is None or checksum is None:
            return True
        return size == benign.factor.num_samples and math.isclose(checksum, benign.checksum, rel_tol=1e-6)

    def attach(self, model: nn.Module, audit: AuditRecord) -> None:
        """Keep what was measured outside the Trainer, of these weights alone."""
        self._attached = weights_fingerprint(model), audit

    def adopt(self, model: nn.Module, folder: str | None) -> None:
        """Take over the record of a checkpoint whose weights were just loaded."""
        if folder is None or not (Path(folder) / RECORD_NAME).is_file():
            return
        try:
            record = read_record(folder)
        except RecordError as error:
            logger.warning(f"Passing over the record in {folder}: {error}")
            return
        self._adopted = weights_fingerprint(model), record
        self._seen[self._adopted[0]] = record.method.steps
        if self.before is None and record.metric is not None and record.metric.before is not None:
            self.before = {f"eval_{record.metric.name}": record.metric.before}
            if record.benign is not None:
                self._before_of = record.benign.size, record.benign.checksum


# ---- the record ----


def make_record(trainer: Any) -> ImmunizationRecord | None:
    """The record of the Trainer's weights, without their hashes; None where these weights were not evaluated."""
    evidence: Evidence = trainer.evidence
    if evidence._latest is None and evidence._adopted is None:
        return None  # without hashing the weights
    weights = weights_fingerprint(trainer.model)
    known = evidence._latest
    if known is not None and known.weights == weights:
        record = bare_record(trainer, known.prefix, known.step)
        record.metric = _metric(
            evidence.before or {}, known.metrics, known.prefix, trainer.accelerator.mixed_precision
        )
        record.benign_features, record.harmful_features = describe_side(*known.benign), describe_side(*known.harmful)
        for data, (measurement, _) in ((record.benign, known.benign), (record.harmful, known.harmful)):
            if data is not None and measurement is not None:
                data.size, data.checksum = measurement.factor.num_samples, measurement.checksum
        exact = exact_ratio(record.benign_features, record.harmful_features)
        centred = intercept_ratio(known.benign, known.harmful)
        ratios = {"exact": exact, "intercept": centred}
        record.ratios = {protocol: ratio for protocol, ratio in ratios.items() if ratio is not None}
    elif evidence._adopted is not None and evidence._adopted[0] == weights:
        record = dataclasses.replace(evidence._adopted[1])
        record.figures, record.remarks = list(evidence.figures), _remarks(trainer)
        record.license = evidence.license or record.license
    else:
        return None
    if evidence._attached is not None and evidence._attached[0] == weights:
        record.audit = evidence._attached[1]
    return record


def bare_record(trainer: Any, prefix: str = "eval", step: int | None = None) -> ImmunizationRecord:
    """What can be said of the Trainer's model without a measurement: method, base model and data."""
    args, evidence, config = trainer.args, trainer.evidence, trainer.model.config
    settings = dataclasses.asdict(Method.of(args)) | {"choices": trainer.choices}
    del settings["objective"]  # the record has fields for this one and the two weights
    train, benign = trainer.train_dataset, trainer.eval_dataset
    if isinstance(benign, dict):
        benign = benign.get(prefix.removeprefix("eval_"), next(iter(benign.values()), None))
    found = describe_dataset(benign, train=getattr(train, "benign", train))
    found_harmful = describe_dataset(trainer._harmful_eval, train=getattr(train, "harmful", None))
    base = evidence.base_model or describe_base_model(config._name_or_path, getattr(config, "_commit_hash", None))
    return ImmunizationRecord(
        method=MethodRecord(
            objective=args.objective,
            trainable=printable(args.trainable),
            steps=trainer.state.global_step if step is None else step,
            seed=args.seed,
            benign_weight=settings.pop("benign_weight"),
            harmful_weight=settings.pop("harmful_weight"),
            freeze_batchnorm=args.freeze_batchnorm,
            distilled_on=_distilled_on(args.benign_loss, trainer.train_dataset),
            settings=settings,
        ),
        base_model=dataclasses.replace(base),
        benign=_merged(evidence.benign, found),
        harmful=_merged(evidence.harmful, found_harmful),
        image_processor=None if trainer.processing_class is None else type(trainer.processing_class).__name__,
        software=software_versions(),
        license=evidence.license,
        figures=list(evidence.figures),
        remarks=_remarks(trainer),
    )


def _remarks(trainer: Any) -> list[str]:
    """The user's, and what was seen before the first step."""
    return [printable(remark) for remark in (*trainer.evidence.remarks, trainer.warning) if remark]


def _distilled_on(benign_loss: str, train: Any) -> str | None:
    """The images on which a run stays near the starting model; None where it does so on none."""
    if benign_loss == "task" or train is None:
        return None
    others = getattr(train, "distillation", None)
    if others is None:
        return "the benign images"
    size = f"{len(others)} " if hasattr(others, "__len__") else ""
    if isinstance(innermost(others), Views):
        return f"the benign images and {size}views of them"
    return f"the benign images and {size or 'images '}of {dataset_name(others)}"


def save_record(trainer: Any, staging: Path, target: str) -> None:
    """Write the record next to weights that were just written, with their hashes; or remove an outdated one."""
    evidence, record = trainer.evidence, make_record(trainer)
    evidence._saved = None
    if record is not None:
        record.weights = hash_weights(staging)
        write_record(staging, record)
        return
    # A checkpoint of a run in progress gets a record when it is written, or none.
    if not Path(target).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        evidence._saved = weights_fingerprint(trainer.model), target, hash_weights(staging)
    if (Path(target) / RECORD_NAME).is_file():
        logger.warning(
            f"Removing {RECORD_NAME} from {target}: these weights were not evaluated, and its figures are of others."
        )
        (Path(target) / RECORD_NAME).unlink()


def record_saved(trainer: Any) -> None:
    """Write the record of weights that were saved first and evaluated now, if they still lie where they were saved."""
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


def _metric(before: dict[str, Any], after: dict[str, float], prefix: str, precision: str) -> MetricRecord | None:
    for name in ("accuracy", "loss"):
        value, old = after.get(f"{prefix}_{name}"), before.get(f"eval_{name}")
        if value is not None and math.isfinite(value):
            known = None if old is None or not math.isfinite(old) else float(old)
            metric, key = MetricRecord(name, float(value), known, precision=precision), f"{prefix}_{name}_change"
            if key in after:
                metric.change, metric.change_interval = after[key], [after[f"{key}_low"], after[f"{key}_high"]]
                metric.before = metric.after - metric.change if known is None else known
            return metric
    return None


def _merged(given: DataRecord | None, found: DataRecord | None) -> DataRecord | None:
    """What was found of a data set, save for what was given."""
    if given is None or found is None:
        return given or found
    named = {item.name: getattr(given, item.name) for item in dataclasses.fields(given)}
    return dataclasses.replace(found, **{name: value for name, value in named.items() if value is not None})


def _files_to_push(folder: str | os.PathLike[str]) -> list[str]:
    return files_to_push(folder, read_record(folder) if (Path(folder) / RECORD_NAME).is_file() else None)


# ---- the card and the push ----


def create_model_card(trainer: Any, *, finetuned_from: Any = None, dataset: Any = None, **given: Any) -> None:
    """Write the card into the output folder, from the record of the Trainer's weights; arguments as the Trainer's."""
    record = make_record(trainer) or bare_record(trainer)
    if finetuned_from:
        record.base_model = describe_base_model(finetuned_from)
    if dataset and record.benign is not None:
        record.benign.name = ", ".join(public_name(name) for name in _listed(dataset))
    tags, datasets = (_listed(given.pop(name, None)) for name in ("tags", "dataset_tags"))
    os.makedirs(trainer.args.output_dir, exist_ok=True)
    options = CardOptions(repo_id=trainer.hub_model_id, tags=tags, datasets=datasets, **given)
    write_card(trainer.args.output_dir, record, options)


def push_to_hub(
    trainer: Any, message: Any, blocking: bool, token: str | None, revision: str | None, private: Any, **card: Any
) -> PushResult | Future[PushResult] | None:
    """Save, write the card, and push what is allowed to leave; None on other processes than the first."""
    args = trainer.args
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    token = token if token is not None else args.hub_token
    if trainer.hub_model_id is None:
        trainer.init_hf_repo(token=token, private=private)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    card["tags"] = [*_listed(card.get("tags")), *_listed(getattr(trainer.model, "model_tags", None))]
    trainer.create_model_card(**card)
    trainer._finish_current_push()
    call = _push_call(trainer, message or "End of training", token, revision, private)
    return call() if blocking else HfApi().run_as_future(call)


def _push_call(trainer: Any, message: str, token: str | None, revision: str | None, private: bool | None) -> Any:
    args, code = trainer.args, type(without_wrapper(trainer.model)).__module__
    # Here, since a model that is loaded in the background would disturb the training.
    names, remote = _files_to_push(args.output_dir), code.startswith("transformers_modules")
    check_loads_back(args.output_dir, names, token, remote)
    return partial(
        push,
        args.output_dir,
        trainer.hub_model_id,
        as_saved=True,
        require_record=False,
        private=private if private is not None else args.hub_private_repo,
        revision=revision if revision is not None else args.hub_revision,
        token=token,
        commit_message=message,
    )


def _listed(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


# ---- pushes during training ----


def push_from_checkpoint(trainer: Any, checkpoint: str) -> None:
    """Push during training, in the background. What goes wrong is logged, and training goes on."""
    args = trainer.args
    if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    running = trainer.push_in_progress
    if not args.hub_always_push and running is not None and not running.is_done():
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    try:
        _copy_model(checkpoint, args.output_dir)
        trainer.create_model_card()
        message = f"Training in progress, step {trainer.state.global_step}"
        call = _push_call(trainer, message, args.hub_token, args.hub_revision, None)
    except (ImmunizationError, OSError) as error:
        logger.warning(f"The checkpoint {checkpoint} is saved, but was not pushed: {error}")
        return
    job = HfApi().run_as_future(call)
    job.add_done_callback(partial(_report, checkpoint))
    if running is None or running.is_done():
        trainer.push_in_progress = PushInProgress([job])
    else:
        running.jobs.append(job)


def _copy_model(checkpoint: str, output_dir: str) -> None:
    source, target = Path(checkpoint), Path(output_dir)
    names = _files_to_push(source)
    with staged_directory(target) as staging:
        for name in names:
            shutil.copyfile(source / name, staging / name)
    stale = {RECORD_NAME, "model.safetensors.index.json", *(file.name for file in target.glob("model*.safetensors"))}
    for name in stale - set(names):
        (target / name).unlink(missing_ok=True)


def _report(checkpoint: str, job: Future[Any]) -> None:
    error = None if job.cancelled() else job.exception()
    if error is not None:
        named = error if isinstance(error, ImmunizationError) else name_outcome(error, "push") or error
        logger.warning(f"The checkpoint {Path(checkpoint).name} is saved, but was not pushed: {named}")
