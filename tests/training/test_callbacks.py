"""Runs stop where they should, go back where they should, and do the same after an interruption."""

import json
import math
import shutil
from functools import partial

import pytest
import torch

from hf_immunize import BenignUtilityCallback, TargetRIRCallback
from hf_immunize.errors import ArgumentError, CheckpointError
from hf_immunize.training.callbacks import benign_drops, rir_successes
from hf_immunize.training.checkpoints import by_step


FALLING = [0.90, 0.90, 0.89, 0.885, 0.86, 0.80, 0.95]  # more than two points lost at step 4
RISING = [0.0, 1.0, 3.1, 2.0, 3.2, 3.3, 3.4]

stop = BenignUtilityCallback
restore = partial(BenignUtilityCallback, action="restore")
BEST = {"metric_for_best_model": "accuracy"}


@pytest.fixture
def scripted(plain):
    """Make a plain Trainer whose evaluation at step k says what a script says."""

    def make(callback, accuracy=FALLING, rir=None, **options):
        def metrics(prediction):
            step = trainer.state.global_step
            found = {} if accuracy is None else {"accuracy": accuracy[step]}
            return found | ({} if rir is None else {"log10_rir": rir[step], "rir_is_upper_bound": 0.0})

        trainer = plain(callback, compute_metrics=metrics, **{"max_steps": 6, "eval_on_start": True} | options)
        return trainer

    return make


def same(model, folder):
    expected = type(model).from_pretrained(folder).state_dict()
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


# ---- what the log says ----


def accuracies(*values):
    return [{"step": step, "eval_accuracy": value} for step, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "baseline", "drops"),
    [
        ((0.9, 0.88, 0.95), None, {0: 0.0, 1: 2.0, 2: -5.0}),
        ((0.5,), 0.75, {0: 25.0}),
        ((0.9, math.nan), None, {0: 0.0, 1: math.inf}),
        ((), None, {}),
    ],
)
def test_drops_are_in_points_below_the_start_and_another_unit_is_refused(values, baseline, drops):
    assert benign_drops(accuracies(*values), baseline=baseline) == drops
    with pytest.raises(ArgumentError, match="found 90"):
        benign_drops(accuracies(90.0))


@pytest.mark.parametrize(
    ("value", "lower", "upper", "counts"),
    [(3, 0, 0, True), (2.9, 0, 0, False), (4, 1, 0, True), (4, 0, 1, False), (math.nan, 0, 0, False)],
)
def test_a_lower_bound_counts_and_an_upper_bound_does_not_and_the_last_value_of_a_step(value, lower, upper, counts):
    bounds = {"eval_rir_is_lower_bound": lower, "eval_rir_is_upper_bound": upper}
    log = [{"step": 0, "eval_log10_rir": 9.0 - value}, {"step": 0, "eval_log10_rir": value} | bounds]
    assert rir_successes(log, 1000.0) == {0: counts}


# ---- stopping ----


STOPS = {
    "too far": (stop, {}, 4),
    "at the limit": (stop, {"accuracy": [0.90] + [0.88] * 6}, 6),
    "metric without prefix": (partial(stop, metric="accuracy", max_drop_points=0.5), {}, 2),
    "given baseline": (partial(stop, baseline=0.93), {"eval_on_start": False}, 1),
    "target": (TargetRIRCallback, {"rir": RISING}, 2),
    "target with patience": (partial(TargetRIRCallback, patience=2), {"rir": RISING}, 5),
}


@pytest.mark.parametrize("case", list(STOPS))
def test_a_run_stops_at_its_step_and_says_so_once(case, scripted, warnings):
    callback, script, step = STOPS[case]
    run = scripted(callback(), **script)
    run.train()
    assert run.state.global_step == step
    assert [f"step {step}" in each for each in warnings] == ([] if step == 6 else [True])


def test_the_accuracy_of_one_of_several_sets_is_found_and_an_evaluation_afterwards_stops_nothing(scripted, images):
    run = scripted(stop(metric="eval_second_accuracy"), eval_dataset={"first": images(4, 5), "second": images(4, 6)})
    run.train()
    assert run.state.global_step == 4
    run.control.should_training_stop = False
    run.evaluate()
    assert not run.control.should_training_stop


def test_it_is_said_when_the_start_is_not_known(scripted, warnings):
    scripted(stop(), eval_on_start=False, max_steps=1).train()
    assert len(warnings) == 1 and "eval_on_start=True or pass baseline=" in warnings[0]


@pytest.mark.parametrize(
    ("callback", "options", "found"),
    [
        (stop, {"eval_strategy": "no"}, "eval_strategy='no'"),
        (TargetRIRCallback, {"eval_strategy": "no"}, "eval_strategy='no'"),
        (stop, {"accuracy": None}, r"Expected eval_accuracy.*eval_loss"),
        (TargetRIRCallback, {}, r"Expected eval_log10_rir.*eval_loss"),
        (restore, {"save_strategy": "no"}, "save_strategy='no'"),
        (restore, {"save_strategy": "best", "save_total_limit": 1, **BEST}, "save_total_limit=1"),
    ],
)
def test_what_a_callback_needs_is_missed_before_the_first_step(callback, options, found, scripted):
    run = scripted(callback(), **options)
    with pytest.raises(ArgumentError, match=found):
        run.train()
    assert run.state.global_step == 0


