"""The audit: every attacker of a preset on the immunized model and on its reference, with the same draws."""

from __future__ import annotations

import copy
import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import psutil
import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_immunize.attacks.finetune import fine_tune
from hf_immunize.attacks.journal import Journal, fingerprint, key_of
from hf_immunize.attacks.layers import Extraction, choose_views, dual_coordinates, extract_views, find_layers, run
from hf_immunize.attacks.measures import paired_utility
from hf_immunize.attacks.outcomes import AuditData, Outcome, Spectrum, Utility
from hf_immunize.attacks.presets import PRESET_VERSION, Preset, find_preset
from hf_immunize.attacks.probe_data import Finding, ProbeData
from hf_immunize.attacks.report import AuditReport
from hf_immunize.attacks.restore import SHARES, interpolate, moved_parameters
from hf_immunize.attacks.suite import PROBES
from hf_immunize.attacks.tasks import AttackedTask, Images, load_task, overlaps
from hf_immunize.errors import ArgumentError
from hf_immunize.spectra.conditioning import Conditioning, feature_conditioning, singular_values
from hf_immunize.spectra.ratio import relative_immunization_ratio
from hf_immunize.vision.features import find_head


if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    test_fraction: float = 0.3,
    max_images: int | None = None,
    seed: int = 42,
    memory_limit: int | None = None,
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
        run_dir: Where finished attacks are kept; the same call resumes an interrupted audit there.
        head_module: The classifier's name, where it cannot be found without help.
        image_column, label_column: Of all data sets, where they cannot be found.
        test_fraction: Held out where data have no test split.
        max_images: At most so many training and test images of each task.
        seed: Seed of splits of data; the attackers' seeds are 0, 1, ….
        memory_limit: Bytes of memory to use; by default 60 % of what is free.
        progress: Whether to show progress bars.
        revision: Branch, tag or commit of the model on the Hub.
        trust_remote_code: Run code that comes with a model.

    Returns:
        `AuditReport`.

    Raises:
        ArgumentError: An unknown preset or attacker, or a run directory of another audit.
        DataError: Data that cannot be used; the sentence says why and what to do.
    """
    start = time.time()
    chosen = preset if isinstance(preset, Preset) else find_preset(preset)
    chosen = chosen if attackers is None else chosen.only(list(attackers))
    warnings: list[str] = []
    models, processor, names = _load_models(model, reference, processing_class, revision, trust_remote_code)
    if "reference" not in models:
        warnings.append(
            "No reference was given: accuracies are absolute, and what immunization changed cannot be told. Give the "
            "model before immunization."
        )
    else:
        moved_parameters(models["immunized"], models["reference"])  # refuses another architecture
    if chosen.random:
        models["random"] = _random_like(models["immunized"])
    sources = {"harmful": harmful, "unseen": unseen, "benign": benign, "unrelated": unrelated}
    tasks = [
        load_task(
            name,
            source,
            warnings,
            test_fraction=test_fraction,
            image_column=image_column,
            label_column=label_column,
            max_images=max_images,
            seed=seed,
            required=name != "benign",
        )
        for name, source in sources.items()
        if source is not None
    ]
    memory = memory_limit or int(0.6 * psutil.virtual_memory().available)
    memory = _load_images(tasks, processor, memory, progress)
    warnings += overlaps(tasks)
    warnings += [f"{task.problem}; it was not attacked." for task in tasks if task.problem]
    hashes = {f"{t.name} {s}": [*i.hashes, i.labels.numpy().tobytes()] for t in tasks for s, i in _sides(t)}
    mark = fingerprint(models, hashes, {"preset": _without_choice(chosen), "version": PRESET_VERSION})
    journal = Journal(run_dir, mark, warnings)
    work = _Work(chosen, models, tasks, processor, journal, warnings, head_module, memory, progress)
    spectra, rir, utility = work.run()
    total = sum(outcome.seconds for outcome in journal.outcomes.values())
    return AuditReport(
        AuditData(
            model=names["immunized"],
            reference=names.get("reference"),
            preset=chosen.name,
            preset_version=PRESET_VERSION,
            budget=_budget(chosen),
            tasks={task.name: task.describe() for task in tasks},
            outcomes=[journal.outcomes[key] for key in work.order],
            utility=utility,
            spectra=spectra,
            rir=rir,
            warnings=warnings,
            machine=_machine(),
            # A resumed audit cost what its parts cost.
            seconds=max(time.time() - start, total),
        )
    )


class _Work:
    """One audit under way."""

    def __init__(
        self,
        preset: Preset,
        models: dict[str, PreTrainedModel],
        tasks: list[AttackedTask],
        processor: Any,
        journal: Journal,
        warnings: list[str],
        head_module: str | None,
        memory: int,
        progress: bool,
    ) -> None:
        self.preset, self.models, self.tasks, self.processor = preset, models, tasks, processor
        self.journal, self.warnings, self.head_module = journal, warnings, head_module
        self.memory, self.progress = memory, progress
        self.order: list[str] = []
        # κ of the classifier's input on training images, by (subject, task).
        self.conditioning: dict[tuple[str, str], Conditioning] = {}
        self.sigma: dict[tuple[str, str], list[float]] = {}
        self.hits: dict[str, Tensor] = {}
        self.head_data: dict[tuple[str, str], ProbeData] = {}
        self.bar: Any = None
        # The reference first: rank lost is rank lost against it.
        self.subjects = [name for name in ("reference", "immunized", "random") if name in models]

    def run(self) -> tuple[list[Spectrum], dict[str, Any], Utility | None]:
        """All attacks, then the spectra, RIR and utility."""
        able = [task for task in self.tasks if not task.problem]
        self.bar = tqdm(
            total=self._expected(able),
            disable=not self.progress,
            desc="audit",
            bar_format="{desc:<44.44} {percentage:3.0f}%|{bar}| {elapsed} so far, about {remaining} to go",
        )
        try:
            for task in self.tasks:
                for subject in self.subjects:
                    self._probe(task, subject)
            for task in able:
                for subject in self.subjects:
                    self._fine_tune(task, subject)
            if "reference" in self.models:
                self._restore(able[0])
        finally:
            self.bar.close()
        return self._spectra(), self._ratio(), self._utility()

    # ---- what is planned

    def _probes_of(self, task: AttackedTask) -> tuple[str, ...]:
        if task.name in ("benign", "unrelated"):
            return tuple(name for name in self.preset.probes if name in self.preset.benign_attackers)
        return self.preset.probes

    def _tuners_of(self, task: AttackedTask) -> tuple[str, ...]:
        if task.name == "harmful":
            return self.preset.fine_tuning
        return tuple(name for name in self.preset.fine_tuning if name in self.preset.benign_attackers)

    def _precisions(self, task: AttackedTask) -> list[torch.dtype]:
        both = self.preset.both_precisions and task.name == "harmful"
        return [torch.float64, torch.float32] if both else [torch.float64]

    def _expected(self, tasks: list[AttackedTask]) -> float:
        """Work ahead, in attacks at the classifier's input; the others are weighed by what they tend to cost."""
        total = 0.0
        for task in tasks:
            each = len(self._probes_of(task)) * self.preset.probe_seeds * len(self._precisions(task))
            each += _TUNING_WEIGHT * len(self._tuners_of(task)) * self.preset.tuning_seeds
            total += each * len(self.subjects)
        return total

    # ---- probes

    def _probe(self, task: AttackedTask, subject: str) -> None:
        model = self.models[subject]
        views, left_out = [], {}
        if task.name == "harmful" and (self.preset.layer_probes or self.preset.flattened_probes):
            example = next(iter(task.train.batches(self.processor, 1, progress=False)))
            layers = find_layers(model, example, self.preset.max_layers, self.head_module)
            if not layers:
                self._warn(f"{type(model).__name__} has no list of blocks: earlier layers were not probed.")
            rows, flat = len(task.train) + len(task.test), bool(self.preset.flattened_probes)
            views, left_out = choose_views(layers, rows, self.preset.layer_entries, self.memory, flat)
        train, test = (
            extract_views(
                model,
                images.batches(self.processor, description=f"{subject}: {task.name}", progress=self.progress),
                views,
                self.head_module,
            )
            if len(images)
            else None
            for images in (task.train, task.test)
        )
        assert train is not None
        self._note_spectrum(task, subject, train.features)
        if task.name == "benign":
            self.hits[subject] = self._hits(task, subject, train, test)
        if task.problem or test is None:
            return
        data = ProbeData(train.features, task.train.labels, test.features, task.test.labels, task.num_classes)
        if task.name == "harmful":
            self.head_data[subject, task.name] = data
        head_name, _ = find_head(model, self.head_module)
        for seed in range(self.preset.probe_seeds):
            for attacker in self._probes_of(task):
                for dtype in self._precisions(task):
                    self._attack_features(data, attacker, "head_input", subject, task, f"input of {head_name}", seed, dtype)
        data.forget()
        for layer, view in views:
            label = layer.label(view)
            names = self.preset.flattened_probes if view == "flattened" else self.preset.layer_probes
            self._probe_layer(train.views.pop(label), test.views.pop(label), label, names, subject, task)
        for label, reason in left_out.items():
            outcome = Outcome("ridge", "any_layer", subject, task.name, label, 0, "float64", "skipped", reason)
            self._keep(outcome)

    def _probe_layer(
        self, Z: Tensor, Z_test: Tensor, label: str, names: tuple[str, ...], subject: str, task: AttackedTask
    ) -> None:
        seeds = range(self.preset.layer_seeds)
        ahead = [
            key_of(Outcome(name, "any_layer", subject, task.name, label, seed, "float64"))
            for seed in seeds
            for name in names
        ]
        data = None
        if not all(key in self.journal.outcomes for key in ahead):
            self.bar.set_description(f"{subject}: {label}")
            coordinates = dual_coordinates(Z, Z_test)
            del Z, Z_test
            data = ProbeData(coordinates[0], task.train.labels, coordinates[1], task.test.labels, task.num_classes)
        for seed in seeds:
            for name in names:
                self._attack_features(data, name, "any_layer", subject, task, label, seed, torch.float64)

    def _attack_features(
        self,
        data: ProbeData | None,
        attacker: str,
        access: str,
        subject: str,
        task: AttackedTask,
        layer: str,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        def attack() -> Finding:
            assert data is not None  # None only where all outcomes are there
            return PROBES[attacker](data, seed, dtype, self.preset.probe_budget)

        outcome = Outcome(attacker, access, subject, task.name, layer, seed, str(dtype).removeprefix("torch."))
        self._attack(outcome, attack, 1.0 if access == "head_input" else 0.0)

    # ---- fine-tuning and restoring

    def _fine_tune(self, task: AttackedTask, subject: str) -> None:
        budget = self.preset.tuning_budget
        names = self._tuners_of(task)
        if not names:
            return
        model, pixels = self.models[subject], None
        for attacker in names:
            settings = None
            for seed in range(self.preset.tuning_seeds):
                precision = str(torch.float32).removeprefix("torch.")
                outcome = Outcome(attacker, "fine_tuning", subject, task.name, _WHERE[attacker.split("_r")[0]], seed, precision)
                if key_of(outcome) not in self.journal.outcomes and pixels is None:
                    pixels = self._pixels(task, budget.max_images, budget.max_test_images)
                held = pixels

                def attack(
                    held: Any = held, seed: int = seed, settings: Any = settings, attacker: str = attacker
                ) -> Finding:
                    if isinstance(held, str):
                        return Finding(None, status="skipped", note=held)
                    train, test = held
                    return fine_tune(
                        model, attacker, train, test, task.num_classes, seed, budget, self.head_module, settings
                    )

                self._attack(outcome, attack, _TUNING_WEIGHT)
                # The first seed chooses the optimizer and the rate for the others.
                settings = settings or self.journal.outcomes[key_of(outcome)].settings or None

    def _pixels(self, task: AttackedTask, most: int, most_test: int) -> Any:
        """Pixel values and labels to train and to test on, or a sentence why they cannot be held."""
        generator = torch.Generator().manual_seed(0)
        parts = []
        example = next(iter(task.train.batches(self.processor, 1, progress=False)))
        count = min(most, len(task.train)) + min(most_test, len(task.test))
        need = count * example.numel() * example.element_size()
        if need > self.memory:
            return (
                f"the images need {need / 2**30:.1f} GiB of memory, {self.memory / 2**30:.1f} GiB are there; use fewer "
                "images or a larger machine"
            )
        for images, limit in ((task.train, most), (task.test, most_test)):
            rows = torch.randperm(len(images), generator=generator)[:limit].sort().values
            parts.append((images.pixels(self.processor, rows), images.labels[rows]))
        return parts

    def _restore(self, task: AttackedTask) -> None:
        ours, theirs = self.models["immunized"], self.models["reference"]
        names = moved_parameters(ours, theirs)
        where = f"{len(names)} tensors that immunization moved"
        for attacker in self.preset.restoring:
            shares = (1.0,) if attacker == "restore_swap" else SHARES
            outcomes = [
                Outcome(attacker, "fine_tuning", "immunized", task.name, where, seed, "float64")
                for seed in range(self.preset.layer_seeds)
            ]
            if all(key_of(outcome) in self.journal.outcomes for outcome in outcomes):
                for outcome in outcomes:
                    self._keep(self.journal.outcomes[key_of(outcome)])
                continue
            if not names:
                for outcome in outcomes:
                    self._keep(Outcome(**{**vars(outcome), "status": "skipped", "note": "No tensor differs."}))
                continue
            candidates = {}
            for share in shares:
                if share == 1.0:
                    candidates[share] = self.head_data["reference", task.name]
                    continue
                mixed = interpolate(ours, theirs, share)
                features = [
                    extract_views(
                        mixed,
                        images.batches(self.processor, description=f"{share:.0%} restored", progress=self.progress),
                        [],
                        self.head_module,
                    ).features
                    for images in (task.train, task.test)
                ]
                if all(bool(torch.isfinite(part).all()) for part in features):
                    candidates[share] = ProbeData(
                        features[0], task.train.labels, features[1], task.test.labels, task.num_classes
                    )
            for outcome in outcomes:

                def attack(candidates: Any = candidates, seed: int = outcome.seed) -> Finding:
                    return _best_share(candidates, seed, self.preset)

                self._attack(outcome, attack, 0.0)

    # ---- bookkeeping

    def _attack(self, outcome: Outcome, attack: Callable[[], Finding], weight: float) -> None:
        key = key_of(outcome)
        if key not in self.journal.outcomes:
            self.bar.set_description(f"{outcome.subject}: {outcome.attacker}, {outcome.task}, seed {outcome.seed}")
            begin = time.perf_counter()
            finding = _guarded(attack)
            self._keep(
                Outcome(
                    **{
                        **vars(outcome),
                        "status": finding.status,
                        "note": finding.note,
                        "accuracy": finding.accuracy,
                        "steps": finding.steps,
                        "curve": finding.curve,
                        "settings": finding.settings,
                        "trials": finding.trials,
                        "seconds": time.perf_counter() - begin,
                    }
                )
            )
        else:
            self.order.append(key)
        self.bar.update(weight)

    def _keep(self, outcome: Outcome) -> None:
        key = key_of(outcome)
        if key not in self.journal.outcomes:
            self.journal.add(outcome)
        self.order.append(key)

    def _warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)

    # ---- spectra and utility

    def _note_spectrum(self, task: AttackedTask, subject: str, features: Tensor) -> None:
        if task.name not in ("harmful", "benign") or subject == "random" or len(features) < 2:
            return
        produced = next(self.models[subject].parameters()).dtype
        before = self.conditioning.get(("reference", task.name)) if subject == "immunized" else None
        self.conditioning[subject, task.name] = feature_conditioning(
            features, reference=before, produced_dtype=produced
        )
        self.sigma[subject, task.name] = singular_values(features).tolist()

    def _spectra(self) -> list[Spectrum]:
        return [
            Spectrum(subject, task, self.sigma[subject, task], c.num_samples, c.rank, c.log10_kappa, c.is_bound)
            for (subject, task), c in self.conditioning.items()
        ]

    def _ratio(self) -> dict[str, Any]:
        needed = [(s, t) for s in ("immunized", "reference") for t in ("harmful", "benign")]
        if not all(pair in self.conditioning for pair in needed):
            return {}
        h, b, h0, b0 = (self.conditioning[pair] for pair in needed)
        ratio = relative_immunization_ratio(harmful=h, harmful_reference=h0, benign=b, benign_reference=b0)
        return {
            name: getattr(ratio, name) for name in ("rir", "log10_rir", "harmful_ratio", "benign_ratio", "bound")
        }

    def _hits(
        self, task: AttackedTask, subject: str, train: Extraction, test: Extraction | None
    ) -> Tensor:
        """Whether the released classifier names each benign test image rightly."""
        model = self.models[subject]
        outputs = _outputs(model, task, self.warnings)
        if test is not None and task.utility.indices == task.test.indices:
            logits = test.logits
        else:
            batches = task.utility.batches(self.processor, description=f"{subject}: utility", progress=self.progress)
            logits = torch.cat([run(model, batch).float().cpu() for batch in batches])
        return logits.argmax(dim=1) == outputs

    def _utility(self) -> Utility | None:
        if "immunized" not in self.hits:
            return None
        return paired_utility(self.hits["immunized"], self.hits.get("reference"))


