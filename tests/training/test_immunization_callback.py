"""The callback adds to a plain Trainer what ImmunizationTrainer computes."""

import pytest
import transformers as hf

from hf_immunize.errors import ArgumentError, CheckpointError, DataError, HeadError
from hf_immunize.training.immunization_callback import ImmunizationCallback
from hf_immunize.vision.scope import select_trainable


FIXED = {"benign_weight": 0.5, "harmful_weight": 2.0}
PAPER = {"objective": "kappa", "benign_loss": "task"}


@pytest.fixture
def beside(plain, tiny, images):
    """Make a plain Trainer with the callback on a tiny model whose last stage is trainable."""

    def make(callback, *extra, count=4, model="vit", **options):
        model = tiny(model) if isinstance(model, str) else model
        select_trainable(model, "last_stage")
        size = 32 if model.config.model_type == "mobilenet_v2" else 8
        options = {"save_strategy": "no", "eval_strategy": "no"} | options
        return plain([callback, *extra], model=model, train_dataset=images(count, 1, size), **options)

    return make


def largest_difference(first, second):
    """Relative to the largest number."""
    assert first.keys() == second.keys()
    largest = max(first[name].abs().max().item() for name in first)
    return max((first[name] - second[name]).abs().max().item() for name in first) / largest


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 1e-3}])
def test_gradients_are_those_of_the_immunization_trainer(options, beside, trainer, images, gradients):
    """All four images of a side are in each batch, so both see the same whatever their order."""
    harmful = images(4, 2, labels=False)
    given = {"max_grad_norm": 0.0} | options
    beside(ImmunizationCallback(harmful, **PAPER, **FIXED), gradients, max_steps=1, **given).train()
    data = {"train_dataset": images(4, 1), "harmful_dataset": harmful}
    data |= {"eval_dataset": None, "harmful_eval_dataset": None}
    trainer(**data, **FIXED, **given, max_steps=1, callbacks=[gradients]).train()
    assert largest_difference(*gradients.steps) < 1e-6


def test_accumulation_adds_the_regularizers_once(beside, images, gradients):
    for accumulation in (1, 2):
        callback = ImmunizationCallback(images(4, 2, labels=False), **PAPER, **FIXED, batch_size=4)
        options = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
        beside(callback, gradients, max_steps=1, max_grad_norm=0.0, **options).train()
    assert largest_difference(*gradients.steps) < 1e-6


def test_running_statistics_are_those_of_the_plain_run_and_so_are_modes(beside, images):
    harmful = images(4, 2, 32, labels=False)
    first = []
    for callback in (ImmunizationCallback(harmful, **PAPER, **FIXED), hf.TrainerCallback()):
        run = beside(callback, model="mobilenet_v2", learning_rate=0.0)
        run.train()
        first.append(dict(run.model.named_buffers()))
        assert all(module.training for module in run.model.modules())
    assert largest_difference(*first) == 0


@pytest.mark.parametrize("stopped", [1, 3])
def test_a_resumed_run_ends_where_the_straight_one_does(stopped, beside, images, at, tmp_path):
    def stop(state, control, model):
        control.should_training_stop = state.global_step == stopped

    def run(folder, *extra):
        callback = ImmunizationCallback(
            images(7, 2, labels=False), distillation_dataset=images(5, 3, labels=False), benign_budget=0.1
        )
        return beside(callback, *extra, count=12, max_steps=5, save_strategy="steps", folder=folder)

    straight, interrupted = run(tmp_path / "a"), run(tmp_path / "b", at("on_step_end", stop))
    straight.train()
    interrupted.train()
    resumed = run(tmp_path / "b")
    resumed.train(resume_from_checkpoint=True)
    assert largest_difference(straight.model.state_dict(), resumed.model.state_dict()) == 0


def test_a_checkpoint_without_its_state_is_refused(beside, images):
    options = {"save_strategy": "steps", "save_steps": 1}
    beside(hf.TrainerCallback(), **options).train()
    run = beside(ImmunizationCallback(images(4, 2, labels=False)), max_steps=4, **options)
    with pytest.raises(CheckpointError, match="written with this callback"):
        run.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("harmful", "options"), [(4, {"per_device_train_batch_size": 1}), (0, {})])
def test_too_few_images_are_refused(harmful, options, beside, images):
    with pytest.raises(DataError):
        beside(ImmunizationCallback(images(harmful)), **options).train()


def test_columns_can_be_named_and_labels_are_needed_by_losses_that_read_them(beside, images):
    rows = [{"photo": row["pixel_values"], "kind": row["labels"]} for row in images(8, 2)]
    names = {"image_column_name": "photo", "label_column_name": "kind"}
    run = beside(ImmunizationCallback(rows, rows, objective="imma", benign_loss="task", **names))
    run.train()
    assert "negative_adapted_loss" in run.state.log_history[0]
    data = images(4, 2, labels=False), images(8, 5, labels=False)
    run = beside(ImmunizationCallback(*data))
    run.train()
    assert "kl" in run.state.log_history[0]
    with pytest.raises(DataError, match=r"In benign_dataset: .*label.*found none"):
        beside(ImmunizationCallback(*data, **PAPER)).train()


def test_a_setting_a_model_or_a_trainer_that_cannot_be_is_refused(beside, trainer, images, tiny):
    with pytest.raises(ArgumentError, match="objectives"):
        ImmunizationCallback(images(4), objectives="kappa")
    with pytest.raises(HeadError, match="one label an image"):
        beside(ImmunizationCallback(images(4)), model=tiny(problem_type="multi_label_classification")).train()
    with pytest.raises(ArgumentError, match="Leave ImmunizationCallback out"):
        trainer(callbacks=[ImmunizationCallback(images(4))]).train()
