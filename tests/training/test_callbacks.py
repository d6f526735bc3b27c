"""Runs stop where they should, go back where they should, and do the same after an interruption."""

import json
import shutil

import pytest
import torch
import transformers as hf

from hf_immunize import BenignUtilityCallback, TargetRIRCallback
from hf_immunize.errors import ArgumentError, CheckpointError
from hf_immunize.training import callbacks
from hf_immunize.training.checkpoints import by_step


FALLING = [0.90, 0.90, 0.89, 0.885, 0.86, 0.80, 0.95]  # more than two points lost at step 4
RISING = [0.0, 1.0, 3.1, 2.0, 3.2, 3.3, 3.4]


@pytest.fixture
def plain(tiny, images, tmp_path):
    """Make a plain Trainer whose evaluation at step k says what a script says."""

    def make(callback, accuracy=FALLING, rir=None, folder=None, model=None, **options):
        defaults = {
            "output_dir": str(folder or tmp_path / "run"),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "eval_on_start": True,
            "save_strategy": "steps",
            "save_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "logging_steps": 1,
        }

        def scripted(prediction):
            step = trainer.state.global_step
            found = {} if accuracy is None else {"accuracy": accuracy[step]}
            return found | ({} if rir is None else {"log10_rir": rir[step], "rir_is_upper_bound": 0.0})

        data = {"train_dataset": images(16, 1), "eval_dataset": images(8, 3)}
        each = callback if isinstance(callback, list) else [callback]
        args = hf.TrainingArguments(**(defaults | options))
        model = model if model is not None else tiny("vit", hidden_dropout_prob=0.2)
        trainer = hf.Trainer(model, args, **data, compute_metrics=scripted, callbacks=each)
        return trainer

    return make


@pytest.fixture
def warnings(monkeypatch):
    """What the callbacks warn of."""
    said = []
    monkeypatch.setattr(callbacks.logger, "warning", lambda message: said.append(message))
    return said


def same(model, folder):
    expected = type(model).from_pretrained(folder).state_dict()
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def stop(**options):
    return BenignUtilityCallback(**options)


def restore(**options):
    return BenignUtilityCallback(action="restore", **options)


# ---- stopping when benign accuracy falls ----


def test_a_run_stops_when_accuracy_has_fallen_too_far(plain, warnings):
    run = plain(stop())
    run.train()
    assert run.state.global_step == 4
    assert warnings == ["Stopping at step 4: eval_accuracy fell 4 points by step 4, more than the 2 allowed."]


def test_a_run_goes_on_while_accuracy_lies_at_the_limit(plain):
    run = plain(stop(), accuracy=[0.90] + [0.88] * 6)
    run.train()
    assert run.state.global_step == 6


def test_the_metric_may_be_named_as_for_the_best_model(plain):
    run = plain(stop(metric="accuracy", max_drop_points=0.5))
    run.train()
    assert run.state.global_step == 2


def test_a_given_baseline_takes_the_place_of_the_first_evaluation(plain):
    run = plain(stop(baseline=0.93), eval_on_start=False)
    run.train()
    assert run.state.global_step == 1


def test_it_is_said_when_the_starting_value_is_not_known(plain, warnings):
    plain(stop(), eval_on_start=False, max_steps=1).train()
    assert len(warnings) == 1 and "eval_on_start=True or pass baseline=" in warnings[0]


def test_an_accuracy_that_is_not_logged_is_missed_before_the_first_step(plain):
    run = plain(stop(), accuracy=None)
    with pytest.raises(ArgumentError, match=r"Expected eval_accuracy in the evaluations.*found .*eval_loss"):
        run.train()
    assert run.state.global_step == 0


def test_the_accuracy_of_one_of_several_evaluation_sets_is_found(plain, images):
    run = plain(stop(metric="eval_second_accuracy"))
    run.eval_dataset = {"first": images(4, 5), "second": images(4, 6)}
    run.train()
    assert run.state.global_step == 4


@pytest.mark.parametrize("callback", [stop(), TargetRIRCallback()])
def test_a_run_without_evaluations_is_refused(callback, plain):
    with pytest.raises(ArgumentError, match="Expected evaluations"):
        plain(callback, eval_strategy="no").train()


@pytest.mark.parametrize(
    "options",
    [
        {"max_drop_points": -1.0},
        {"max_drop_points": float("nan")},
        {"action": "pause"},
        {"baseline": 90.0},
        {"baseline": 101.0, "percent": True},
    ],
)
def test_impossible_limits_are_refused_at_once(options):
    with pytest.raises(ArgumentError, match="Expected"):
        BenignUtilityCallback(**options)


