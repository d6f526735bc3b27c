"""A record's figures as rows of a table, as one sentence, and as metrics by the Trainer's names."""

from __future__ import annotations

import math
from typing import Any

from hf_immunize.hub.parts import ACCESS, AttackRecord, AuditRecord, BudgetRecord, RatioRecord
from hf_immunize.hub.record import ImmunizationRecord
from hf_immunize.hub.text import plain


# Name, metric, form, and the flags that make it a bound from below and from above.
_ROWS = (
    ("benign accuracy", "eval_accuracy", "{:.1%}", None, None),
    ("log10 κ of benign features", "eval_benign_log10_kappa", "{:.2f}", "eval_benign_is_bound", None),
    ("log10 κ of harmful features", "eval_harmful_log10_kappa", "{:.2f}", "eval_harmful_is_bound", None),
    ("rank of benign features", "eval_benign_rank", "{:.0f}", None, None),
    ("rank of harmful features", "eval_harmful_rank", "{:.0f}", None, None),
    ("RIR (exact)", "eval_rir", "{:,.4g}", "eval_rir_is_lower_bound", "eval_rir_is_upper_bound"),
)
_ACCESS_WORDS = {
    "head_input": "the classifier's input",
    "any_layer": "the output of any layer",
    "fine_tuning": "all weights (fine-tuning)",
}
_NO_AUDIT = (
    "No audit was made. An ill-conditioned feature map leaves the attainable accuracy of a linear probe as it is: "
    "least squares, conjugate gradient or whitening before the probe are not slowed. Probes of earlier layers and "
    "fine-tuning of the network were not measured, and are not expected to be stopped."
)
# Below this ratio nothing worth the name was achieved; a larger loss of accuracy is said to be one. The default budget
# bounds a change in the probability of the right class by as much.
_ACHIEVED, _LOST = 2.0, 0.05
# Regularizers of so small a part of their first weight move nothing.
_FADED = 0.1
# Objectives that switch rectifiers off.
_HIDING = ("silence",)
_HIDDEN = (
    "Rectifiers that are off hide what enters them and do not erase it: whoever has the weights reads it there, and "
    "BatchNorm that takes the statistics of its batch, as in fine-tuning, switches them on again."
)


