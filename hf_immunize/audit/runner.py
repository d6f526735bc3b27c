"""The audit: every attacker of a preset on the immunized model and on its reference, with the same draws."""

from __future__ import annotations

import copy
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
import torch
import transformers
from transformers import AutoImageProcessor
from transformers.utils import logging

from hf_immunize.attacks.presets import PRESET_VERSION, Preset
from hf_immunize.attacks.restore import moved_parameters
from hf_immunize.audit.asked import check_asked
from hf_immunize.audit.feature_store import FeatureStore
from hf_immunize.audit.journal import Journal, fingerprint
from hf_immunize.audit.outcomes import AuditData
from hf_immunize.audit.passes import Pass, StoredPasses, make_folder
from hf_immunize.audit.plan import Plan
from hf_immunize.audit.report import AuditReport
from hf_immunize.audit.task_images import Images
from hf_immunize.audit.tasks import AttackedTask, load_task, overlaps
from hf_immunize.audit.work import Work, underflow_to_zero
from hf_immunize.data.splits import HeldOut
from hf_immunize.errors import ArgumentError, RecordError, WeightsError
from hf_immunize.features.processes import ALONE, Processes
from hf_immunize.hub.collect import draw_like, refuse_training_images
from hf_immunize.hub.record import ImmunizationRecord, find_record
from hf_immunize.text import library_words
from hf_immunize.vision.loading import load_classifier
from hf_immunize.vision.precision import half_tensors, to_full_precision


if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.get_logger(__name__)