# A fine-tuning attack costs about as much as this many probes.
_TUNING_WEIGHT = 20.0
_WHERE = {
    "last_stage": "last stage and a new head",
    "whole_network": "whole network and a new head",
    "bias_only": "biases and a new head",
    "lora": "low-rank adapters and a new head",
}


def _guarded(attack: Callable[[], Finding]) -> Finding:
    """An attack whose failure for want of memory or of a convergent algorithm is recorded, not raised."""
    try:
        return attack()
    except MemoryError as error:
        return Finding(None, status="skipped", note=f"not enough memory: {error}")
    except torch.linalg.LinAlgError as error:
        return Finding(None, status="diverged", note=f"the decomposition failed: {str(error).splitlines()[0]}")
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        return Finding(None, status="skipped", note=f"not enough memory: {str(error).splitlines()[0]}")


def _best_share(candidates: dict[float, ProbeData], seed: int, preset: Preset) -> Finding:
    if not candidates:
        return Finding(None, status="diverged", note="every mixture of the weights gave features that are not finite")
    found = {
        share: PROBES["ridge"](data, seed, torch.float64, preset.probe_budget) for share, data in candidates.items()
    }
    best = max(found, key=lambda share: found[share].validation or 0.0)
    return Finding(
        found[best].accuracy,
        settings={"share_of_public_weights": best, **found[best].settings},
        trials=sum(finding.trials for finding in found.values()),
    )


