"""Plain sentences on a group of rows, generated from its figures alone: what was wanted, what was found."""

import statistics
from typing import Any

from examples.experiments.rows import Group, above_chance, bound_sign, decimal, log10_rir, pooled_difference, probe
from hf_immunize.audit.names import label, percent, signed


# Where a task says nothing else: within so many points of chance a probe counts as stopped.
STOPPED_POINTS = 5.0


def stopped(group: Group, wanted: dict[str, Any], task: str = "harmful") -> str:
    """Whether the strongest linear probe at the classifier's input is near chance in every row, in words."""
    values = group.values(lambda row: above_chance(row, task))
    if not values:
        return "–"
    limit = wanted.get("above_chance_points", STOPPED_POINTS)
    return "stopped" if 100 * max(values) <= limit else "not stopped"


def sentences(group: Group, wanted: dict[str, Any]) -> list[str]:
    """What holds and what does not, for one group."""
    probes = [
        _probe(group, wanted, "harmful", "the harmful classes that were used"),
        _probe(group, wanted, "unseen", "harmful classes that were never seen"),
    ]
    every = [_benign(group, wanted), *probes, _layers(group), _rir(group, wanted), _unrelated(group, wanted)]
    return [one for one in [*every, _tuning(group)] if one]


def _verdict(reached: bool, bound: str) -> str:
    return f"{'as wanted' if reached else 'not as wanted'} ({bound})"


def _mean(group: Group, task: str, kind: str = "linear", moment: str = "after") -> float | None:
    values = group.values(lambda row: probe(row, task, kind, moment))
    return statistics.fmean(values) if values else None


def _worst(group: Group, task: str, kind: str) -> dict[str, Any]:
    """What was found on the task in the row whose probe reads most."""
    return max(group.rows, key=lambda row: probe(row, task, kind) or 0.0)["probes"][task]


def _benign(group: Group, wanted: dict[str, Any]) -> str:
    mean, (low, high), size = pooled_difference(group.rows)
    limit = wanted.get("benign_points")
    end = "" if limit is None else f", {_verdict(100 * mean >= -limit, f'at most {limit:g} points lost in the mean')}"
    return (
        f"Benign accuracy changed by {signed(mean)} points (95 % interval {signed(low)} to {signed(high)}, paired by "
        f"image, {size:,} image-and-split pairs of {len(group.rows)} {'splits' if group.rows[1:] else 'split'}){end}."
    )


def _probe(group: Group, wanted: dict[str, Any], task: str, name: str) -> str:
    if (after := _mean(group, task)) is None:
        return ""
    worst = _worst(group, task, "linear")
    most = worst["linear"]["after"]
    return (
        f"Reading {name} at the classifier's input is {stopped(group, wanted, task)}: the strongest linear probe "
        f"reads {percent(after)} in the mean ({percent(_mean(group, task, moment='before'))} before), at worst "
        f"{percent(most['accuracy'])} by {label(most['attacker'])}; chance is {percent(worst['chance'])}, and "
        f"within {wanted.get('above_chance_points', STOPPED_POINTS):g} points of it counts as stopped."
    )


def _layers(group: Group) -> str:
    if (after := _mean(group, "harmful", "any_layer")) is None:
        return "Earlier layers were not probed here; they are not expected to be stopped."
    before = _mean(group, "harmful", "any_layer", "before")
    return (
        f"At the best layer the strongest linear probe reads {percent(after)} ({percent(before)} before), at worst at "
        f"{_worst(group, 'harmful', 'any_layer')['any_layer']['after']['layer']}: whoever has the weights has these "
        "layers."
    )


def _rir(group: Group, wanted: dict[str, Any]) -> str:
    logs = group.values(log10_rir)
    if not logs:
        return "The exact RIR is undetermined: ranks changed on both sides, and the bounds oppose each other."
    exact = [row["ratios"]["exact"] for row in group.rows]
    ratios = [one["benign_ratio"] for one in exact]
    ends = []
    if (goal := wanted.get("log10_rir")) is not None:
        reached = min(logs) >= goal or bound_sign(group.rows) == "≥ "
        ends.append(f"; {_verdict(reached, f'10^{goal:g}, or at the bound')}")
    if (limit := wanted.get("benign_ratio")) is not None:
        ends.append(f"; (ii) {_verdict(max(ratios) <= limit, f'at most {limit:g}')}")
    # What (ii) would be without the benign images that share the fate of harmful ones.
    without = [row["ratios"].get("without_lost", {}) for row in group.rows]
    if any(one.get("lost") for one in without):
        pairs = list(zip(without, exact, strict=True))
        lost = " / ".join(f"{one.get('lost', 0)} of {of['benign']['images']:,}" for one, of in pairs)
        kept = statistics.fmean(one.get("benign_ratio", of["benign_ratio"]) for one, of in pairs)
        ends.append(
            f". {lost} held-out benign images keep at most a tenth of what the median one keeps of its features' "
            f"length; without them (ii) is {kept:.3g}"
        )
    return (
        f"log10 of the exact RIR is {bound_sign(group.rows)}{decimal(statistics.fmean(logs))}"
        f"{' in the mean' if logs[1:] else ''}, (ii) {statistics.fmean(ratios):.3g}{''.join(ends)}. It says how "
        "gradient descent at the classifier's input is conditioned, and nothing of what can be read there."
    )


def _unrelated(group: Group, wanted: dict[str, Any]) -> str:
    before, after = (_mean(group, "unrelated", moment=moment) for moment in ("before", "after"))
    if before is None or after is None:
        return ""
    limit, change = wanted.get("unrelated_points"), after - before
    end = "" if limit is None else f", {_verdict(100 * change >= -limit, f'at most {limit:g} points lost')}"
    return (
        f"The unrelated task ({group.rows[0]['sources']['unrelated']}) reads {percent(after)} by the strongest linear "
        f"probe at the classifier's input, {signed(change)} points{end}."
    )


def _tuning(group: Group) -> str:
    found = [row["probes"]["harmful"]["by_class"].get("fine_tuning") for row in group.rows]
    worst = max((one for one in found if one), key=lambda one: one["after"]["accuracy"], default=None)
    if worst is None:
        return "Fine-tuning was not tried here; it is not expected to be stopped."
    return (
        f"Fine-tuning reads {percent(worst['after']['accuracy'])} at worst ({label(worst['after']['attacker'])}; "
        f"{percent(worst['before']['accuracy'])} before)."
    )