def audit(
    model: Any,
    *,
    harmful: Any,
    benign: Any = None,
    reference: Any = None,
    attackers: Sequence[str] | None = None,
    preset: str | Preset = "standard",
    unseen: Any = None,
    unrelated: Any = None,
    processing_class: Any = None,
    run_dir: str | os.PathLike[str] | None = None,
    head_module: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    test_fraction: float | None = None,
    max_images: int | None = None,
    seed: int | None = None,
    accuracies: Sequence[float] = (),
    memory_limit: int | None = None,
    keep_features: int = 2 * 2**30,
    progress: bool = True,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> AuditReport:
    """Attack an immunized model with everything there is, its reference with the same, and report.

    Args:
        model: The immunized image classifier, or its folder or name on the Hub.
        harmful: Labelled images of the harmful task: a folder, a parquet file, a name on the Hub, a
            ``datasets.Dataset``, a ``DatasetDict``, or a pair (train, test) of such.
        benign: The benign task, in the same forms, for utility and for benign learning speed.
        reference: The model before immunization; without it nothing can be said about what immunization changed.
        attackers: Names of attackers, to run some only; by default those of the preset.
        preset: "quick", "standard" or "full".
        unseen: Harmful images of classes that immunization did not see.
        unrelated: A third task, which immunization should leave alone.
        processing_class: Image processor, where the model is not given by its name and the data hold images.
        run_dir: Where finished attacks and features are kept; the same call resumes an interrupted audit there.
        head_module: The classifier's name, where it cannot be found without help.
        image_column: Of all data sets, where it cannot be found.
        label_column: The same.
        test_fraction: Held out where data have no validation or test split; by default what training held out, by the
            model's record, else 0.3.
        max_images: At most so many training and test images of each task.
        seed: Seed of splits of data, by default that of the model's record, else 42; the attackers' are 0, 1, ….
        accuracies: To which steps are counted on both models, between 0 and 1, beside shares of what the reference
            gives.
        memory_limit: Bytes of memory to use; by default 60 % of what is free.
        keep_features: Bytes of features to keep in ``run_dir`` for resuming, small ones first; 0 keeps none.
        progress: Whether to show progress bars.
        revision: Branch, tag or commit of the model on the Hub.
        trust_remote_code: Run code that comes with a model.

    Returns:
        `AuditReport`.

    Raises:
        ArgumentError: An unknown preset or attacker, or a run directory of another audit.
        DataError: Data that cannot be used; the sentence says why and what to do.
        TrainingImagesError: Test images on which the model was trained, by its record.
    """
    report = _audit(
        ALONE,
        model,
        harmful=harmful,
        benign=benign,
        reference=reference,
        attackers=attackers,
        preset=preset,
        unseen=unseen,
        unrelated=unrelated,
        processing_class=processing_class,
        run_dir=run_dir,
        head_module=head_module,
        image_column=image_column,
        label_column=label_column,
        test_fraction=test_fraction,
        max_images=max_images,
        seed=seed,
        accuracies=accuracies,
        memory_limit=memory_limit,
        keep_features=keep_features,
        progress=progress,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    assert report is not None  # the one process is the first
    return report


def audit_over_processes(processes: Processes, model: Any, **options: Any) -> AuditReport | None:
    """As `audit`, with images run through models by several processes, each its share.

    To be called on all of them, with the same arguments. Attacks run on the first process alone, which may take hours:
    the others are done when the features are. The report does not depend on the number of processes.

    Args:
        processes: Those that torchrun or ``accelerate launch`` started, as `launched` finds them.
        model: As in `audit`.
        **options: As in `audit`.

    Returns:
        The report on the first process, None on the others.

    Raises:
        ProcessError: If another process failed.
        ArgumentError, DataError: See `audit`.
    """
    options = (audit.__kwdefaults__ or {}) | options
    folder = options["run_dir"] or tempfile.gettempdir()
    if not processes.share_folder(folder):
        first = processes.first
        processes.leave()
        if not first:
            return None
        logger.warning(f"The processes share no folder {folder}, so the first one extracts all features by itself.")
        return _audit(ALONE, model, **options)
    return _audit(processes, model, **options)


def _audit(
    processes: Processes,
    model: Any,
    *,
    harmful: Any,
    benign: Any,
    reference: Any,
    attackers: Sequence[str] | None,
    preset: str | Preset,
    unseen: Any,
    unrelated: Any,
    processing_class: Any,
    run_dir: str | os.PathLike[str] | None,
    head_module: str | None,
    image_column: str | None,
    label_column: str | None,
    test_fraction: float | None,
    max_images: int | None,
    seed: int | None,
    accuracies: Sequence[float],
    memory_limit: int | None,
    keep_features: int,
    progress: bool,
    revision: str,
    trust_remote_code: bool,
) -> AuditReport | None:
    asked = {name: value for name, value in locals().items() if name not in ("processes", "model")}
    chosen = check_asked(model, asked)
    start = time.time()
    warnings: list[str] = []
    progress = progress and processes.first

    def load() -> tuple[dict[str, PreTrainedModel], Any, dict[str, str], list[AttackedTask]]:
        loaded = _load_models(model, reference, processing_class, revision, trust_remote_code, processes.device)
        models = loaded[0]
        if "reference" not in models:
            warnings.append(
                "No reference was given: accuracies are absolute, and what immunization changed cannot be told. Give "
                "the model before immunization."
            )
        else:
            moved_parameters(models["immunized"], models["reference"])  # refuses another architecture
        if chosen.random:
            models["random"] = _random_like(models["immunized"])
        record = _record_of(model, revision, warnings)
        drawn = HeldOut.seed if record is None else record.method.seed
        sources = {"harmful": harmful, "unseen": unseen, "benign": benign, "unrelated": unrelated}
        tasks = [
            load_task(
                name,
                source,
                warnings,
                draw=draw_like(record, name, test_fraction, seed),
                image_column=image_column,
                label_column=label_column,
                max_images=max_images,
                seed=drawn if seed is None else seed,
                required=name != "benign",
            )
            for name, source in sources.items()
            if source is not None
        ]
        for task in tasks:
            measured = task.test.rows.subset(sorted({*task.test.indices, *task.utility.indices}))
            refuse_training_images(getattr(record, task.name, None), measured, f"{task.name} test")
        return *loaded, tasks

    models, processor, names, tasks = processes.everywhere(load)
    memory = memory_limit or int(0.6 * psutil.virtual_memory().available)
    memory = _load_images(tasks, processor, memory, progress, processes)
    warnings += overlaps(tasks)
    warnings += [f"{task.problem}; it was not attacked." for task in tasks if task.problem]
    hashes = {f"{t.name} {s}": [*i.hashes, i.labels.numpy().tobytes()] for t in tasks for s, i in _sides(t)}
    mark = fingerprint(models, hashes, {"preset": _without_choice(chosen), "version": PRESET_VERSION})
    journal = processes.everywhere(lambda: Journal(run_dir if processes.first else None, mark, warnings))
    folder = None if run_dir is None or not processes.first else os.path.join(run_dir, "features")
    kept = FeatureStore(folder, keep_features, warnings)
    plan = Plan(chosen, models, tasks, processor, journal, head_module, memory)
    work = Work(plan, warnings, progress, kept)
    with ExitStack() as stack:
        if processes.count > 1:
            work.stored = stack.enter_context(_extracted_by_all(work, processes, run_dir))
            # The others are done, and nobody waits in a collective for the attacks.
            processes.leave()
            if not processes.first:
                return None
        standing = work.run()
    total = sum(outcome.seconds for outcome in journal.outcomes.values())
    return AuditReport(
        AuditData(
            model=names["immunized"],
            reference=names.get("reference"),
            preset=chosen.name,
            preset_version=PRESET_VERSION,
            budget=_budget(chosen, max_images),
            tasks={task.name: task.describe() for task in tasks},
            outcomes=[journal.outcomes[key] for key in work.order],
            utility=standing.utility(),
            spectra=standing.spectra(),
            rir=standing.ratio(),
            warnings=warnings,
            machine=_machine() | {"features kept": f"{kept.size / 2**20:,.1f} MiB"},
            # A resumed audit cost what its parts cost.
            seconds=max(time.time() - start, total),
            accuracies=list(accuracies),
        )
    )


@contextmanager
def _extracted_by_all(work: Work, processes: Processes, run_dir: Any) -> Iterator[StoredPasses]:
    """What the attacks will need of the models, each process's share on disk; removed in the end."""
    # The first one alone knows what the journal holds already.
    passes, folder = processes.from_first(lambda: (work.ahead(), make_folder(run_dir)))
    stored = StoredPasses(folder, passes)
    try:
        for one in passes:
            processes.together(partial(_extract_own, stored, one, work, processes.index))
        yield stored
    finally:
        if processes.first:
            shutil.rmtree(folder, ignore_errors=True)


def _extract_own(stored: StoredPasses, wanted: Pass, work: Work, process: int) -> None:
    with underflow_to_zero():  # as in `Work.run`
        extraction = work.compute(wanted)
    stored.write(wanted, extraction, process)


def _load_models(
    model: Any, reference: Any, processor: Any, revision: str, trust_remote_code: bool, device: torch.device
) -> tuple[dict[str, PreTrainedModel], Any, dict[str, str]]:
    models, names = {}, {}
    for subject, given in (("immunized", model), ("reference", reference)):
        if given is None:
            continue
        if not isinstance(given, (str, os.PathLike)):
            models[subject], names[subject] = given, type(given).__name__
            continue
        options = {"trust_remote_code": trust_remote_code}
        if subject == "immunized":
            options["revision"] = revision  # type: ignore[assignment]
        try:
            loaded = load_classifier(given, **options)
            if processor is None:
                processor = AutoImageProcessor.from_pretrained(given, **options)
        except WeightsError:
            raise
        except (OSError, ValueError) as error:
            raise ArgumentError(
                f"Expected an image classifier with its processor as the {subject} model at {given}, found: "
                f"{library_words(error)}. Check the spelling, the connection and your rights."
            ) from error
        models[subject] = loaded.to(device)
        path = os.fspath(given)
        names[subject] = os.path.basename(os.path.abspath(path)) if os.path.exists(path) else path
    # The caller's own model stays as it is.
    wide = {name: to_full_precision(copy.deepcopy(one)) if half_tensors(one) else one for name, one in models.items()}
    return wide, processor, names


def _record_of(model: Any, revision: str, warnings: list[str]) -> ImmunizationRecord | None:
    try:
        return find_record(model, revision)
    except RecordError as error:
        warnings.append(f"{error} Whether the test images are training images cannot be told.")
        return None


def _random_like(model: PreTrainedModel) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(model)(copy.deepcopy(model.config)).to(model.device)


def _sides(task: AttackedTask) -> list[tuple[str, Images]]:
    return [("train", task.train), ("test", task.test), ("utility", task.utility)]


def _load_images(tasks: list[AttackedTask], processor: Any, memory: int, progress: bool, processes: Processes) -> int:
    """Decode every image once, each process its share; returns the memory that would be left if one held them all."""
    for task in tasks:
        for side, images in _sides(task):
            if not len(images):
                continue
            if side == "utility" and images.indices == task.test.indices:
                images.hashes, images.own, images._held = task.test.hashes, task.test.own, task.test._held
                continue
            # Half of what is left: features and attacks need room too.
            memory -= images.load(processor, memory // 2, progress, processes)
    return memory


def _without_choice(preset: Preset) -> dict[str, Any]:
    """What decides an attack's result: which attackers run does not, so that more can be added to a run."""
    described = preset.describe()
    return {name: described[name] for name in ("name", "probe_budget", "tuning_budget")}


def _budget(preset: Preset, max_images: int | None) -> dict[str, Any]:
    """Steps, samples, seconds and settings, as a report states them."""
    probes, tuning = preset.probe_budget, preset.tuning_budget
    attackers = {*preset.probes, *preset.layer_probes, *preset.flattened_probes, *preset.fine_tuning}
    limited = {
        "seconds_of_an_attack_that_trains": probes.seconds if probes.seconds is not None else tuning.seconds,
        "images_of_a_task": max_images,
    }
    return {
        "attackers": len(attackers | set(preset.restoring)),
        "probe_steps": preset.probe_budget.steps,
        "descent_steps": preset.probe_budget.descent_steps,
        "solver_iterations": preset.probe_budget.iterations,
        "fine_tuning_steps": preset.tuning_budget.steps,
        "fine_tuning_trial_steps": preset.tuning_budget.trial_steps,
        "fine_tuning_images": preset.tuning_budget.max_images,
        "fine_tuning_test_images": preset.tuning_budget.max_test_images,
        "fine_tuning_settings": sum(map(len, (tuning.optimizers or {}).values())),
        "mini_batch_rates": len(probes.rates),
        "layers": preset.max_layers,
        "values_of_a_flattened_layer": preset.layer_entries,
        "probe_seeds": preset.probe_seeds,
        "layer_seeds": preset.layer_seeds,
        "fine_tuning_seeds": preset.tuning_seeds,
        **{name: value for name, value in limited.items() if value is not None},
    }


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
