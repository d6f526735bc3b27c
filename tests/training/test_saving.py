"""What is saved is whole, or as it was before."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors import SafetensorError
from transformers import AutoModelForImageClassification

from hf_immunize.errors import CheckpointError, NonFiniteError
from hf_immunize.training import run_state, saving
from hf_immunize.training.saving import last_whole_checkpoint, load_weights, staged_directory


FULL = OSError(28, "No space left on device")
FAILURES = [FULL, SafetensorError("I/O error: No space left on device"), RuntimeError("PytorchStreamWriter failed")]


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def fail_midway(monkeypatch, error):
    """Writing weights leaves half a file and then fails."""

    def save_pretrained(self, folder, **options):
        os.makedirs(folder, exist_ok=True)
        Path(folder, "config.json").write_text("{")
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(hf.PreTrainedModel, "save_pretrained", save_pretrained)


@pytest.mark.parametrize("name", ["vit", "resnet", "mobilenet_v2"])
def test_what_is_saved_is_loaded_by_the_auto_class(name, tiny, trainer, tmp_path):
    run = trainer(tiny(name))
    run.train()
    run.save_model(str(tmp_path / "model"))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded.state_dict(), run.model.state_dict(), rtol=0, atol=0)


def test_the_image_processor_is_saved_too(trainer, tmp_path):
    processor = hf.ViTImageProcessor(size={"height": 8, "width": 8})
    trainer(processing_class=processor).save_model(str(tmp_path / "model"))
    assert hf.AutoImageProcessor.from_pretrained(tmp_path / "model").size == processor.size


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failed_save_leaves_the_saved_model_whole(error, trainer, tmp_path, monkeypatch):
    run = trainer()
    run.save_model(str(tmp_path / "model"))
    before = content(tmp_path)
    fail_midway(monkeypatch, error)
    with pytest.raises(CheckpointError, match=r"model, found: .*untouched"):
        run.save_model(str(tmp_path / "model"))
    assert content(tmp_path) == before and not list(tmp_path.rglob("_unfinished-*"))


def test_a_first_save_that_fails_leaves_nothing(trainer, tmp_path, monkeypatch):
    run = trainer()
    fail_midway(monkeypatch, FULL)
    with pytest.raises(CheckpointError):
        run.save_model(str(tmp_path / "new" / "model"))
    assert not (tmp_path / "new" / "model").exists() and not content(tmp_path)


class FailAt(hf.TrainerCallback):
    """Let everything that is written from a step on fail."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


CHECKPOINTS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failed_checkpoint_leaves_the_one_before(error, trainer, monkeypatch):
    run = trainer(**CHECKPOINTS, callbacks=[FailAt(2, lambda: fail_midway(monkeypatch, error))])
    with pytest.raises(CheckpointError, match=r"checkpoint-2.*resume"):
        run.train()
    monkeypatch.undo()
    folder = Path(run.args.output_dir)
    assert last_whole_checkpoint(str(folder))[0] == str(folder / "checkpoint-1")
    AutoModelForImageClassification.from_pretrained(folder / "checkpoint-1")
    assert not list(folder.rglob("_unfinished-*"))


def test_a_run_goes_on_after_a_failed_checkpoint(trainer, monkeypatch):
    run = trainer(**CHECKPOINTS, callbacks=[FailAt(2, lambda: fail_midway(monkeypatch, FULL))])
    with pytest.raises(CheckpointError):
        run.train()
    monkeypatch.undo()
    assert trainer(**CHECKPOINTS).train(resume_from_checkpoint=True).global_step == 3


def test_failing_to_write_the_references_is_named(trainer, monkeypatch):
    def fail(*args):
        raise SafetensorError("I/O error")

    monkeypatch.setattr(run_state, "save_measurements", fail)
    with pytest.raises(CheckpointError, match="checkpoint-1"):
        trainer(**CHECKPOINTS).train()


def test_half_of_a_new_checkpoint_over_an_old_one_is_not_taken_for_whole(trainer, monkeypatch):
    trainer(**CHECKPOINTS).train()

    def fail(*args):
        raise FULL

    monkeypatch.setattr(run_state, "save_measurements", fail)
    again = trainer(**CHECKPOINTS, learning_rate=0.5)
    with pytest.raises(CheckpointError):
        again.train()
    folder = Path(again.args.output_dir)
    for later in (2, 3):
        shutil.rmtree(folder / f"checkpoint-{later}")
    assert last_whole_checkpoint(str(folder)) == (None, [str(folder / "checkpoint-1")])


class Ruin(hf.TrainerCallback):
    """Let a step leave a NaN in the weights, as an overflowing gradient would."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.classifier.weight.data[0, 0] = float("nan")


def test_weights_that_are_not_finite_are_not_saved(trainer):
    run = trainer(**CHECKPOINTS, callbacks=[Ruin()])
    with pytest.raises(NonFiniteError, match=r"classifier.weight"):
        run.train()
    last, _ = last_whole_checkpoint(run.args.output_dir)
    assert last is not None and last.endswith("checkpoint-1")
    sound = AutoModelForImageClassification.from_pretrained(last)
    assert all(torch.isfinite(parameter).all() for parameter in sound.parameters())


def test_files_appear_all_at_once(tmp_path):
    with staged_directory(tmp_path / "model") as staging:
        (staging / "deep").mkdir()
        (staging / "deep" / "a").write_text("a")
        assert not (tmp_path / "model" / "deep").exists()
    assert content(tmp_path / "model") == {Path("deep/a"): b"a"}


def test_other_files_stay(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with staged_directory(tmp_path) as staging:
        (staging / "a").write_text("a")
    assert content(tmp_path) == {Path("notes"): b"mine", Path("a"): b"a"}


def test_files_are_moved_within_the_target_which_may_be_a_mount(tmp_path):
    with staged_directory(tmp_path / "model") as staging:
        assert staging.parent == tmp_path / "model"


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(CheckpointError, match="model"), staged_directory(tmp_path / "model"):
        pass


def test_errors_of_another_kind_pass_and_leave_nothing(tmp_path):
    with pytest.raises(KeyError), staged_directory(tmp_path / "model"):
        raise KeyError("x")
    assert not list(tmp_path.iterdir())


def test_resuming_without_a_checkpoint_says_so(trainer):
    with pytest.raises(CheckpointError, match=r"Expected a whole checkpoint in .*found none"):
        trainer().train(resume_from_checkpoint=True)


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        hf.TrainerState().save_to_json(str(tmp_path / f"checkpoint-{step}" / "trainer_state.json"))
    (tmp_path / "checkpoint-old").mkdir()
    (tmp_path / "checkpoint-100" / "trainer_state.json").write_text("[]")
    last, broken = last_whole_checkpoint(str(tmp_path))
    assert (last, broken) == (str(tmp_path / "checkpoint-10"), [str(tmp_path / "checkpoint-100")])


def test_weights_of_another_model_are_refused(tiny, tmp_path):
    tiny("resnet").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="weights of this ViTForImageClassification"):
        load_weights(tiny(), str(tmp_path))


def test_every_saved_weight_is_loaded(tiny, tmp_path):
    saved, other = tiny(), tiny()
    for parameter in saved.parameters():
        parameter.data += 1
    saved.save_pretrained(tmp_path)
    saving.load_weights(other, str(tmp_path))
    torch.testing.assert_close(other.state_dict(), saved.state_dict(), rtol=0, atol=0)
