"""What attacks and audits leave behind: plain data, written to JSON and read back without loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_immunize.attacks.presets import RESTORING


@dataclass(frozen=True)
class Outcome:
    """One attack on one subject with one seed, after the attacker has tuned its settings within its budget.

    Attributes:
        attacker: Its name, such as "ridge", "adamw", "lora_r8".
        access: "head_input" (a probe at the classifier's input), "any_layer" (a probe at the output of an earlier
            stage) or "fine_tuning".
        subject: "immunized", "reference" (the model before immunization) or "random" (random initialisation).
        task: "harmful", "unseen" (harmful classes not used for immunization), "benign" or "unrelated".
        layer: Where it probes (module's name and pooling), or what it fine-tunes.
        seed: Seed of its draws.
        precision: Dtype of its arithmetic, such as "float64".
        status: "done", "diverged" or "skipped".
        note: Why it diverged or was skipped; empty otherwise.
        accuracy: Accuracy on the task's test images with the settings it chose, between 0 and 1; None unless done.
        steps: Steps after which test accuracy was measured; empty for closed forms.
        curve: Test accuracy after these steps, with the chosen settings.
        settings: The settings it chose.
        trials: How many settings it tried.
        seconds: Wall-clock time of tuning and attack.
    """

    attacker: str
    access: str
    subject: str
    task: str
    layer: str
    seed: int
    precision: str
    status: str = "done"
    note: str = ""
    accuracy: float | None = None
    steps: list[int] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    trials: int = 1
    seconds: float = 0.0


@dataclass(frozen=True)
class TaskSummary:
    """A task that was attacked.

    Attributes:
        name: "harmful", "unseen", "benign" or "unrelated".
        dataset: What the user calls the data.
        train_size: Images the attacker trains on.
        test_size: Images its accuracy is measured on.
        num_classes: Number of classes.
        chance: Accuracy of always naming the most frequent class of the test images.
    """

    name: str
    dataset: str
    train_size: int
    test_size: int
    num_classes: int
    chance: float


@dataclass(frozen=True)
class Utility:
    """Benign accuracy of the released classifier, paired with the reference's on the same images.

    Attributes:
        size: Number of test images.
        immunized: Accuracy, between 0 and 1.
        reference: The reference's accuracy, or None without one.
        difference: immunized − reference.
        interval: 95 % interval of the difference (paired by image), or None without a reference.
    """

    size: int
    immunized: float
    reference: float | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class FeatureSpectrum:
    """Singular values of the features of one data set through one subject.

    Attributes:
        subject: "immunized" or "reference".
        task: "harmful" or "benign".
        singular_values: Descending.
        num_samples: N.
        rank: Numerical rank.
        log10_kappa: log10 κ(ZᵀZ), a lower bound where ``is_bound``.
        is_bound: Whether rank was lost against the reference.
    """

    subject: str
    task: str
    singular_values: list[float]
    num_samples: int
    rank: int
    log10_kappa: float
    is_bound: bool


@dataclass(frozen=True)
class AuditResult:
    """Everything an audit found, from which `AuditReport` makes tables, figures and words.

    Attributes:
        model: What the user calls the immunized model.
        reference: What the user calls the reference, or None.
        preset: "quick", "standard" or "full".
        preset_version: Raised whenever a preset changes; only reports of one version can be compared.
        budget: The attackers' budget: steps, samples, seconds, trials.
        tasks: By name.
        outcomes: All attacks.
        utility: Benign accuracy.
        spectra: Spectra of features.
        rir: ``rir``, ``log10_rir``, ``harmful_ratio``, ``benign_ratio``, ``bound`` of the exact protocol, or empty.
        warnings: Sentences for the reader: overlap of data, classes with one sample, missing reference, …
        machine: Hardware and library versions.
        seconds: Wall-clock time of the audit.
        accuracies: To which the steps are counted, beside shares of what the reference gives.
    """

    model: str
    reference: str | None
    preset: str
    preset_version: int
    budget: dict[str, Any]
    tasks: dict[str, TaskSummary]
    outcomes: list[Outcome]
    utility: Utility | None = None
    spectra: list[FeatureSpectrum] = field(default_factory=list)
    rir: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    accuracies: list[float] = field(default_factory=list)

    def tested_images(self, outcome: Outcome) -> int:
        """On how many images an attack was measured: fine-tuning takes no more than its budget, where there are more.

        What puts public weights back is read by probes, which take all.
        """
        size = self.tasks[outcome.task].test_size
        most = self.budget.get("fine_tuning_test_images")
        tuned = outcome.access == "fine_tuning" and outcome.attacker not in RESTORING
        return min(size, most) if tuned and isinstance(most, int) else size
