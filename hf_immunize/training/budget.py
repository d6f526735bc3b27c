"""What became of the benign budget, for the record and for the log."""

from __future__ import annotations

from transformers.utils import logging

from hf_immunize.hub.parts import BudgetRecord
from hf_immunize.hub.rows import budget_words
from hf_immunize.training.step import ImmunizationStep


logger = logging.get_logger(__name__)


def describe_budget(step: ImmunizationStep) -> BudgetRecord | None:
    """The state of a run's budget.

    Args:
        step: What the run computes in a step.

    Returns:
        Its part of the record; None where there is no budget, or no step was taken.
    """
    spent, limit = step.weighting.spent(), step.method.benign_budget
    if spent is None or limit is None or step.calls == 0:
        return None
    return BudgetRecord(limit, step.method.budget_measure, *spent)


class BudgetWatch:
    """Say in the log when a run begins to exceed its budget, and when it is back within; not in every step."""

    def __init__(self) -> None:
        self._exceeded = False

    def look(self, step: ImmunizationStep, steps: int) -> dict[str, float]:
        """Look at the budget where a log is written.

        Args:
            step: What the run computes in a step.
            steps: Optimizer steps so far.

        Returns:
            What to log: ``budget_spent``, the part of the budget that is spent; nothing without a budget.
        """
        state = describe_budget(step)
        if state is None:
            return {}
        if state.exceeded != self._exceeded:
            (logger.warning if state.exceeded else logger.info)(f"Step {steps}: {budget_words(state)}")
            self._exceeded = state.exceeded
        return {"budget_spent": state.spent / state.limit}
