"""One audit under way: which attacker runs when, on which features, and how it is kept."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_immunize.attacks.feature_store import FeatureStore, View
from hf_immunize.attacks.finetune import fine_tune
from hf_immunize.attacks.journal import Journal, key_of
from hf_immunize.attacks.layers import (
    Extraction,
    Layer,
    choose_views,
    dual_coordinates,
    extract_views,
    find_layers,
    pass_size,
)
from hf_immunize.attacks.outcomes import Outcome
from hf_immunize.attacks.presets import Preset
from hf_immunize.attacks.probe_data import Finding, ProbeData, guarded
from hf_immunize.attacks.restore import SHARES, best_share, interpolate, moved_parameters
from hf_immunize.attacks.standing import Standing
from hf_immunize.attacks.suite import PROBES
from hf_immunize.attacks.tasks import AttackedTask, Images
from hf_immunize.vision.features import find_head


if TYPE_CHECKING:
    from transformers import PreTrainedModel


# A fine-tuning attack costs about as much as this many probes.
_TUNING_WEIGHT = 20.0


class Work:
    """One audit under way: what is attacked, by what, and what was found.

    Args:
        preset: Attackers and budgets.
        models: "immunized", and where there are such "reference" and "random".
        tasks: "harmful" first; their images are loaded.
        processor: Image processor.
        journal: Where outcomes are kept.
        warnings: Sentences for the report are appended here.
        head_module: The classifier's name, where it cannot be found without help.
        memory: Bytes that features and images of attacks may take.
        progress: Whether to show progress bars.
        kept: Features of an interrupted run.
    """

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
        kept: FeatureStore,
    ) -> None:
        self.preset, self.models, self.tasks, self.processor = preset, models, tasks, processor
        self.journal, self.warnings, self.head_module = journal, warnings, head_module
        self.memory, self.progress, self.kept = memory, progress, kept
        self.order: list[str] = []
        self.standing = Standing(warnings)
        self.head_data: dict[tuple[str, str], ProbeData] = {}
        self.bar: Any = None
        # Label of a layer to the digest of the reference's features there.
        self.seen: dict[str, bytes] = {}
        # The reference first: rank lost is rank lost against it.
        self.subjects = [name for name in ("reference", "immunized", "random") if name in models]

    def run(self) -> Standing:
        """Run all attacks that are not in the journal; returns what was measured beside them."""
        able = [task for task in self.tasks if not task.problem]
        self.bar = tqdm(
            total=self._expected(able),
            disable=not self.progress,
            desc="audit",
            bar_format="{desc:<44.44} {percentage:3.0f}%|{bar}| {elapsed} so far, about {remaining} to go",
        )
        # Probabilities that underflow make products many times slower and change no digit of a result.
        torch.set_flush_denormal(True)
        try:
            for task in self.tasks:
                for subject in self.subjects:
                    self._probe(task, subject)
            for task in able:
                self._fine_tune(task)
            for subject in ("reference", "immunized") if "reference" in self.models else ():
                self._restore(able[0], subject)
        finally:
            torch.set_flush_denormal(False)
            self.bar.close()
        return self.standing

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
            each = 1.0 * len(self._probes_of(task)) * self.preset.probe_seeds * len(self._precisions(task))
            each += _TUNING_WEIGHT * len(self._tuners_of(task)) * self.preset.tuning_seeds
            total += each * len(self.subjects)
        return total

    # ---- probes

    def _probe(self, task: AttackedTask, subject: str) -> None:
        model = self.models[subject]
        views: list[tuple[Layer, str]] = []
        left_out: dict[str, str] = {}
        if task.name == "harmful" and (self.preset.layer_probes or self.preset.flattened_probes):
            example = next(iter(task.train.batches(self.processor, 1, progress=False)))
            layers = find_layers(model, example, self.preset.max_layers, self.head_module)
            if not layers:
                self._warn(f"{type(model).__name__} has no list of blocks: earlier layers were not probed.")
            rows, flat = len(task.train) + len(task.test), bool(self.preset.flattened_probes)
            views, left_out = choose_views(layers, rows, self.preset.layer_entries, self.memory, flat)
            views = [(layer, view) for layer, view in views if view == "flattened" or self.preset.layer_probes]
        ahead = [
            (layer, view)
            for layer, view in views
            if any(
                key_of(one) not in self.journal.outcomes
                for one in self._layer_outcomes(layer.label(view), view, subject, task)
            )
        ]
        train, test = (
            self._extract(model, images, ahead, f"{subject}: {task.name}") if len(images) else None
            for images in (task.train, task.test)
        )
        assert train is not None
        if task.name in ("harmful", "benign") and subject != "random":
            self.standing.note_features(subject, task.name, train.features, next(model.parameters()).dtype)
        if task.name == "benign" and subject != "random":
            self.standing.note_logits(model, subject, task, self._utility_logits(task, subject, test))
        if task.problem or test is None:
            return
        data = ProbeData(train.features, task.train.labels, test.features, task.test.labels, task.num_classes)
        if task.name == "harmful":
            self.head_data[subject, task.name] = data
        place = f"input of {find_head(model, self.head_module)[0]}"
        for seed in range(self.preset.probe_seeds):
            for attacker in self._probes_of(task):
                for dtype in self._precisions(task):
                    self._attack_features(data, attacker, "head_input", subject, task, place, seed, dtype)
        data.forget()
        for layer, view in views:
            label = layer.label(view)
            parts = (train.views.pop(label), test.views.pop(label)) if label in train.views else None
            self._probe_layer(parts, label, view, subject, task)
        for label, reason in left_out.items():
            outcome = Outcome("ridge", "any_layer", subject, task.name, label, 0, "float64", "skipped", reason)
            self._keep(outcome)

    def _utility_logits(self, task: AttackedTask, subject: str, test: Extraction | None) -> Tensor:
        if test is not None and task.utility.indices == task.test.indices:
            return test.logits
        return self._extract(self.models[subject], task.utility, [], f"{subject}: utility").logits

    def _extract(self, model: PreTrainedModel, images: Images, views: list[View], description: str) -> Extraction:
        def make(missing: list[View]) -> Extraction:
            size = pass_size(model)
            batches = images.batches(self.processor, size, description=description, progress=self.progress)
            return extract_views(model, batches, missing, self.head_module)

        return self.kept.through(model, images.hashes, views, make)

    def _layer_outcomes(self, label: str, view: str, subject: str, task: AttackedTask) -> list[Outcome]:
        names = self.preset.flattened_probes if view == "flattened" else self.preset.layer_probes
        seeds = range(self.preset.layer_seeds)
        return [
            Outcome(name, "any_layer", subject, task.name, label, seed, "float64") for seed in seeds for name in names
        ]

    def _probe_layer(
        self, parts: tuple[Tensor, Tensor] | None, label: str, view: str, subject: str, task: AttackedTask
    ) -> None:
        outcomes = self._layer_outcomes(label, view, subject, task)
        data = None
        if parts is not None:
            self.bar.set_description(f"{subject}: {label}")
            digest = hashlib.blake2b(parts[0].numpy().data).digest()
            twins = [replace(outcome, subject="reference") for outcome in outcomes]
            if subject == "immunized" and self.seen.get(label) == digest:
                # A layer that immunization left alone: to the last bit the same features give the same outcomes.
                for outcome, twin in zip(outcomes, twins, strict=True):
                    found = self.journal.outcomes[key_of(twin)]
                    self._keep(replace(found, subject=outcome.subject, seconds=0.0))
                return
            self.seen[label] = digest
            train, test = dual_coordinates(*parts)
            data = ProbeData(train, task.train.labels, test, task.test.labels, task.num_classes)
        for one in outcomes:
            self._attack_features(data, one.attacker, one.access, subject, task, label, one.seed, torch.float64)

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

    def _fine_tune(self, task: AttackedTask) -> None:
        budget, pixels = self.preset.tuning_budget, None
        # One attacker on all models before the next: what an interruption leaves can be compared.
        for attacker, subject in itertools.product(self._tuners_of(task), self.subjects):
            model, settings = self.models[subject], None
            for seed in range(self.preset.tuning_seeds):
                precision = str(torch.float32).removeprefix("torch.")
                outcome = Outcome(
                    attacker, "fine_tuning", subject, task.name, _WHERE[attacker.split("_r")[0]], seed, precision
                )
                if key_of(outcome) not in self.journal.outcomes and pixels is None:
                    pixels = self._pixels(task, budget.max_images, budget.max_test_images)
                held = pixels

                def attack(
                    held: Any = held,
                    seed: int = seed,
                    settings: Any = settings,
                    attacker: str = attacker,
                    model: PreTrainedModel = model,
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
                f"the images need {need / 2**30:.1f} GiB of memory, {self.memory / 2**30:.1f} GiB are there; use "
                "fewer images or a larger machine"
            )
        for images, limit in ((task.train, most), (task.test, most_test)):
            rows = torch.randperm(len(images), generator=generator)[:limit].sort().values
            parts.append((images.pixels(self.processor, rows), images.labels[rows]))
        return parts

    def _restore(self, task: AttackedTask, subject: str) -> None:
        """The public weights put back; in the reference they are already, so that it is read as it is."""
        ours, theirs = self.models["immunized"], self.models["reference"]
        names = moved_parameters(ours, theirs)
        where = f"{len(names)} tensors that immunization moved"
        for attacker in self.preset.restoring:
            shares = (1.0,) if attacker == "restore_swap" or subject == "reference" else SHARES
            outcomes = [
                Outcome(attacker, "fine_tuning", subject, task.name, where, seed, "float64")
                for seed in range(self.preset.layer_seeds)
            ]
            if all(key_of(outcome) in self.journal.outcomes for outcome in outcomes):
                for outcome in outcomes:
                    self._keep(self.journal.outcomes[key_of(outcome)])
                continue
            if not names:
                for outcome in outcomes:
                    self._keep(replace(outcome, status="skipped", note="No tensor differs from the reference."))
                continue
            candidates = {}
            for share in shares:
                if share == 1.0:
                    candidates[share] = self.head_data["reference", task.name]
                    continue
                mixed = interpolate(ours, theirs, share)
                features = [
                    self._extract(mixed, images, [], f"{share:.0%} restored").features
                    for images in (task.train, task.test)
                ]
                if all(bool(torch.isfinite(part).all()) for part in features):
                    candidates[share] = ProbeData(
                        features[0], task.train.labels, features[1], task.test.labels, task.num_classes
                    )
            for outcome in outcomes:

                def attack(candidates: Any = candidates, seed: int = outcome.seed) -> Finding:
                    return best_share(candidates, seed, self.preset.probe_budget)

                self._attack(outcome, attack, 0.0)

    # ---- bookkeeping

    def _attack(self, outcome: Outcome, attack: Callable[[], Finding], weight: float) -> None:
        key = key_of(outcome)
        if key not in self.journal.outcomes:
            self.bar.set_description(f"{outcome.subject}: {outcome.attacker}, {outcome.task}, seed {outcome.seed}")
            begin = time.perf_counter()
            finding = guarded(attack)
            found = {name: value for name, value in vars(finding).items() if name != "validation"}
            self._keep(replace(outcome, **found, seconds=time.perf_counter() - begin))
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


_WHERE = {
    "last_stage": "last stage and a new head",
    "whole_network": "whole network and a new head",
    "bias_only": "biases and a new head",
    "lora": "low-rank adapters and a new head",
}
