"""One audit under way: which attacker runs when, on which features, and how it is kept."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_immunize.attacks.finetune import fine_tune
from hf_immunize.attacks.probe_data import Finding, ProbeData, guarded
from hf_immunize.attacks.restore import best_share, interpolate
from hf_immunize.attacks.suite import PROBES
from hf_immunize.audit.feature_store import FeatureStore, View
from hf_immunize.audit.journal import key_of
from hf_immunize.audit.outcomes import Outcome
from hf_immunize.audit.passes import Pass, StoredPasses
from hf_immunize.audit.plan import TUNING_WEIGHT, Plan
from hf_immunize.audit.standing import Standing
from hf_immunize.audit.task_images import Images
from hf_immunize.audit.tasks import AttackedTask
from hf_immunize.features.layers import Extraction, dual_coordinates, extract_views, pass_size
from hf_immunize.vision.features import find_head


if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Work:
    """One audit under way: what is attacked, by what, and what was found.

    Args:
        plan: What is attacked by what, and where outcomes are kept.
        warnings: Sentences for the report are appended here.
        progress: Whether to show progress bars.
        kept: Features of an interrupted run.
    """

    def __init__(
        self,
        plan: Plan,
        warnings: list[str],
        progress: bool,
        kept: FeatureStore,
    ) -> None:
        self.plan, self.warnings, self.progress, self.kept = plan, warnings, progress, kept
        self.preset, self.models, self.tasks, self.processor = plan.preset, plan.models, plan.tasks, plan.processor
        self.journal, self.head_module, self.memory = plan.journal, plan.head_module, plan.memory
        self.order: list[str] = []
        self.standing = Standing(warnings)
        self.head_data: dict[tuple[str, str], ProbeData] = {}
        # What several processes have extracted before; None where this one does it as it goes.
        self.stored: StoredPasses | None = None
        self.bar: Any = None
        # Label of a layer to the digest of the reference's features there.
        self.seen: dict[str, bytes] = {}
        self._mixture: tuple[float, PreTrainedModel] | None = None

    def run(self) -> Standing:
        """Run all attacks that are not in the journal; returns what was measured beside them."""
        self.bar = tqdm(
            total=self.plan.expected(),
            disable=not self.progress,
            desc="audit",
            bar_format="{desc:<44.44} {percentage:3.0f}%|{bar}| {elapsed} so far, about {remaining} to go",
        )
        try:
            with underflow_to_zero():
                for task in self.tasks:
                    for subject in self.plan.subjects:
                        self._probe(task, subject)
                for task in self.plan.able:
                    self._fine_tune(task)
                for subject in ("reference", "immunized") if "reference" in self.models else ():
                    self._restore(self.plan.able[0], subject)
        finally:
            self.bar.close()
        return self.standing

    # ---- images through models

    def compute(self, wanted: Pass) -> Extraction | None:
        """Run this process's images through a model; None where it has none."""
        model, images = self._model(wanted), self._images(wanted)
        if not images.own:
            return None
        description = f"{wanted.restored:.0%} restored" if wanted.restored else f"{wanted.subject}: {wanted.task}"
        size = pass_size(model)
        batches = images.batches(self.processor, size, description=description, progress=self.progress)
        return extract_views(model, batches, list(wanted.views), self.head_module)

    def ahead(self) -> list[Pass]:
        """The passes that the attacks ask for, less those whose features were kept."""
        return [
            one
            for one in self.plan.passes()
            if not self.kept.holds(self._model(one), self._images(one).hashes, list(one.views))
        ]

    def _model(self, wanted: Pass) -> PreTrainedModel:
        model = self.models[wanted.subject]
        if wanted.restored == 0:
            return model
        if self._mixture is None or self._mixture[0] != wanted.restored:
            self._mixture = wanted.restored, interpolate(model, self.models["reference"], wanted.restored)
        return self._mixture[1]

    def _images(self, wanted: Pass) -> Images:
        task = next(task for task in self.tasks if task.name == wanted.task)
        images: Images = getattr(task, wanted.side)
        return images

    def _extracted(self, wanted: Pass) -> Extraction:
        def make(missing: list[View]) -> Extraction:
            if self.stored is not None:
                return self.stored.read(wanted)
            extraction = self.compute(replace(wanted, views=tuple(missing)))
            assert extraction is not None  # one process has all images
            return extraction

        return self.kept.through(self._model(wanted), self._images(wanted).hashes, list(wanted.views), make)

    # ---- probes

    def _probe(self, task: AttackedTask, subject: str) -> None:
        views, left_out, ahead = self.plan.views(task, subject)
        model = self.models[subject]
        if self.plan.probes_layers(task) and not (views or left_out):
            self._warn(f"{type(model).__name__} has no list of blocks: earlier layers were not probed.")
        train = self._extracted(Pass(subject, task.name, "train", ahead))
        test = self._extracted(Pass(subject, task.name, "test", ahead)) if len(task.test) else None
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
            for attacker in self.plan.probes_of(task):
                for dtype in self.plan.precisions(task):
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
        if test is not None and not self.plan.needs_utility(task, subject):
            return test.logits
        return self._extracted(Pass(subject, task.name, "utility")).logits

    def _probe_layer(
        self, parts: tuple[Tensor, Tensor] | None, label: str, view: str, subject: str, task: AttackedTask
    ) -> None:
        outcomes = self.plan.layer_outcomes(label, view, subject, task)
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
        for attacker, subject in itertools.product(self.plan.tuners_of(task), self.plan.subjects):
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

                self._attack(outcome, attack, TUNING_WEIGHT)
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
        ahead = dict(self.plan.restoring(task, subject))
        for attacker in self.preset.restoring:
            outcomes = self.plan.restore_outcomes(attacker, task, subject)
            if attacker not in ahead:
                for outcome in outcomes:
                    nothing = replace(outcome, status="skipped", note="No tensor differs from the reference.")
                    self._keep(self.journal.outcomes.get(key_of(outcome), nothing))
                continue
            candidates = {}
            for share in ahead[attacker]:
                if share == 1.0:
                    candidates[share] = self.head_data["reference", task.name]
                    continue
                features = [
                    self._extracted(Pass("immunized", task.name, side, (), share)).features
                    for side in ("train", "test")
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


@contextmanager
def underflow_to_zero() -> Iterator[None]:
    """Probabilities that underflow make products many times slower and change no digit of a result."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


_WHERE = {
    "last_stage": "last stage and a new head",
    "whole_network": "whole network and a new head",
    "bias_only": "biases and a new head",
    "lora": "low-rank adapters and a new head",
}