def _outputs(model: PreTrainedModel, task: AttackedTask, warnings: list[str]) -> Tensor:
    """The output of the classifier that stands for each benign test image's label."""
    known = {str(name): int(index) for index, name in model.config.id2label.items()}
    names = task.label_names
    plain = all(name == f"LABEL_{index}" for name, index in known.items())
    labels = task.utility.labels
    if not names or plain or not any(name in known for name in names):
        if names and not plain:
            sentence = "No benign class is named like one of the model's: label i is taken for output i."
            if sentence not in warnings:
                warnings.append(sentence)
        return labels
    table = torch.tensor([known.get(name, -1) for name in names])
    return table[labels]


def _load_models(
    model: Any, reference: Any, processor: Any, revision: str, trust_remote_code: bool
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
            loaded = AutoModelForImageClassification.from_pretrained(given, **options)
            if processor is None:
                processor = AutoImageProcessor.from_pretrained(given, **options)
        except (OSError, ValueError) as error:
            raise ArgumentError(
                f"Expected an image classifier with its processor as the {subject} model at {given}, found: "
                f"{str(error).splitlines()[0]} Check the spelling, the connection and your rights."
            ) from error
        models[subject] = loaded.to("cuda" if torch.cuda.is_available() else "cpu")
        path = os.fspath(given)
        names[subject] = os.path.basename(os.path.abspath(path)) if os.path.exists(path) else path
    return models, processor, names


def _random_like(model: PreTrainedModel) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(model)(copy.deepcopy(model.config)).to(model.device)


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


def _without_choice(preset: Preset) -> dict[str, Any]:
    """What decides an attack's result: which attackers run does not, so that more can be added to a run."""
    described = preset.describe()
    return {name: described[name] for name in ("name", "probe_budget", "tuning_budget")}


def _budget(preset: Preset) -> dict[str, Any]:
    return {
        "probe_steps": preset.probe_budget.steps,
        "descent_steps": preset.probe_budget.descent_steps,
        "solver_iterations": preset.probe_budget.iterations,
        "fine_tuning_steps": preset.tuning_budget.steps,
        "fine_tuning_trial_steps": preset.tuning_budget.trial_steps,
        "fine_tuning_images": preset.tuning_budget.max_images,
        "probe_seeds": preset.probe_seeds,
        "layer_seeds": preset.layer_seeds,
        "fine_tuning_seeds": preset.tuning_seeds,
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
