"""The audit: every attacker of a preset on the immunized model, its reference and random copies, with the same draws.

`audit` is the whole of it: load, plan what the journal does not hold yet, extract and attack, report.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache, partial
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
import transformers
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from tqdm.auto import tqdm
from transformers import AutoImageProcessor

from hf_immunize.attacks.attacker import Found, Part, ProbeData, guarded
from hf_immunize.attacks.finetune import changed_parameters, take_statistics
from hf_immunize.attacks.presets import ATTACKERS, PRESET_VERSION, Preset
from hf_immunize.audit.journal import Journal, fingerprint, key_of
from hf_immunize.audit.names import SUBJECTS, clean, label, percent
from hf_immunize.audit.report import AuditReport
from hf_immunize.audit.result import AuditResult, FeatureSpectrum, Outcome, Utility
from hf_immunize.audit.settings import AuditSettings
from hf_immunize.audit.statistics import Key, attack_of, paired_utility, reached
from hf_immunize.audit.tasks import AttackedTask, Images, load_task, overlaps
from hf_immunize.data.columns import outputs_by_name
from hf_immunize.data.images import all_measured
from hf_immunize.data.sources import HeldOut
from hf_immunize.errors import ArgumentError, ImmunizationError, NonFiniteError, RankError
from hf_immunize.features.extract import (
    Extraction,
    Layer,
    choose_views,
    dual_coordinates,
    extract_views,
    find_layers,
    pass_size,
)
from hf_immunize.features.ranks import process_index
from hf_immunize.hub.collect import draw_like, refuse_training_images
from hf_immunize.hub.record import find_record
from hf_immunize.spectra.conditioning import Conditioning, feature_conditioning
from hf_immunize.spectra.ratio import relative_immunization_ratio
from hf_immunize.text import library_words
from hf_immunize.vision.head import find_head, half_tensors, to_full_precision
from hf_immunize.vision.loading import LOADING_ERRORS, can_copy, load_classifier, random_copy


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def audit(model: Any, **options: Any) -> AuditReport:
    """Attack an immunized model with everything there is, its reference with the same, and report.

    Args:
        model: The immunized image classifier, or its folder or name on the Hub.
        **options: The other fields of `AuditSettings`: ``harmful`` (required), ``benign``, ``reference``, ``preset``,
            ``attackers``, ….

    Returns:
        `AuditReport`.

    Raises:
        ArgumentError: An unknown preset or attacker, or a run directory of another audit.
        DataError: Data that cannot be used; the sentence says why and what to do.
        RecordError: A record that is damaged, so that training images cannot be told.
        TrainingImagesError: Test images on which the model was trained, by its record.
    """
    settings = AuditSettings(model, **options)
    chosen = settings.chosen()
    start = time.time()
    warnings: list[str] = []
    models, processor, names, tasks = _load(settings, warnings)
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    memory = settings.memory_limit or int(0.6 * psutil.virtual_memory().available / beside)
    memory = _load_images(tasks, processor, memory, settings.progress)
    warnings += overlaps(tasks)
    warnings += [f"{task.problem}; it was not attacked." for task in tasks if task.problem]
    hashes = {f"{t.name} {s}": [*i.hashes, i.labels.numpy().tobytes()] for t in tasks for s, i in _sides(t)}
    # Which attackers run decides no result, so that more can be added to a run.
    budgets = {"name": chosen.name, "probe": asdict(chosen.probe_budget), "tuning": asdict(chosen.tuning_budget)}
    mark = fingerprint(models, hashes, budgets | {"version": PRESET_VERSION})
    journal = Journal(settings.run_dir, mark, warnings)
    work = Work(chosen, models, tasks, processor, journal, settings.head_module, memory, warnings, settings.progress)
    work.run()
    total = sum(outcome.seconds for outcome in journal.outcomes.values())
    return AuditReport(
        AuditResult(
            model=names["immunized"],
            reference=names.get("reference"),
            preset=chosen.name,
            preset_version=PRESET_VERSION,
            budget=_budget(chosen, settings.max_images),
            tasks={task.name: task.describe() for task in tasks},
            outcomes=work.outcomes(),
            utility=work.metrics.utility(),
            spectra=work.metrics.spectra,
            rir=work.metrics.ratio(),
            warnings=warnings,
            machine=_machine(),
            # A resumed audit cost what its parts cost.
            seconds=max(time.time() - start, total),
        )
    )


audit.__signature__ = inspect.signature(AuditSettings).replace(return_annotation=AuditReport)  # type: ignore[attr-defined]


# Models, data and images


def _load(
    settings: AuditSettings, warnings: list[str]
) -> tuple[dict[str, PreTrainedModel], Any, dict[str, str], list[AttackedTask]]:
    """Models, image processor, names and tasks."""
    loaded = _load_models(settings)
    models = loaded[0]
    if "reference" in models:
        changed_parameters(models["immunized"], models["reference"])  # refuses another architecture
    record = find_record(settings.model, settings.revision)
    seed = HeldOut.seed if record is None else record.method.seed
    tasks = [
        load_task(
            name,
            getattr(settings, name),
            warnings,
            draw=draw_like(record, name, settings.test_fraction, settings.seed),
            image_column=settings.image_column,
            label_column=settings.label_column,
            max_images=settings.max_images,
            seed=seed if settings.seed is None else settings.seed,
            required=name != "benign",
        )
        for name in ("harmful", "unseen", "benign", "unrelated")
        if getattr(settings, name) is not None
    ]
    for task in tasks:
        measured = task.test.rows.subset(sorted({*task.test.indices, *task.utility.indices}))
        data, drawn = getattr(record, task.name, None), task.held_out
        refuse_training_images(data, measured, f"{task.name} test")
        if drawn is not None and not (data and all_measured(measured.hashes, data.sketch)):
            warnings.append(
                f"The {task.name} data have no validation or test split: {drawn.fraction:.0%} held out (seed "
                f"{drawn.seed}). If immunization saw these images, use the split that it held out."
            )
    return *loaded, tasks


def _load_models(settings: AuditSettings) -> tuple[dict[str, PreTrainedModel], Any, dict[str, str]]:
    models: dict[str, Any] = {}
    names: dict[str, str] = {}
    processor = settings.processing_class
    cards = torch.cuda.device_count()
    device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % cards}" if cards else "cpu"
    for subject, given in (("immunized", settings.model), ("reference", settings.reference)):
        if given is None:
            continue
        if subject == "reference" and given == settings.model and settings.revision == "main":
            models[subject], names[subject] = models["immunized"], names["immunized"]
            continue
        if not isinstance(given, (str, os.PathLike)):
            models[subject], names[subject] = given, type(given).__name__
            continue
        options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
        if subject == "immunized":
            options["revision"] = settings.revision
        try:
            loaded = load_classifier(given, **options)
            if processor is None:
                processor = AutoImageProcessor.from_pretrained(given, **options)
        except ImmunizationError:
            raise
        except LOADING_ERRORS as error:
            raise ArgumentError(
                f"Expected an image classifier with its processor as the {subject} model at {given}, found: "
                f"{library_words(error)}. Check the spelling, the connection and your rights."
            ) from error
        models[subject] = loaded.to(device)
        names[subject] = os.fspath(given)
    # The caller's own model stays as it is.
    wide = {name: to_full_precision(copy.deepcopy(one)) if half_tensors(one) else one for name, one in models.items()}
    return wide, processor, names


def _sides(task: AttackedTask) -> list[tuple[str, Images]]:
    return [("train", task.train), ("test", task.test), ("utility", task.utility)]


def _load_images(tasks: list[AttackedTask], processor: Any, memory: int, progress: bool) -> int:
    """Decode every image once; returns the memory that is left."""
    for task in tasks:
        for side, images in _sides(task):
            if not len(images):
                continue
            if side == "utility" and images.indices == task.test.indices:
                images.hashes, images._held = task.test.hashes, task.test._held
                continue
            # Half of what is left: features and attacks need room too.
            memory -= images.load(processor, memory // 2, progress)
    return memory


# The attacks

# Images that BatchNorm of random copies takes its statistics from.
_STATISTICS = 256
# Pixels of more squares than this a side are averaged over squares.
_PIXELS = 32


class Version(NamedTuple):
    """Weights under attack."""

    subject: str
    seed: int | None = None  # of random ones, which are attacked with it alone; others are with every seed

    @staticmethod
    def of(outcome: Outcome) -> Version:
        """The weights that an outcome is of."""
        return Version(outcome.subject, outcome.seed if outcome.subject == "random" else None)

    def seeds(self, count: int) -> Sequence[int]:
        """The seeds it is attacked with."""
        return range(count) if self.seed is None else (self.seed,)


class Group(NamedTuple):
    """Attacks that read the same images, in units of which one process runs all."""

    units: list[list[Outcome]]  # still to be found; the first of a unit chooses the settings of the others
    # Reads the images; what it gives attacks, with the settings chosen before.
    prepare: Callable[[], Callable[[Outcome, dict[str, Any] | None], Found]]
    measured: bool = False  # whether the metrics need what it reads


@dataclass
class Work:
    """One audit under way: what is attacked by what, as far as the journal does not hold it, and what was found."""

    preset: Preset
    models: dict[str, PreTrainedModel]
    tasks: list[AttackedTask]
    processor: Any
    journal: Journal
    head_module: str | None
    memory: int
    warnings: list[str]
    progress: bool
    order: list[str] = field(default_factory=list)  # keys of the outcomes
    planned: dict[str, Outcome] = field(default_factory=dict)
    told: set[Key] = field(default_factory=set)  # attacks of which the result was printed
    # What the reference makes of the harmful images, which whoever has the public weights makes too.
    public: ProbeData | None = None
    bar: Any = None

    def __post_init__(self) -> None:
        self.metrics = FeatureMetrics(self.warnings)
        self.able = [task for task in self.tasks if not task.problem]
        # The reference first: rank lost is rank lost against it. A model that is its own is attacked once.
        self.own = self.models.get("reference") is self.models["immunized"]
        self.versions = [Version(name) for name in ("reference", "immunized")[: 2 - self.own] if name in self.models]
        # Without a reference no head start is known.
        count = self.preset.random_copies if "reference" in self.models else 0
        self.random = [Version("random", seed) for seed in range(count)]
        self.unsound: set[Version] = set()
        self.measured: set[tuple[str, str]] = set()
        # One at a time: copies of large models are drawn again rather than held.
        self._copy = lru_cache(maxsize=1)(self._drawn)
        if self.random and not can_copy(self.models["reference"]):
            self.random = []
            self.warnings.append(
                f"{type(self.models['reference']).__name__} cannot be built from its config: no head start is known."
            )

    def run(self) -> None:
        """Run all attacks that are not in the journal; processes with one journal share them out."""
        first = self.tasks[0]
        groups = [self._probing(task, version) for task in self.tasks for version in self.versions]
        groups += [*(self._probing(first, version) for version in self.random), self._probing_pixels(first)]
        longest = [self._fine_tuning(task) for task in self.able]
        groups += [*longest, *([self._restoring(self.able[0])] if "reference" in self.models else [])]
        self.planned = {key_of(outcome): outcome for group in groups for unit in group.units for outcome in unit}
        for key, outcome in self.planned.items():
            if outcome.status == "skipped":  # by plan
                self.journal.outcomes.setdefault(key, outcome)
        # The first process reads features meanwhile, which it needs for the metrics.
        walk = groups if process_index() == 0 else [*longest, *(one for one in groups if one not in longest)]
        there = {"total": len(self.planned), "initial": len(self.planned.keys() & self.journal.outcomes.keys())}
        with underflow_to_zero(), tqdm(**there, disable=not self.progress, unit=" attacks") as self.bar:
            for group in walk:
                self._run(group)
            for group in walk:  # what others began is waited for, and run where they ended without an outcome
                self._run(group, wait=True)
        self.order = [key for key, one in self.planned.items() if Version.of(one) not in self.unsound]
        self.journal.close()

    def outcomes(self) -> list[Outcome]:
        """What was found, in the order of the plan."""
        found = [self.journal.outcomes[key] for key in self.order]
        same = [replace(one, subject="immunized") for one in found if one.subject == "reference"] if self.own else []
        return found + same

    # ---- what is ahead

    def model_of(self, version: Version) -> PreTrainedModel:
        """The model of these weights."""
        found: PreTrainedModel = self.models[version.subject] if version.seed is None else self._copy(version.seed)
        return found

    def probes_of(self, task: AttackedTask) -> tuple[str, ...]:
        """Attackers at the classifier's input."""
        if task.name in ("benign", "unrelated"):
            return tuple(name for name in self.preset.probes if name in self.preset.benign_attackers)
        return self.preset.probes

    def tuners_of(self, task: AttackedTask) -> tuple[str, ...]:
        """Attackers that fine-tune."""
        model = next(iter(self.models.values()))
        names = tuple(name for name in self.preset.fine_tuning if ATTACKERS[name].applies(model))
        return names if task.name == "harmful" else tuple(n for n in names if n in self.preset.benign_attackers)

    def probes_layers(self, task: AttackedTask) -> bool:
        """Whether earlier layers are to be probed."""
        return task.name == "harmful" and bool(self.preset.layer_probes or self.preset.flattened_probes)

    def views(self, task: AttackedTask, model: PreTrainedModel) -> tuple[list[tuple[Layer, str]], dict[str, str]]:
        """Earlier layers to probe, and those left out with a reason."""
        if not self.probes_layers(task):
            return [], {}
        example = next(iter(task.train.batches(self.processor, 1, progress=False)))
        layers = find_layers(model, example, self.preset.max_layers, self.head_module)
        rows, flat = len(task.train) + len(task.test), bool(self.preset.flattened_probes)
        views, left_out = choose_views(layers, rows, self.preset.layer_entries, self.memory, flat)
        return [one for one in views if one[1] == "flattened" or self.preset.layer_probes], left_out

    def _drawn(self, seed: int) -> Any:
        """A copy with random weights; without statistics of images BatchNorm would let nothing through."""
        model, images = random_copy(self.models["reference"], seed), self.tasks[0].train
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:_STATISTICS]
        take_statistics(model, images.pixels(self.processor, rows), seed)
        return model

    # ---- probes

    def _probing(self, task: AttackedTask, version: Version) -> Group:
        # Random copies have the reference's layers.
        model, subject = self.models.get(version.subject, self.models.get("reference")), version.subject
        assert model is not None
        views, left_out = self.views(task, model)
        if self.probes_layers(task) and not (views or left_out):
            sentence = f"{type(model).__name__} has no list of blocks: earlier layers were not probed."
            self.warnings += [] if sentence in self.warnings else [sentence]
        units: list[list[Outcome]] = []
        if not task.problem and len(task.test):
            units += self._at(f"input of {find_head(model, self.head_module)[0]}", task, version)
            for layer, view in views:
                label, seeds = layer.label(view), version.seeds(self.preset.layer_seeds)
                names = self.preset.flattened_probes if view == "flattened" else self.preset.layer_probes
                each = itertools.product(seeds, names)
                units.append([Outcome(n, "any_layer", subject, task.name, label, seed, "float64") for seed, n in each])
            row = "ridge", "any_layer", subject, task.name
            left = left_out.items() if version.seed is None else ()
            units += [[Outcome(*row, label, 0, "float64", "skipped", reason)] for label, reason in left]
        return Group(units, partial(self._read, task, version, views), measured=version.seed is None)

    def _at(self, place: str, task: AttackedTask, version: Version) -> list[list[Outcome]]:
        """Probes at one place, those of a seed together."""
        row = ("head_input", version.subject, task.name, place)
        seeds, names = version.seeds(self.preset.probe_seeds), self.probes_of(task)
        return [[Outcome(name, *row, seed, "float64") for name in names] for seed in seeds]

    def _extract(
        self, task: AttackedTask, version: Version, images: Images, views: Sequence[tuple[Layer, str]] = ()
    ) -> Extraction:
        model, description = self.model_of(version), f"{version.subject}: {task.name}"
        batches = images.batches(self.processor, pass_size(model), description, self.progress)
        return extract_views(model, batches, list(views), self.head_module)

    def _read(self, task: AttackedTask, version: Version, views: Sequence[tuple[Layer, str]] = ()) -> Any:
        """Read features; gives what probes them."""
        train = self._extract(task, version, task.train, views)
        test = self._extract(task, version, task.test, views) if len(task.test) else None
        if version.seed is None and (version.subject, task.name) not in self.measured:
            self._measure(task, version.subject, train, test)
        if task.problem or test is None:
            return None
        labels = task.train.labels, task.test.labels
        data = ProbeData(train.features, labels[0], test.features, labels[1], task.num_classes)
        if (version.subject, task.name) == ("reference", "harmful"):
            self.public = data
        held = {"head_input": data}

        def attack(outcome: Outcome, _: Any) -> Found:
            key = outcome.layer if outcome.access == "any_layer" else "head_input"
            if key not in held:
                data.forget()
                held.clear()  # before the next, which may be large
                held[key] = _dual_data(train.views.pop(key), test.views.pop(key), task)
            return self._probe(held[key], outcome)

        return attack

    def _measure(self, task: AttackedTask, subject: str, train: Extraction, test: Extraction | None) -> None:
        model = self.models[subject]
        self.measured.add((subject, task.name))
        subjects = (subject, "immunized")[: 1 + self.own]
        if task.name in ("harmful", "benign"):
            for one in subjects:
                self.metrics.note_features(one, task.name, train.features, next(model.parameters()).dtype)
        if task.name == "benign":
            # The released classifier is measured on classes too that no probe can learn.
            same = test is not None and task.utility.indices == task.test.indices
            own = test if same else self._extract(task, Version(subject), task.utility)
            assert own is not None
            for one in subjects:
                self.metrics.note_logits(model, one, task, own.logits)

    def _probing_pixels(self, task: AttackedTask) -> Group:
        """What probes read without any weights."""

        def prepare() -> Any:
            train, test = (_squares(one.batches(self.processor, progress=False)) for one in (task.train, task.test))
            data = _dual_data(train, test, task)
            return lambda outcome, _: self._probe(data, outcome)

        place = f"pixels, at most {_PIXELS} × {_PIXELS}"
        return Group([unit for version in self.random for unit in self._at(place, task, version)], prepare)

    def _probe(self, data: ProbeData, outcome: Outcome) -> Found:
        return ATTACKERS[outcome.attacker].run(data, self.preset.probe_budget, outcome.seed)

    # ---- fine-tuning and restoring

    def _fine_tuning(self, task: AttackedTask) -> Group:
        budget, seeds = self.preset.tuning_budget, self.preset.tuning_seeds
        # One attacker on all models before the next: what an interruption leaves can be compared.
        sides = [*([version] for version in self.versions), self.random if task.name == "harmful" else []]
        units = []
        for name, side in itertools.product(self.tuners_of(task), sides):
            rows = [(version.subject, task.name, ATTACKERS[name].where) for version in side]
            each = [(row, seed) for row, version in zip(rows, side, strict=True) for seed in version.seeds(seeds)]
            units.append([Outcome(name, "fine_tuning", *row, seed, "float32") for row, seed in each])

        def prepare() -> Any:
            pixels = self._pixels(task, budget.max_images, budget.max_test_images)

            def attack(outcome: Outcome, settings: dict[str, Any] | None) -> Found:
                if isinstance(pixels, str):
                    return Found(None, status="skipped", note=pixels)
                model, run = self.model_of(Version.of(outcome)), ATTACKERS[outcome.attacker].run
                return run(model, pixels, budget, outcome.seed, self.head_module, settings)

            return attack

        return Group(units, prepare)

    def _pixels(self, task: AttackedTask, most: int, most_test: int) -> Any:
        """Pixel values and labels to train and to test on, or a sentence why they cannot be held."""
        generator = torch.Generator().manual_seed(0)
        parts = []
        example = next(iter(task.train.batches(self.processor, 1, progress=False)))
        count = min(most, len(task.train)) + min(most_test, len(task.test))
        need = count * example.numel() * example.element_size()
        if need > self.memory:
            return (
                f"the images need {need / 2**30:.1f} GiB of memory, {self.memory / 2**30:.1f} GiB are there; use "
                "fewer images or a larger machine"
            )
        for images, limit in ((task.train, most), (task.test, most_test)):
            rows = torch.randperm(len(images), generator=generator)[:limit].sort().values
            parts.append((images.pixels(self.processor, rows), images.labels[rows]))
        return Part(*parts[0], *parts[1], task.num_classes)

    def _restoring(self, task: AttackedTask) -> Group:
        """The public weights put back; in the reference they are already, so that it is read as it is."""
        changed = changed_parameters(self.models["immunized"], self.models["reference"])
        row = (task.name, f"{len(changed)} tensors that immunization moved")
        known = ("done", "") if changed else ("skipped", "No tensor differs from the reference.")
        seeds = range(self.preset.layer_seeds)
        units = [
            [Outcome(name, "fine_tuning", version.subject, *row, seed, "float64", *known) for seed in seeds]
            for name, version in itertools.product(self.preset.restoring, self.versions)
        ]

        def prepare() -> Any:
            data = self.public
            assert data is not None  # the reference was read before
            return lambda outcome, _: self._probe(data, outcome)

        return Group(units, prepare)

    # ---- one unit after the other

    def _run(self, group: Group, wait: bool = False) -> None:
        prepared = cache(group.prepare)
        if group.measured and not wait:
            prepared()
        for unit in group.units:
            if self._ahead(unit):
                with self.journal.claimed(unit[0], wait) as claimed:
                    if claimed:
                        self._attack(unit, prepared)
            if self.progress:
                self._tell(unit)

    def _ahead(self, unit: list[Outcome]) -> list[Outcome]:
        """What is neither found nor of weights that are left out."""
        found = self.journal.outcomes
        return [one for one in unit if key_of(one) not in found and Version.of(one) not in self.unsound]

    def _attack(self, unit: list[Outcome], prepared: Callable[[], Any]) -> None:
        settings = None
        for outcome in unit:
            for one in self._ahead([outcome]):
                self.bar.set_description(f"{one.subject}: {one.attacker}, {one.task}, seed {one.seed}")
                try:
                    attack = partial(prepared(), one, settings)
                    begin = time.perf_counter()
                    found = vars(guarded(attack))
                    self.journal.add(replace(one, **found, seconds=time.perf_counter() - begin))
                except NonFiniteError as error:
                    if one.subject != "random":
                        raise
                    self.unsound.add(Version.of(one))
                    self.warnings.append(f"A copy with random weights was left out: {error}")
                self.bar.update()
            known = self.journal.outcomes.get(key_of(outcome))
            settings = settings or (known.settings if known else None) or None

    def _tell(self, unit: list[Outcome]) -> None:
        """Count what other processes found too, and print what an attack reaches once all its seeds are there."""
        known = self.journal.outcomes
        done = sum(key in known or Version.of(one) in self.unsound for key, one in self.planned.items())
        self.bar.update(done - self.bar.n)
        for attack in dict.fromkeys(map(attack_of, unit)):
            keys = [k for k, one in self.planned.items() if attack_of(one) == attack and one.subject != "random"]
            if attack in self.told or not known.keys() >= set(keys):
                continue
            self.told.add(attack)
            read: dict[str, list[float]] = {}
            for one in (known[key] for key in keys if known[key].status == "done"):
                read.setdefault(one.subject, []).append(reached(one))
            if read:
                attacker, access, task, layer = attack
                where = "" if access == "fine_tuning" else f" at {clean(layer)}"  # of the former the name says it
                words = ", ".join(f"{percent(fmean(found))} {SUBJECTS[subject]}" for subject, found in read.items())
                tqdm.write(f"{task} task, {label(attacker)}{where}: {words}", file=sys.stderr)


