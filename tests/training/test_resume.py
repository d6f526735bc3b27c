"""A run that was stopped and resumed is the run that was not stopped, bit for bit."""

import os
import shutil
import signal
import time

import pytest
import torch
from transformers import TrainerCallback

from hf_immunize.training.checkpoints import flaw


DISTILLED = {"objective": "time", "benign_loss": "distillation", "benign_budget": 0.1, "harmful_batch_size": 3}
RUNS = [
    ("vit", {}),
    ("resnet", {}),
    ("resnet", {"freeze_batchnorm": False}),
    # With directions and starting weights, and a set beside.
    ("vit", DISTILLED),
    ("resnet", {"benign_loss": "both", "gradient_accumulation_steps": 2}),
]


@pytest.fixture(scope="module")
def trainer(trainer_in, tiny, images):
    """Make a run of five steps, four to an epoch."""

    def make(name, folder, **options):
        model = tiny("vit", hidden_dropout_prob=0.2) if name == "vit" else tiny(name)
        sets = {"distillation_dataset": images(7, 5)} if "benign_budget" in options else {}
        sets |= {"train_dataset": images(17, 1), "harmful_dataset": images(9, 2)}
        return trainer_in(folder, model, max_steps=5, save_strategy="steps", save_steps=1, **sets, **options)

    return make


@pytest.fixture(scope="module", params=RUNS)
def whole(request, trainer, tmp_path_factory):
    """A run that nothing stopped."""
    name, options = request.param
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(name, folder, **options)
    run.train()
    return name, options, folder, run, run.evaluate()


def same(model, other):
    expected = other.state_dict()
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("last", "by_path"), [(2, True), (4, False)])
def test_a_resumed_run_is_the_whole_one(whole, last, by_path, trainer, tmp_path):
    name, options, folder, run, metrics = whole
    for step in range(1, last + 1):  # the folder as it was when the run stopped
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    torch.manual_seed(99)
    resumed = trainer(name, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{last}") if by_path else True)
    assert resumed.state.global_step == 5 and same(resumed.model, run.model)
    logs = [
        {entry["step"]: entry["loss"] for entry in each.state.log_history if "loss" in entry}
        for each in (run, resumed)
    ]
    assert logs[0] == logs[1]
    found = resumed.evaluate()
    names = [key for key in metrics if "kappa" in key or "rank" in key or "ratio" in key or "rir" in key]
    # As text, in which an undetermined RIR equals itself.
    assert "eval_rir" in names and [repr(found[key]) for key in names] == [repr(metrics[key]) for key in names]
    assert same(type(run.model).from_pretrained(folder / "checkpoint-5"), run.model)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
@pytest.mark.parametrize("event", ["on_step_begin", "on_prediction_step"])
def test_a_run_that_is_told_to_end_leaves_a_checkpoint_that_is_resumed(event, trainer, images, tmp_path):
    sets = {"eval_dataset": images(6, 3), "harmful_eval_dataset": images(6, 4)}
    evaluations = {"eval_strategy": "steps", "eval_steps": 2, "enable_jit_checkpoint": True}
    run = trainer("resnet", tmp_path, **sets, **evaluations)
    manager = next(each.jit_manager for each in run.callback_handler.callbacks if hasattr(each, "jit_manager"))
    manager.kill_wait = 0

    def tell(args, state, control, **kwargs):
        if state.global_step == 2 and not manager.is_checkpoint_requested:
            os.kill(os.getpid(), signal.SIGTERM)
            while not manager.is_checkpoint_requested:
                time.sleep(0.01)

    callback = TrainerCallback()
    setattr(callback, event, tell)
    run.add_callback(callback)
    run.train()
    assert run.state.global_step < 5 and flaw(tmp_path / "checkpoint-2") is None
    resumed, whole = trainer("resnet", tmp_path, **sets), trainer("resnet", tmp_path / "whole", **sets)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    whole.train()
    # Written within a step, its running means have seen the step's batch already.
    assert resumed.state.global_step == 5 and (same(resumed.model, whole.model) or event == "on_step_begin")