IMPOSSIBLE = [(stop, "max_drop_points", -1.0), (stop, "max_drop_points", math.nan), (stop, "action", "pause")]
IMPOSSIBLE += [(stop, "baseline", 90.0), (TargetRIRCallback, "metric", "eval_rir")]
IMPOSSIBLE += [(TargetRIRCallback, "target", value) for value in (0.0, math.inf)]
IMPOSSIBLE += [(TargetRIRCallback, "patience", value) for value in (0, 1.5)]


@pytest.mark.parametrize(("callback", "name", "value"), IMPOSSIBLE)
def test_impossible_values_are_refused_at_once(callback, name, value):
    with pytest.raises(ArgumentError, match=f"{name}="):
        callback(**{name: value})


# ---- going back ----


def test_going_back_loads_the_last_checkpoint_within_the_limit_and_the_state_says_so(scripted, tmp_path):
    run = scripted(restore(), save_total_limit=1)
    run.train()
    good = tmp_path / "run" / "checkpoint-3"
    assert run.state.global_step == 4 and same(run.model, good)
    assert run.state.best_model_checkpoint == str(good)
    assert run.state.log_history[-1] == {"returned_to_step": 3, "step": 4}
    # The weights beyond the limit are not saved as a checkpoint.
    assert list((tmp_path / "run").glob("checkpoint-*")) == [good]
    run.save_model(str(tmp_path / "final"))
    assert same(type(run.model).from_pretrained(tmp_path / "final"), good)


BY_RIR = {"metric_for_best_model": "log10_rir"}
EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 3}
BEYOND = {"rir": [0, 1.0, 2.0, 3.0, 9.0, 9.0, 9.0], **BY_RIR, "load_best_model_at_end": True}
RETURNS = {
    "by the user's metric": ({"rir": [0, 1.0, 3.0, 2.0, 9.0, 9.0, 9.0], **BY_RIR}, 2),
    "over a best model beyond the limit": (BEYOND, 3),
    "over a best model, all that is saved": (BEYOND | {"save_strategy": "best"}, 3),
    "by epoch": ({"accuracy": [0.9] * 5 + [0.5] * 8, **EPOCHS}, 4),
    "to one that was evaluated": ({"eval_steps": 2}, 2),
}


@pytest.mark.parametrize("case", list(RETURNS))
def test_a_run_goes_back_to_the_best_evaluated_checkpoint(case, scripted, tmp_path):
    options, step = RETURNS[case]
    run = scripted(restore(), **options)
    run.train()
    assert same(run.model, tmp_path / "run" / f"checkpoint-{step}")
    if "rir" in options:
        assert run.state.best_metric == options["rir"][step]


def test_a_checkpoint_that_was_cut_off_or_is_of_an_earlier_run_is_passed_over(scripted, at, tmp_path):
    def cut_off(state, control, model):
        if state.global_step == 3:
            (tmp_path / "run" / "checkpoint-3" / "trainer_state.json").unlink()

    scripted(stop(), max_steps=3).train()
    for run in (scripted(restore(), save_steps=2), scripted([at("on_save", cut_off), restore()])):
        run.train()
        assert same(run.model, tmp_path / "run" / "checkpoint-2")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CheckpointError, match="eval_accuracy fell"):  # without any
        scripted(restore(), accuracy=[0.9] + [0.5] * 6).train()


# ---- interrupted and resumed ----


CASES = {"stop": (stop, 4), "restore": (restore, 4), "target": (partial(TargetRIRCallback, patience=2), 5)}


@pytest.mark.parametrize(("last", "given_back"), [(1, False), (3, True)])
@pytest.mark.parametrize("case", list(CASES))
def test_a_resumed_run_stops_where_the_whole_run_did(case, last, given_back, scripted, tmp_path):
    make, expected = CASES[case]
    script = {"rir": RISING, "accuracy": FALLING if case != "target" else [0.9] * 7}
    whole = scripted(make(), **script)
    whole.train()
    for step in range(1, last + 1):  # the folder as it was when the run stopped
        shutil.copytree(tmp_path / "run" / f"checkpoint-{step}", tmp_path / "again" / f"checkpoint-{step}")
    options = {"restore_callback_states_from_checkpoint": given_back, "eval_on_start": False}
    resumed = scripted(make(), folder=tmp_path / "again", **script, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "again" / f"checkpoint-{last}"))
    assert whole.state.global_step == resumed.state.global_step == expected
    # Other weights are not resumed bit by bit: of a ViT, a plain Trainer leaves whole blocks as they were.
    if (case, last) == ("restore", 3):
        assert same(resumed.model, tmp_path / "run" / "checkpoint-3")
    state = json.loads((tmp_path / "run" / "checkpoint-1" / "trainer_state.json").read_text())
    assert list(state["stateful_callbacks"]) == ["TrainerControl"]


def test_a_run_resumed_beyond_the_limit_ends_after_one_step_and_goes_back(scripted, tmp_path, warnings):
    scripted(stop()).train()
    warnings.clear()
    resumed = scripted(restore(), accuracy=[*FALLING[:5], 0.5, 0.5])
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.state.global_step == 5 and "already at its end" in warnings[0]
    assert same(resumed.model, tmp_path / "run" / "checkpoint-3")


# ---- with the ImmunizationTrainer ----


def test_an_immunizing_run_stops_at_its_own_rir(trainer):
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1}
    free = trainer(**options)
    free.train()
    found = by_step(free.state.log_history, "eval_log10_rir")
    best = max(found, key=found.get)
    run = trainer(**options, callbacks=[TargetRIRCallback(10 ** (found[best] - 1e-6))])
    run.train()
    assert run.state.global_step == best