def test_an_evaluation_outside_of_training_stops_nothing(plain, warnings):
    run = plain(stop(baseline=0.95))
    run.evaluate()
    assert warnings == [] and not run.control.should_training_stop


# ---- going back ----


def test_going_back_loads_the_last_checkpoint_within_the_limit(plain, tmp_path):
    run = plain(restore())
    run.train()
    assert run.state.global_step == 4 and same(run.model, tmp_path / "run" / "checkpoint-3")


def test_what_is_saved_after_going_back_are_the_good_weights(plain, tmp_path):
    run = plain(restore())
    run.train()
    run.save_model(str(tmp_path / "final"))
    assert same(type(run.model).from_pretrained(tmp_path / "final"), tmp_path / "run" / "checkpoint-3")


def test_the_state_says_where_the_weights_are_from(plain, tmp_path):
    run = plain(restore())
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-3")
    assert run.state.log_history[-1] == {"returned_to_step": 3, "step": 4}


def test_weights_beyond_the_limit_are_not_saved_as_a_checkpoint(plain, tmp_path):
    plain(restore(), save_total_limit=1).train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]


def test_going_back_takes_the_best_by_the_users_metric(plain, tmp_path):
    run = plain(restore(), rir=[0, 1.0, 3.0, 2.0, 9.0, 9.0, 9.0], metric_for_best_model="log10_rir")
    run.train()
    assert same(run.model, tmp_path / "run" / "checkpoint-2") and run.state.best_metric == 3.0


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_going_back_overrules_a_best_model_beyond_the_limit(strategy, plain, tmp_path):
    options = {"metric_for_best_model": "log10_rir", "load_best_model_at_end": True, "save_strategy": strategy}
    run = plain(restore(), rir=[0, 1.0, 2.0, 3.0, 9.0, 9.0, 9.0], **options)
    run.train()
    assert run.state.global_step == 4 and same(run.model, tmp_path / "run" / "checkpoint-3")


def test_by_epoch_a_run_goes_back_too(plain, tmp_path):
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 3}
    run = plain(restore(), accuracy=[0.9] * 5 + [0.5] * 8, **options)
    run.train()
    assert run.state.global_step == 8 and same(run.model, tmp_path / "run" / "checkpoint-4")


def test_checkpoints_that_were_not_evaluated_are_passed_over(plain, tmp_path):
    run = plain(restore(), eval_steps=2)
    run.train()
    assert run.state.global_step == 4 and same(run.model, tmp_path / "run" / "checkpoint-2")


def test_a_checkpoint_that_was_cut_off_is_passed_over(plain, tmp_path):
    class CutOff(hf.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 3:
                (tmp_path / "run" / "checkpoint-3" / "trainer_state.json").unlink()

    run = plain([CutOff(), restore()])
    run.train()
    assert same(run.model, tmp_path / "run" / "checkpoint-2")


def test_a_checkpoint_of_an_earlier_run_is_passed_over(plain, tmp_path):
    plain(stop(), max_steps=3).train()
    run = plain(restore(), save_steps=2, eval_steps=1)
    run.train()
    assert same(run.model, tmp_path / "run" / "checkpoint-2")


def test_without_a_checkpoint_to_go_back_to_the_run_ends_with_an_error(plain):
    with pytest.raises(CheckpointError, match=r"Expected a checkpoint in .* found none, while eval_accuracy fell"):
        plain(restore(), accuracy=[0.9] + [0.5] * 6).train()


@pytest.mark.parametrize(
    "options",
    [
        {"save_strategy": "no"},
        {"save_strategy": "best", "save_total_limit": 1, "metric_for_best_model": "accuracy"},
    ],
)
def test_going_back_without_checkpoints_to_go_back_to_is_refused_before_training(options, plain):
    run = plain(restore(), **options)
    with pytest.raises(ArgumentError, match="action='restore'"):
        run.train()
    assert run.state.global_step == 0


# ---- stopping at a target ----


def test_a_run_stops_when_rir_has_reached_the_target(plain, warnings):
    run = plain(TargetRIRCallback(1000.0), rir=RISING)
    run.train()
    assert run.state.global_step == 2
    assert warnings == ["Stopping at step 2: log10 RIR was 3.100 at step 2, at or above the target of 3.000."]


def test_with_patience_the_target_must_be_held(plain):
    run = plain(TargetRIRCallback(1000.0, patience=2), rir=RISING)
    run.train()
    assert run.state.global_step == 5


def test_a_target_reached_at_the_cost_of_accuracy_does_not_count(plain):
    accuracy = [0.9, 0.9, 0.8, 0.8, 0.8, 0.89, 0.9]
    run = plain(TargetRIRCallback(1000.0, max_drop_points=2.0), rir=RISING, accuracy=accuracy)
    run.train()
    assert run.state.global_step == 5


def test_a_run_that_logs_no_rir_is_refused_before_the_first_step(plain):
    run = plain(TargetRIRCallback())
    with pytest.raises(ArgumentError, match="Expected eval_log10_rir in the evaluations"):
        run.train()
    assert run.state.global_step == 0


def test_it_is_said_when_the_best_model_is_chosen_by_another_metric(plain, warnings):
    plain(TargetRIRCallback(), rir=RISING, max_steps=1, load_best_model_at_end=True).train()
    assert len(warnings) == 1 and "metric_for_best_model='log10_rir'" in warnings[0]


@pytest.mark.parametrize(
    "options",
    [
        {"target": 0.0},
        {"target": float("inf")},
        {"patience": 0},
        {"patience": 1.5},
        {"metric": "eval_rir"},
        {"max_drop_points": -1.0},
    ],
)
def test_impossible_targets_are_refused_at_once(options):
    with pytest.raises(ArgumentError, match="Expected"):
        TargetRIRCallback(**options)


# ---- interrupted and resumed ----


CASES = {
    "stop": (stop, 4),
    "restore": (restore, 4),
    "target": (lambda: TargetRIRCallback(1000.0, patience=2), 5),
}


@pytest.mark.parametrize("given_back", [False, True])
@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("case", list(CASES))
def test_a_resumed_run_stops_where_the_whole_run_did(case, last, given_back, plain, tmp_path):
    make, expected = CASES[case]
    script = {"rir": RISING, "accuracy": FALLING if case != "target" else [0.9] * 7}
    whole = plain(make(), **script)
    whole.train()
    for step in range(1, last + 1):
        shutil.copytree(tmp_path / "run" / f"checkpoint-{step}", tmp_path / "again" / f"checkpoint-{step}")
    options = {"restore_callback_states_from_checkpoint": given_back, "eval_on_start": False}
    resumed = plain(make(), folder=tmp_path / "again", **script, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "again" / f"checkpoint-{last}"))
    assert whole.state.global_step == resumed.state.global_step == expected


