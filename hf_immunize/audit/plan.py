"""What an audit attacks, by what, and which features that takes; nothing here runs an attack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hf_immunize.attacks.presets import Preset
from hf_immunize.attacks.restore import SHARES, moved_parameters
from hf_immunize.audit.journal import Journal, key_of
from hf_immunize.audit.outcomes import Outcome
from hf_immunize.audit.passes import Pass
from hf_immunize.audit.tasks import AttackedTask
from hf_immunize.features.layers import Layer, choose_views, find_layers


if TYPE_CHECKING:
    from transformers import PreTrainedModel


# A fine-tuning attack costs about as much as this many probes.
TUNING_WEIGHT = 20.0


class Plan:
    """What is attacked by what, as far as the journal does not hold it already.

    Args:
        preset: Attackers and budgets.
        models: "immunized", and where there are such "reference" and "random".
        tasks: "harmful" first; their images are loaded.
        processor: Image processor.
        journal: Where outcomes are kept.
        head_module: The classifier's name, where it cannot be found without help.
        memory: Bytes that features and images of attacks may take.
    """

    def __init__(
        self,
        preset: Preset,
        models: dict[str, PreTrainedModel],
        tasks: list[AttackedTask],
        processor: Any,
        journal: Journal,
        head_module: str | None,
        memory: int,
    ) -> None:
        self.preset, self.models, self.tasks, self.processor = preset, models, tasks, processor
        self.journal, self.head_module, self.memory = journal, head_module, memory
        self.able = [task for task in tasks if not task.problem]
        # The reference first: rank lost is rank lost against it.
        self.subjects = [name for name in ("reference", "immunized", "random") if name in models]

    def probes_of(self, task: AttackedTask) -> tuple[str, ...]:
        """Attackers at the classifier's input."""
        if task.name in ("benign", "unrelated"):
            return tuple(name for name in self.preset.probes if name in self.preset.benign_attackers)
        return self.preset.probes

    def tuners_of(self, task: AttackedTask) -> tuple[str, ...]:
        """Attackers that fine-tune."""
        if task.name == "harmful":
            return self.preset.fine_tuning
        return tuple(name for name in self.preset.fine_tuning if name in self.preset.benign_attackers)

    def precisions(self, task: AttackedTask) -> list[torch.dtype]:
        """Of probes at the classifier's input."""
        both = self.preset.both_precisions and task.name == "harmful"
        return [torch.float64, torch.float32] if both else [torch.float64]

    def expected(self) -> float:
        """Work ahead, in attacks at the classifier's input; the others are weighed by what they tend to cost."""
        total = 0.0
        for task in self.able:
            each = 1.0 * len(self.probes_of(task)) * self.preset.probe_seeds * len(self.precisions(task))
            each += TUNING_WEIGHT * len(self.tuners_of(task)) * self.preset.tuning_seeds
            total += each * len(self.subjects)
        return total

    def probes_layers(self, task: AttackedTask) -> bool:
        """Whether earlier layers are to be probed."""
        return task.name == "harmful" and bool(self.preset.layer_probes or self.preset.flattened_probes)

    def views(
        self, task: AttackedTask, subject: str
    ) -> tuple[list[tuple[Layer, str]], dict[str, str], tuple[tuple[Layer, str], ...]]:
        """Earlier layers to probe, those left out with a reason, and those whose features are still needed."""
        if not self.probes_layers(task):
            return [], {}, ()
        example = next(iter(task.train.batches(self.processor, 1, progress=False)))
        layers = find_layers(self.models[subject], example, self.preset.max_layers, self.head_module)
        rows, flat = len(task.train) + len(task.test), bool(self.preset.flattened_probes)
        views, left_out = choose_views(layers, rows, self.preset.layer_entries, self.memory, flat)
        views = [(layer, view) for layer, view in views if view == "flattened" or self.preset.layer_probes]
        ahead = tuple(
            (layer, view)
            for layer, view in views
            if any(
                key_of(one) not in self.journal.outcomes
                for one in self.layer_outcomes(layer.label(view), view, subject, task)
            )
        )
        return views, left_out, ahead

    def needs_utility(self, task: AttackedTask, subject: str) -> bool:
        """Whether the released classifier is to be run on other images than those that probes are measured on."""
        if task.name != "benign" or subject == "random":
            return False
        return not len(task.test) or task.utility.indices != task.test.indices

    def layer_outcomes(self, label: str, view: str, subject: str, task: AttackedTask) -> list[Outcome]:
        """What is to be found at one layer, not yet filled in."""
        names = self.preset.flattened_probes if view == "flattened" else self.preset.layer_probes
        seeds = range(self.preset.layer_seeds)
        return [
            Outcome(name, "any_layer", subject, task.name, label, seed, "float64") for seed in seeds for name in names
        ]

    def restore_outcomes(self, attacker: str, task: AttackedTask, subject: str) -> list[Outcome]:
        """What is to be found by putting public weights back, not yet filled in."""
        names = moved_parameters(self.models["immunized"], self.models["reference"])
        where = f"{len(names)} tensors that immunization moved"
        return [
            Outcome(attacker, "fine_tuning", subject, task.name, where, seed, "float64")
            for seed in range(self.preset.layer_seeds)
        ]

    def restoring(self, task: AttackedTask, subject: str) -> list[tuple[str, tuple[float, ...]]]:
        """Attackers that are still to put public weights back, with the shares that each tries.

        In the reference they are in place already.
        """
        if not moved_parameters(self.models["immunized"], self.models["reference"]):
            return []
        return [
            (attacker, (1.0,) if attacker == "restore_swap" or subject == "reference" else SHARES)
            for attacker in self.preset.restoring
            if any(key_of(one) not in self.journal.outcomes for one in self.restore_outcomes(attacker, task, subject))
        ]

    def passes(self) -> list[Pass]:
        """All passes of images through models that the attacks ahead ask for, in their order."""
        planned = []
        for task in self.tasks:
            for subject in self.subjects:
                *_, ahead = self.views(task, subject)
                sides = [side for side in ("train", "test") if len(getattr(task, side))]
                planned += [Pass(subject, task.name, side, ahead) for side in sides]
                if self.needs_utility(task, subject):
                    planned.append(Pass(subject, task.name, "utility"))
        if "reference" in self.models:
            for _, shares in self.restoring(self.able[0], "immunized"):
                planned += [
                    Pass("immunized", self.able[0].name, side, (), share)
                    for share in shares
                    for side in ("train", "test")
                    if share < 1
                ]
        return planned
