"""Runs of a model from a function: each trial has its own settings and its own starting figures."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from transformers.trainer_utils import HPSearchBackend


@pytest.fixture
def searched(tiny, trainer, monkeypatch):
    """Make a trainer in the midst of a search, and a function that runs a trial with some settings."""
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)

    def make(model_init=None, **options):
        run = trainer(model_init=model_init or (lambda: tiny()), **options)
        run.hp_search_backend, run.hp_space, run.hp_name = HPSearchBackend.OPTUNA, lambda trial: trial.params, None
        return run, lambda **params: run.train(trial=SimpleNamespace(number=0, params=params))

    return make


def test_a_trial_has_its_own_settings(searched):
    run, try_with = searched(benign_weight="0", harmful_weight="auto")
    for weight in (0.5, 2.0):
        try_with(harmful_weight=weight)
        assert run.state.log_history[0]["harmful_weight"] == pytest.approx(weight)


def test_a_trial_has_its_own_batch_sizes(searched):
    run, try_with = searched(harmful_batch_size=4)
    collate, seen = run.data_collator, []
    run.data_collator = lambda rows: seen.append(sum(len(row.get("harmful", ())) for row in rows)) or collate(rows)
    try_with(harmful_batch_size=2)
    assert {count for count in seen if count} == {2}


def test_a_trial_has_the_rir_of_its_own_starting_model(searched, tiny):
    """With a learning rate of zero it is one, whatever the model."""

    def model_init(trial):
        model = tiny()
        with torch.no_grad():
            model.vit.layers[0].mlp.fc1.weight.mul_(1.0 if trial is None else trial.params["scale"])
        return model

    run, try_with = searched(model_init, learning_rate=0.0)
    for scale in (2.0, 5.0):
        try_with(scale=scale)
        assert run.evaluate()["eval_rir"] == pytest.approx(1.0, rel=1e-6)


def test_optuna_searches(tiny, trainer):
    pytest.importorskip("optuna", reason="pip install optuna")
    best = trainer(model_init=lambda: tiny(), eval_strategy="steps", eval_steps=1).hyperparameter_search(
        hp_space=lambda trial: {"harmful_weight": trial.suggest_float("harmful_weight", 0.1, 1.0)},
        compute_objective=lambda metrics: metrics["eval_log10_rir"],
        direction="maximize",
        backend="optuna",
        n_trials=2,
    )
    assert isinstance(best, hf.trainer_utils.BestRun)