def test_a_resumed_run_goes_back_to_the_same_weights(plain, tmp_path):
    whole = plain(restore())
    whole.train()
    shutil.copytree(tmp_path / "run" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    resumed = plain(restore(), folder=tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-3"))
    assert same(resumed.model, tmp_path / "run" / "checkpoint-3")


def test_evaluating_again_on_resuming_is_not_counted_twice(plain, tmp_path):
    options = {"rir": [0.0, 3.1, 2.0, 3.2, 3.3, 3.4, 3.5], "accuracy": [0.9] * 7}
    plain(TargetRIRCallback(patience=2), **options, max_steps=1).train()
    resumed = plain(TargetRIRCallback(patience=2), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert resumed.state.global_step == 4


def test_a_run_resumed_beyond_the_limit_ends_after_one_step(plain, tmp_path, warnings):
    plain(stop()).train()
    warnings.clear()
    resumed = plain(stop())
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.state.global_step == 5 and "already at its end" in warnings[0]


def test_a_run_resumed_beyond_the_limit_goes_back_from_there(plain, tmp_path):
    plain(stop()).train()
    resumed = plain(restore(), accuracy=[*FALLING[:5], 0.5, 0.5])
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert same(resumed.model, tmp_path / "run" / "checkpoint-3")


def test_nothing_is_added_to_the_stateful_callbacks_of_a_checkpoint(plain, tmp_path):
    plain([stop(), TargetRIRCallback()], rir=RISING, max_steps=1).train()
    state = json.loads((tmp_path / "run" / "checkpoint-1" / "trainer_state.json").read_text())
    assert list(state["stateful_callbacks"]) == ["TrainerControl"]


# ---- with the ImmunizationTrainer ----


def test_an_immunizing_run_stops_at_its_own_rir(trainer):
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    free = trainer(**options)
    free.train()
    found = by_step(free.state.log_history, "eval_log10_rir")
    first = next(step for step in found if step and found[step] > 0)
    run = trainer(**options, callbacks=[TargetRIRCallback(10 ** (found[first] - 1e-6))])
    run.train()
    assert run.state.global_step == first


def test_an_immunizing_run_goes_back_when_accuracy_falls(trainer, tmp_path):
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    said = iter([0.9, 0.9, 0.5])
    run = trainer(**options, compute_metrics=lambda prediction: {"accuracy": next(said)}, callbacks=[restore()])
    run.train()
    assert run.state.global_step == 3 and same(run.model, tmp_path / "run" / "checkpoint-2")