def _squares(batches: Iterable[Tensor]) -> Tensor:
    """Pixel values as rows, averaged over squares where they are more than `_PIXELS` a side."""

    def averaged(batch: Tensor) -> Tensor:
        height, width = batch.shape[2:]
        return adaptive_avg_pool2d(batch, (min(_PIXELS, height), min(_PIXELS, width))).flatten(1)

    return torch.cat([averaged(batch) for batch in batches])


def _dual_data(train: Tensor, test: Tensor, task: AttackedTask) -> ProbeData:
    train, test = dual_coordinates(train, test)
    return ProbeData(train, task.train.labels, test, task.test.labels, task.num_classes)


@contextmanager
def underflow_to_zero() -> Iterator[None]:
    """Probabilities that underflow make products many times slower and change no digit of a result."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


# What is measured in addition to the attacks


class FeatureMetrics:
    """Noted while features pass by; the reference has to come before the immunized model."""

    def __init__(self, warnings: list[str]) -> None:
        self.warnings = warnings
        self.spectra: list[FeatureSpectrum] = []
        self._conditioning: dict[tuple[str, str], Conditioning] = {}
        self._hits: dict[str, Tensor] = {}

    def note_features(self, subject: str, task: str, features: Tensor, produced_dtype: torch.dtype) -> None:
        """Measure the spectrum of the classifier's input, as a probe with an intercept sees it."""
        before = self._conditioning.get(("reference", task)) if subject == "immunized" else None
        try:
            found = feature_conditioning(features, reference=before, produced_dtype=produced_dtype, intercept=True)
        except RankError as error:
            self.warnings.append(f"κ of the {task} images through the {subject} model is undefined: {error}")
            return
        self._conditioning[subject, task] = found
        measured = found.num_samples, found.rank, found.log10_kappa, found.is_bound
        self.spectra.append(FeatureSpectrum(subject, task, *measured))

    def note_logits(self, model: PreTrainedModel, subject: str, task: AttackedTask, logits: Tensor) -> None:
        """Compare the released classifier's answers on benign test images with their labels."""
        self._hits[subject] = logits.argmax(dim=1) == _expected_outputs(model, task, self.warnings)

    def ratio(self) -> dict[str, Any]:
        """RIR of a probe with an intercept and its parts; empty without benign data or without a reference."""
        needed = [(subject, task) for subject in ("immunized", "reference") for task in ("harmful", "benign")]
        if not all(pair in self._conditioning for pair in needed):
            return {}
        h, b, h0, b0 = (self._conditioning[pair] for pair in needed)
        ratio = relative_immunization_ratio(
            harmful=h, harmful_reference=h0, benign=b, benign_reference=b0, protocol="intercept"
        )
        names = ("rir", "log10_rir", "harmful_ratio", "benign_ratio", "bound", "protocol")
        return {name: getattr(ratio, name) for name in names}

    def utility(self) -> Utility | None:
        """Benign accuracy of the classifiers, or None without benign data."""
        if "immunized" not in self._hits:
            return None
        return paired_utility(self._hits["immunized"], self._hits.get("reference"))


def _expected_outputs(model: PreTrainedModel, task: AttackedTask, warnings: list[str]) -> Tensor:
    """The output of the classifier that stands for each benign test image's label, by name where both have names."""
    names, labels = task.label_names, task.utility.labels
    outputs = outputs_by_name(names, model.config)
    if outputs is not None:
        return torch.tensor(outputs)[labels]
    sentence = "No benign class is named like one of the model's: label i is taken for output i."
    if names and sentence not in warnings:
        warnings.append(sentence)
    return labels


# What a report says of the run itself


def _budget(preset: Preset, max_images: int | None) -> dict[str, Any]:
    """Steps, samples and settings, as a report states them."""
    parts: dict[str, Any] = {"probe": preset.probe_budget, "fine_tuning": preset.tuning_budget}
    budget = {f"{part}_{name}": value for part, one in parts.items() for name, value in asdict(one).items()}
    budget |= vars(preset) | {"attackers": len(preset.attackers), "images_of_a_task": max_images}
    return {name: value for name, value in budget.items() if type(value) is int}


def _machine() -> dict[str, str]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