def metric_rows(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of a table of metrics, bounds with their direction.

    Args:
        before: Metrics of `ImmunizationTrainer.evaluate`; None where a number is not finite.
        after: The same after immunization.

    Returns:
        Name, before and after, as text.

    Example:
        >>> metric_rows({"eval_rir": 1.0}, {"eval_rir": 50.0, "eval_rir_is_lower_bound": 1.0})[-1]
        ('RIR (exact)', '1', '≥ 50')
    """

    def cell(metrics: dict[str, Any], key: str, form: str, below: str | None, above: str | None) -> str:
        lower, upper = (bool(flag and metrics.get(flag)) for flag in (below, above))
        value = metrics.get(key)
        if value is None or value != value:
            return "undetermined" if lower and upper else "–"
        return ("≥ " if lower else "≤ " if upper else "") + form.format(value)

    return [(name, cell(before, *rest), cell(after, *rest)) for name, *rest in _ROWS]


def record_metrics(record: ImmunizationRecord) -> tuple[dict[str, Any], dict[str, Any]]:
    """A record's figures by the names `ImmunizationTrainer.evaluate` gives them, before and after.

    Args:
        record: The record.

    Returns:
        Metrics before and after; what the record does not know is left out.
    """
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    if record.metric is not None:
        after[f"eval_{record.metric.name}"] = record.metric.after
        if record.metric.before is not None:
            before[f"eval_{record.metric.name}"] = record.metric.before
    for side, features in (("benign", record.benign_features), ("harmful", record.harmful_features)):
        for metrics, part in ((before, features.before), (after, features.after)):
            if part is not None:
                metrics[f"eval_{side}_log10_kappa"] = part.log10_kappa
                metrics[f"eval_{side}_is_bound"] = float(part.is_bound)
                metrics[f"eval_{side}_rank"] = float(part.rank)
    exact = record.ratios.get("exact")
    if exact is not None:
        before["eval_rir"] = 1.0
        after["eval_rir"] = None if exact.log10_rir is None else _power(exact.log10_rir)
        after["eval_rir_is_lower_bound"] = float(exact.bound in ("lower", "undetermined"))
        after["eval_rir_is_upper_bound"] = float(exact.bound in ("upper", "undetermined"))
    return before, after


def record_rows(record: ImmunizationRecord) -> list[tuple[str, str, str]]:
    """Rows of the card's table.

    Args:
        record: The record.

    Returns:
        Name, before and after, as text; only rows of which something is known.
    """
    rows = [row for row in metric_rows(*record_metrics(record)) if row[1:] != ("–", "–")]
    if record.metric is not None and record.metric.name != "accuracy":
        old, new = ("–" if value is None else f"{value:.4g}" for value in (record.metric.before, record.metric.after))
        rows.insert(0, (f"benign {plain(record.metric.name)}", old, new))
    for side, number in (("harmful", "(i)"), ("benign", "(ii)")):
        exact = record.ratios.get("exact")
        value = None if exact is None else getattr(exact, f"log10_{side}_ratio")
        if value is not None:
            features = getattr(record, f"{side}_features")
            now, then = features.after, features.before
            gained = now is not None and then is not None and now.rank > then.rank
            sign = "≥ " if now is not None and now.is_bound else "≤ " if gained else ""
            rows.append((f"{number}, growth of {side} κ", "1", f"{sign}{_power(value):,.4g}"))
    groups = record.ratios.get("groups")
    if groups is not None:
        count = "" if groups.num_groups is None else f", {groups.num_groups} groups of {groups.group_size}"
        rows.append((f"RIR (mean ± standard deviation{count})", "1", _groups_cell(groups)))
    return rows


def summary_sentence(before: dict[str, Any], after: dict[str, Any], budget: BudgetRecord | None = None) -> str:
    """What was achieved in one plain sentence, from the figures alone, and in the last one what went wrong, and why.

    Args:
        before: Metrics of `ImmunizationTrainer.evaluate` before immunization.
        after: Metrics after.
        budget: What became of the benign budget, if that is known.

    Returns:
        The sentences.
    """
    rir = after.get("eval_rir")
    if rir is None and after.get("eval_rir_is_lower_bound") and after.get("eval_rir_is_upper_bound"):
        ratio = "the ratio of condition numbers is undetermined, since the ranks of both tasks' features changed"
    elif rir is None:
        ratio = "the ratio of condition numbers was not measured"
    else:
        bound = "at least " if after.get("eval_rir_is_lower_bound") else ""
        bound = "at most " if after.get("eval_rir_is_upper_bound") else bound
        ratio = (
            f"the condition number of harmful probing grew {bound}{rir:,.3g} times as much as that of benign probing "
            "(exact RIR)"
        )
    old, new = before.get("eval_accuracy"), after.get("eval_accuracy")
    if new is None:
        accuracy = "benign accuracy was not measured"
    elif old is None:
        accuracy = f"benign accuracy is {new:.1%} (it was not measured before)"
    else:
        accuracy = f"benign accuracy changed by {100 * (new - old):+.1f} points"
    return (
        f"On held-out images {ratio}, and {accuracy}; a large ratio slows gradient descent on these features, and by "
        f"itself stops neither least squares, nor probes of earlier layers, nor fine-tuning. "
        f"{outcome_sentence(before, after, budget)}"
    ).rstrip()


def outcome_sentence(before: dict[str, Any], after: dict[str, Any], budget: BudgetRecord | None) -> str:
    """What a run failed at, with the reason, and the state of its budget.

    Args:
        before: Metrics before immunization.
        after: Metrics after.
        budget: What became of the benign budget, if that is known.

    Returns:
        One sentence; empty where nothing failed and no budget is known.

    Example:
        >>> outcome_sentence({"eval_accuracy": 0.5}, {"eval_accuracy": 0.4, "eval_rir": 9.0}, None)
        'This run cost 10.0 points of benign accuracy.'
    """
    rir, old, new = after.get("eval_rir"), before.get("eval_accuracy"), after.get("eval_accuracy")
    failed = []
    if rir is not None and rir < _ACHIEVED and not after.get("eval_rir_is_lower_bound"):
        failed.append(f"achieved nothing (an RIR of {rir:,.3g})")
    drop = 0.0 if old is None or new is None else old - new
    if drop > _LOST:
        failed.append(f"cost {100 * drop:.1f} points of benign accuracy")
    said = f"This run {' and '.join(failed)}" if failed else ""
    if budget is None:
        return f"{said}." if said else ""
    state = budget_words(budget)
    if not said:
        return state
    if budget.exceeded:
        return f"{said}: {_lowered(state)}"
    left = budget.spent < 0.5 * budget.limit
    remedy = (
        "lower the budget, or give more images to distil on"
        if drop > _LOST
        else "train longer or at a higher learning rate"
        if left
        else "raise the budget, train longer, or give images to distil on"
    )
    return f"{said}: {_lowered(state.rstrip('.'))}; {remedy}."


def budget_words(budget: BudgetRecord) -> str:
    """The state of a benign budget and what it means, as one sentence.

    Args:
        budget: What became of it.

    Returns:
        The sentence.

    Example:
        >>> budget_words(BudgetRecord(limit=0.05, measure="total_variation", spent=0.04, weight=1.0))
        'The benign side moved 0.04 of its budget of 0.05 (total variation).'
    """
    measure = plain(budget.measure.replace("_", " "))
    if not budget.exceeded:
        return f"The benign side moved {budget.spent:.2g} of its budget of {budget.limit:g} ({measure})."
    faded = (
        f", so that the weights of the regularizers faded to {budget.weight:.1g} of those at the start"
        if budget.weight < _FADED
        else ", so that the weights of the regularizers fade"
    )
    return (
        f"The benign side moved {budget.spent:.2g}, {budget.spent / budget.limit:.1f} times its budget of "
        f"{budget.limit:g} ({measure}){faded}: lower the learning rate, at which a few steps go past it."
    )


def _lowered(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def not_stopped(audit: AuditRecord | None, objective: str = "") -> str:
    """What the immunization does not stop, by the audit, or that none was made; and what its objective never stops.

    Args:
        audit: What it found.
        objective: What was minimized.

    Returns:
        Plain sentences, harmless in Markdown.
    """
    beside = [_HIDDEN] if objective in _HIDING else []
    if audit is None:
        return " ".join([_NO_AUDIT, *beside])
    sentences = []
    for access in ACCESS:
        attack = audit.strongest.get(access)
        words = _ACCESS_WORDS[access]
        if attack is None:
            sentences.append(
                f"An attacker with {words} was not tried; nothing is known of that, and it is not expected to be "
                "stopped."
            )
            continue
        compared = []
        if attack.reference_accuracy is not None:
            compared.append(f"{attack.reference_accuracy:.1%} on the model before immunization")
        if attack.chance is not None:
            compared.append(f"chance {attack.chance:.1%}")
        sentences.append(
            f"With {words}, the strongest attacker tried ({_attacker(access, attack)}) reaches {attack.accuracy:.1%} "
            f"of the harmful task{' (' + '; '.join(compared) + ')' if compared else ''}."
        )
    made = f"By an audit with the preset {plain(audit.preset)} (version {audit.preset_version})."
    return " ".join([made, *sentences, *beside, "Attackers with other methods or more data may reach more."])


def attack_rows(audit: AuditRecord | None) -> list[dict[str, str]]:
    """Rows of the card's table of attackers.

    Args:
        audit: What it found.

    Returns:
        Rows of text, harmless in Markdown.
    """

    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    return [
        {
            "access": _ACCESS_WORDS.get(access, plain(access)),
            "attacker": _attacker(access, attack),
            "accuracy": share(attack.accuracy),
            "reference": share(attack.reference_accuracy),
            "chance": share(attack.chance),
        }
        for access, attack in (audit.strongest if audit else {}).items()
        if attack is not None
    ]


def _attacker(access: str, attack: AttackRecord) -> str:
    where = f" at {attack.layer}" if access == "any_layer" and attack.layer else ""
    return plain(f"{attack.attacker}{where}")


def _groups_cell(ratio: RatioRecord) -> str:
    if ratio.log10_rir is None:
        return "undetermined"
    mean = _power(ratio.log10_rir)
    sign = {"lower": "≥ ", "upper": "≤ "}.get(ratio.bound or "", "")
    return f"{sign}{mean:,.4g}" + ("" if ratio.relative_std is None else f" ± {mean * ratio.relative_std:,.3g}")


def _power(exponent: float) -> float:
    """10 to a power, saturating at the largest float."""
    return 10.0**exponent if exponent < math.log10(1.7e308) else 1.7e308
