"""Outcomes of an audit over seeds: means, intervals, worst cases, differences."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from hf_immunize.audit.intervals import mean_interval, newcombe_interval, wider, wilson_interval
from hf_immunize.audit.outcomes import AuditData, Outcome
from hf_immunize.audit.speed import late_rise
from hf_immunize.audit.thresholds import STILL_RISING, STILL_RISING_IMAGES


ACCESSES = ("head_input", "any_layer", "fine_tuning")
SUBJECTS = ("immunized", "reference", "random")
# Solvers that count no steps here and descend all the same: ill-conditioning may slow them.
ITERATIVE = ("lbfgs", "logistic_regression")


@dataclass(frozen=True)
class Summary:
    """One attack on one subject, over its seeds.

    Attributes:
        attacker, access, subject, task, layer, precision: As in `Outcome`.
        accuracies: Best accuracy reached, by seed, of the runs that are done.
        mean: Their mean; None when no run is done.
        interval: Student's t interval over seeds; None with fewer than `MIN_SEEDS`, or where all seeds agree.
        test_size: Number of test images of a run.
        test_interval: Wilson's interval of the mean for that number; None when no run is done.
        diverged, skipped: Runs that ended so.
        notes: What was said of those, each once.
        closed_form: Whether it takes no gradient steps; not `ITERATIVE` ones.
        rise: Mean gain in accuracy over the last half of the steps; 0 for closed forms.
        budget: Most steps of a run; 0 for closed forms.
        before_divergence: Best accuracy of a diverged run before it diverged, or None.
        seconds: Mean wall-clock time of a run, the search for its settings included where the run made one.
        seconds_interval: Student's t interval of that; None with fewer than `MIN_SEEDS`.
    """

    attacker: str
    access: str
    subject: str
    task: str
    layer: str
    precision: str
    accuracies: dict[int, float]
    mean: float | None
    interval: tuple[float, float] | None
    test_size: int
    test_interval: tuple[float, float] | None
    diverged: int
    skipped: int
    notes: tuple[str, ...]
    closed_form: bool
    rise: float
    budget: int
    before_divergence: float | None
    seconds: float
    seconds_interval: tuple[float, float] | None

    @property
    def ends(self) -> tuple[float, float] | None:
        """Interval that holds both, that over seeds and that over test images; None when no run is done."""
        return None if self.test_interval is None else wider(self.test_interval, self.interval)

    @property
    def upper(self) -> float:
        """Upper end of the wider interval; 1 when no run is done."""
        return 1.0 if self.ends is None else self.ends[1]

    @property
    def lower(self) -> float:
        """Lower end of the wider interval; 0 when no run is done."""
        return 0.0 if self.ends is None else self.ends[0]

    @property
    def still_rising(self) -> bool:
        """Whether it improved in its last steps by more than a few test images may do by chance."""
        return self.rise >= STILL_RISING and self.rise * self.test_size >= STILL_RISING_IMAGES


def reached(outcome: Outcome) -> float:
    """Best accuracy an attack that is done came to, along its curve too.

    An attack that overshoots in its last steps has still read the task, and its owner would have stopped in time.
    """
    assert outcome.accuracy is not None
    return max([outcome.accuracy, *outcome.curve])


def summarize(data: AuditData) -> list[Summary]:
    """Outcomes over seeds, in the order of the audit.

    Args:
        data: What the audit found.

    Returns:
        One summary for each attacker, access, subject, task, layer and precision.
    """
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for one in data.outcomes:
        key = (one.attacker, one.access, one.subject, one.task, one.layer, one.precision)
        groups.setdefault(key, []).append(one)
    return [_summarize(runs, data.tested_images(runs[0])) for runs in groups.values()]


def _summarize(runs: list[Outcome], test_size: int) -> Summary:
    first, done = runs[0], [run for run in runs if run.status == "done"]
    accuracies = {run.seed: reached(run) for run in done}
    mean, interval = mean_interval(list(accuracies.values())) if accuracies else (None, None)
    seconds, seconds_interval = mean_interval([run.seconds for run in runs])
    before = [max(run.curve) for run in runs if run.status == "diverged" and run.curve]
    return Summary(
        attacker=first.attacker,
        access=first.access,
        subject=first.subject,
        task=first.task,
        layer=first.layer,
        precision=first.precision,
        accuracies=accuracies,
        mean=mean,
        interval=_within_one(interval),
        test_size=test_size,
        test_interval=None if mean is None else wilson_interval(mean, test_size),
        diverged=sum(run.status == "diverged" for run in runs),
        skipped=sum(run.status == "skipped" for run in runs),
        notes=tuple(dict.fromkeys(run.note for run in runs if run.status != "done" and run.note)),
        closed_form=bool(done) and first.attacker not in ITERATIVE and not any(run.steps for run in done),
        rise=statistics.fmean([late_rise(run.steps, run.curve) for run in done]) if done else 0.0,
        budget=max((run.steps[-1] for run in done if run.steps), default=0),
        before_divergence=max(before, default=None),
        seconds=seconds,
        seconds_interval=seconds_interval and (max(0.0, seconds_interval[0]), seconds_interval[1]),
    )


def _within_one(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    return interval and (max(0.0, interval[0]), min(1.0, interval[1]))


def of_class(summaries: Iterable[Summary], subject: str, task: str, access: str) -> list[Summary]:
    """Summaries that belong to a class of attackers.

    Probes at the classifier's input count as probes at any layer too, where an earlier layer was probed at all.

    Args:
        summaries: Of an audit.
        subject: As in `Outcome`.
        task: As in `Outcome`.
        access: As in `Outcome`.

    Returns:
        Those of the class, attacks that are not done included.
    """
    own = [one for one in summaries if (one.subject, one.task) == (subject, task)]
    found = [one for one in own if one.access == access]
    if access == "any_layer" and any(one.mean is not None for one in found):
        found += [one for one in own if one.access == "head_input"]
    return found


def strongest(summaries: Iterable[Summary]) -> Summary | None:
    """The one of highest mean accuracy, or None when nothing is done."""
    done = [one for one in summaries if one.mean is not None]
    return max(done, key=lambda one: one.mean or 0.0, default=None)


def matched(summaries: Iterable[Summary], others: Iterable[Summary]) -> list[Summary]:
    """Those whose attack was also done among the others, so that two worst cases are over the same attacks."""
    keys = {(one.attacker, one.layer) for one in others if one.mean is not None}
    return [one for one in summaries if (one.attacker, one.layer) in keys]


def gap(reference: Summary, immunized: Summary) -> tuple[float, tuple[float, float]]:
    """Accuracy lost to the immunization, reference − immunized, with what seeds and test images leave open.

    Args:
        reference: Of the reference.
        immunized: Of the immunized model.

    Returns:
        The difference of the means, and an interval that holds `gap_of_images` and `gap_of_seeds`.
    """
    assert reference.mean is not None and immunized.mean is not None
    interval = wider(gap_of_images(reference, immunized), gap_of_seeds(reference, immunized))
    return reference.mean - immunized.mean, interval


def gap_of_seeds(reference: Summary, immunized: Summary) -> tuple[float, float] | None:
    """Student's t interval of the difference, paired by seed; None with few shared seeds or where all agree."""
    shared = shared_seeds(reference, immunized)
    if not shared:
        return None
    return mean_interval([reference.accuracies[seed] - immunized.accuracies[seed] for seed in shared])[1]


def shared_seeds(reference: Summary, immunized: Summary) -> list[int]:
    """Seeds with which both are done."""
    return sorted(reference.accuracies.keys() & immunized.accuracies.keys())


def gap_of_images(reference: Summary, immunized: Summary) -> tuple[float, float]:
    """Newcombe's interval of the same difference for the number of test images, as if these were two draws of them.

    An audit keeps accuracies, not answers image by image; as the images are the same, the interval is too wide rather
    than too narrow.

    Args:
        reference: Of the reference.
        immunized: Of the immunized model.

    Returns:
        Its ends.
    """
    assert reference.mean is not None and immunized.mean is not None
    return newcombe_interval(reference.mean, reference.test_size, immunized.mean, immunized.test_size)
