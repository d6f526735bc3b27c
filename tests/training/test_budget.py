"""The state of the budget is said when it changes, and counted."""

import pytest

from hf_immunize.training import record as budget


BUDGET = {"benign_loss": "distillation", "benign_budget": 0.01, "budget_measure": "kl", "max_steps": 12}


def run_of(trainer, monkeypatch, **options):
    said = []
    monkeypatch.setattr(budget.logger, "warning", said.append)
    run = trainer(**BUDGET, **options)
    run.train()
    return [entry["budget_spent"] for entry in run.state.log_history if "budget_spent" in entry], said


def test_a_budget_that_is_exceeded_is_said_once_and_not_in_every_step(trainer, monkeypatch):
    spent, said = run_of(trainer, monkeypatch, learning_rate=0.3)
    beyond = [step for step, part in enumerate(spent, 1) if part > 1.25]
    assert len(spent) == 12 and len(beyond) > 2
    assert len(said) == 1 and said[0].startswith(f"Step {beyond[0]}:")


def test_within_the_budget_nothing_is_said(trainer, monkeypatch):
    spent, said = run_of(trainer, monkeypatch, learning_rate=1e-5)
    assert 0 < max(spent) < 1 and not said


def test_without_a_budget_there_is_no_state(trainer):
    run = trainer()
    run.train()
    assert budget.describe_budget(run._step) is None
    assert not any("budget_spent" in entry for entry in run.state.log_history)


def test_the_state_is_what_the_weighting_has(trainer):
    run = trainer(**BUDGET, learning_rate=0.3)
    run.train()
    state = budget.describe_budget(run._step)
    weights = run._step.weighting.state_dict()
    assert state.spent == pytest.approx(float(weights["divergence"]))
    # It starts at 0.02.
    assert state.weight == pytest.approx(float(weights["multiplier"]) / 0.02)
