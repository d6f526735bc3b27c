"""What linear probes make of the demo's harmful digits, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from hf_immunize.hub.parts import AttackRecord, AuditRecord
from hf_immunize.hub.rows import metric_rows
from hf_immunize.linear.probe import least_squares_probe, probe_accuracy, probe_convergence
from hf_immunize.train_command import finite
from hf_immunize.vision.features import penultimate_features
from hf_immunize.vision.images import ImageCollator


PROBE_STEPS = 1000
RIDGES = [10.0**power for power in range(-12, 5)]


@dataclass(frozen=True)
class Probing:
    """What linear probes make of the harmful digits, on held-out images.

    Attributes:
        curve: Accuracy of gradient descent with exact line search after steps 1..`PROBE_STEPS`.
        convergence: ``‖w_t − w*‖²/‖w_0 − w*‖²`` for the same steps.
        least_squares: Accuracy of the best least-squares probe over ridge strengths of 17 decades.
    """

    curve: Tensor
    convergence: Tensor
    least_squares: float

    def at(self, step: int) -> float:
        """Accuracy of gradient descent after a number of steps."""
        return float(self.curve[step - 1])

    def steps_to(self, target: float) -> int | None:
        """The first step that reaches an accuracy; None if none does."""
        reached = (self.curve >= target).nonzero()
        return int(reached[0]) + 1 if len(reached) else None


def probe_harmful(model: PreTrainedModel, harmful: dict[str, list[dict[str, Any]]]) -> Probing:
    """Attack: fit linear probes to the harmful training images' features, test on held-out ones.

    Args:
        model: The model whose classifier input is probed.
        harmful: Rows to fit and to test on.

    Returns:
        `Probing`.
    """
    (z, y), (z_test, y_test) = (_features(model, harmful[split]) for split in ("train", "test"))
    targets = torch.nn.functional.one_hot(y).double()
    hits = [
        float(
            (least_squares_probe(z, targets, ridge, intercept=True).predict(z_test).argmax(1) == y_test)
            .double()
            .mean()
        )
        for ridge in RIDGES
    ]
    return Probing(
        curve=probe_accuracy(z, y, z_test, y_test, PROBE_STEPS),
        convergence=probe_convergence(z, targets, PROBE_STEPS),
        least_squares=max(hits),
    )


def demo_sentence(before: dict[str, float], after: dict[str, float], old: Probing, new: Probing) -> str:
    """The plain sentence under the table, from the figures alone, whichever way they came out.

    Args:
        before: Metrics before immunization.
        after: Metrics after.
        old: Probing before.
        new: Probing after.

    Returns:
        The sentence.
    """
    target = 0.9 * old.least_squares
    reached = [probing.steps_to(target) for probing in (old, new)]
    steps = [f"{step:,}" if step is not None else f"more than {PROBE_STEPS:,}" for step in reached]
    factor = (reached[1] or PROBE_STEPS + 1) / (reached[0] or PROBE_STEPS + 1)
    verb = "is slowed" if factor >= 2 else "is hardly slowed" if factor > 1 else "is not slowed"
    rir = {name: value for name, _, value in metric_rows({}, finite(after))}["RIR (exact)"]
    return (
        f"Benign accuracy went from {before['eval_accuracy']:.1%} to {after['eval_accuracy']:.1%} and the exact RIR "
        f"on held-out digits is {rir}; gradient descent on the harmful digits {verb} "
        f"({steps[0]} steps before, {steps[1]} after, to {target:.0%}), while least squares still reads "
        f"{new.least_squares:.1%} of them ({old.least_squares:.1%} before; chance 20%): harmful probing became "
        "ill-conditioned, not impossible."
    )


def audit_record(old: Probing, new: Probing) -> AuditRecord:
    """The demo's two attackers as the record of a small audit: the stronger one counts.

    Args:
        old: Probing before.
        new: Probing after.

    Returns:
        The record.
    """
    descent = f"gradient descent, the best of {PROBE_STEPS:,} steps"
    least_squares = f"least squares, the best of {len(RIDGES)} ridges"
    best = [{descent: float(probing.curve.max()), least_squares: probing.least_squares} for probing in (old, new)]
    attacker = max(best[1], key=lambda name: best[1][name])
    attack = AttackRecord(attacker, best[1][attacker], reference_accuracy=max(best[0].values()), chance=0.2)
    return AuditRecord("demo", strongest={"head_input": attack})


def figures(probing: Probing) -> dict[str, float]:
    """What ``results.json`` holds of a `Probing`: accuracies and, last, the distance to the optimum."""
    return {
        "gradient_descent_10_steps": probing.at(10),
        "gradient_descent_100_steps": probing.at(100),
        "gradient_descent_1000_steps": probing.at(1000),
        "distance_to_optimum_1000_steps": float(probing.convergence[-1]),
        "least_squares": probing.least_squares,
    }


def print_probing(console: Console, old: Probing, new: Probing) -> None:
    """Print the table of probing before and after."""
    table = Table(title="Linear probing of the held-out harmful digits", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for step in (10, 100, 1000):
        table.add_row(f"gradient descent, {step:,} steps", f"{old.at(step):.1%}", f"{new.at(step):.1%}")
    table.add_row("least squares (best ridge)", f"{old.least_squares:.1%}", f"{new.least_squares:.1%}")
    distance = [f"{float(probing.convergence[-1]):.2g}" for probing in (old, new)]
    table.add_row("‖w − w*‖²/‖w*‖² after 1,000 steps", *distance)
    console.print(table)


def convergence(model: PreTrainedModel, rows: list[dict[str, Any]]) -> Tensor:
    """``‖w_t − w*‖²/‖w_0 − w*‖²`` of gradient descent with exact line search, steps 1..`PROBE_STEPS`."""
    z, y = _features(model, rows)
    return probe_convergence(z, torch.nn.functional.one_hot(y).double(), PROBE_STEPS)


@torch.no_grad()
def _features(model: PreTrainedModel, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    batch = ImageCollator()(rows)
    return penultimate_features(model.eval(), batch["pixel_values"]), batch["labels"]
