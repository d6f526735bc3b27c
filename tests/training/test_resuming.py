"""What a checkpoint lacks, or holds of another run, is said."""

import os

import pytest

from hf_immunize.errors import ArgumentError, CheckpointError
from hf_immunize.training.checkpoints import MANIFEST


EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}
DISTILLED = {"benign_loss": "distillation", "benign_budget": 0.05, "objective": "concentration"}
STATE = "immunization_step.safetensors"


@pytest.fixture
def stopped(trainer, tmp_path):
    """Make a run of one step, and give the folder of its checkpoint."""

    def make(**options):
        trainer(max_steps=1, **EVERY_STEP, **options).train()
        return str(tmp_path / "run" / "checkpoint-1")

    return make


def said(caplog):
    return " ".join(record.getMessage() for record in caplog.records)


def as_of_a_plain_trainer(folder):
    for name in (STATE, MANIFEST):
        os.remove(os.path.join(folder, name))


def test_a_checkpoint_without_the_starting_model_is_refused(stopped, trainer):
    folder = stopped(**DISTILLED)
    as_of_a_plain_trainer(folder)
    with pytest.raises(CheckpointError, match=r"immunization_step\.safetensors in .*checkpoint-1.*start anew"):
        trainer(max_steps=2, **DISTILLED).train(resume_from_checkpoint=folder)


def test_a_checkpoint_of_weights_alone_is_refused(stopped, trainer):
    folder = stopped(save_only_model=True, **DISTILLED)
    with pytest.raises(CheckpointError, match="without save_only_model"):
        trainer(max_steps=2, **DISTILLED).train(resume_from_checkpoint=folder)


def test_where_no_starting_model_is_needed_the_loss_is_said(stopped, trainer, caplog):
    folder = stopped()
    as_of_a_plain_trainer(folder)
    run = trainer(max_steps=2)
    run.train(resume_from_checkpoint=folder)
    assert run.state.global_step == 2 and "start anew" in said(caplog)


def test_the_chosen_rectifiers_are_not_sought_anew(trainer, tmp_path, monkeypatch):
    chosen = {**DISTILLED, "objective": "auto", **EVERY_STEP}
    trainer("resnet", max_steps=1, **chosen).train()

    def sought(*args):
        raise AssertionError("a resumed run knows its rectifiers")

    monkeypatch.setattr("hf_immunize.training.choice.choke_points", sought)
    run = trainer("resnet", max_steps=2, **chosen)
    run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert run.objective == "silence"


def test_a_damaged_state_is_named(stopped, trainer):
    folder = stopped()
    os.remove(os.path.join(folder, MANIFEST))
    with open(os.path.join(folder, STATE), "wb") as file:
        file.write(b"damaged")
    with pytest.raises(CheckpointError, match=f"state of the immunization in .*{STATE}"):
        trainer(max_steps=2).train(resume_from_checkpoint=folder)


def test_other_settings_are_named_and_taken(stopped, trainer, caplog):
    folder = stopped(objective="kappa", queue_size=8)
    run = trainer(max_steps=2, objective="r_ill", queue_size=6)
    run.train(resume_from_checkpoint=folder)
    assert "objective=r_ill (was kappa), queue_size=6 (was 8)" in said(caplog)
    assert "r_well" not in run.state.log_history[-2]


def test_the_same_settings_say_nothing(stopped, trainer, caplog):
    folder = stopped(harmful_weight="0.3")
    trainer(max_steps=2, harmful_weight=0.3).train(resume_from_checkpoint=folder)
    assert "other settings" not in said(caplog)


@pytest.mark.parametrize("options", [{}, DISTILLED])
def test_another_scope_is_refused(options, stopped, trainer):
    folder = stopped(**options)
    with pytest.raises(ArgumentError, match=r"to move that moved when .*checkpoint-1.*trainable="):
        trainer(max_steps=2, trainable="all", **options).train(resume_from_checkpoint=folder)


def test_a_folder_that_is_not_there_is_named(trainer, tmp_path):
    with pytest.raises(CheckpointError, match=r"folder of a checkpoint .* found none at .*checkpoint-7"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
