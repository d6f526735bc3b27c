"""What is saved is whole, or as it was before."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors import SafetensorError
from transformers import AutoModelForImageClassification

from hf_immunize import files
from hf_immunize.errors import ArgumentError, CheckpointError, NonFiniteError
from hf_immunize.training import checkpoints as saving
from hf_immunize.training import run_state
from hf_immunize.training.checkpoints import MANIFEST, STATE, last_whole_checkpoint, load_weights


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
    last, broken = last_whole_checkpoint(str(folder))
    assert last is None and list(broken) == [str(folder / "checkpoint-1")]


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


def test_resuming_without_a_checkpoint_says_so(trainer):
    with pytest.raises(CheckpointError, match=r"Expected a whole checkpoint in .*found none"):
        trainer().train(resume_from_checkpoint=True)


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        hf.TrainerState().save_to_json(str(tmp_path / f"checkpoint-{step}" / "trainer_state.json"))
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "checkpoint-old").mkdir()
    (tmp_path / "checkpoint-100" / "trainer_state.json").write_text("[]")
    last, broken = last_whole_checkpoint(str(tmp_path))
    assert (last, list(broken)) == (str(tmp_path / "checkpoint-10"), [str(tmp_path / "checkpoint-100")])


class Disk:
    """What was asked of the disk, in order: ("flush", path), ("replace", path) or ("remove", path)."""

    def __init__(self, monkeypatch):
        self.calls = []
        flush, replace, rmtree = files.flush, os.replace, shutil.rmtree
        for module in (files, saving):
            monkeypatch.setattr(module, "flush", lambda path: (self.note("flush", path), flush(path)))
        monkeypatch.setattr(os, "replace", lambda a, b: (self.note("replace", b), replace(a, b)))
        monkeypatch.setattr(
            shutil, "rmtree", lambda p, *a, **k: (self.calls.append(("remove", str(p))), rmtree(p, *a, **k))
        )

    def note(self, what, path):
        # What is staged counts as what it becomes.
        self.calls.append((what, "/".join(p for p in str(path).split("/") if not p.startswith("_unfinished-"))))

    def all(self, what, path):
        return [i for i, call in enumerate(self.calls) if call == (what, str(path))]


@pytest.mark.parametrize("options", [{}, {"save_only_model": True}], ids=["all", "model"])
def test_a_checkpoint_is_on_disk_before_its_state_and_that_before_an_older_one_goes(options, trainer, monkeypatch):
    run = trainer(save_strategy="steps", save_steps=1, max_steps=2, save_total_limit=1, **options)
    disk = Disk(monkeypatch)
    run.train()
    old, new = (Path(run.args.output_dir) / f"checkpoint-{step}" for step in (1, 2))
    (appears,), (goes,) = disk.all("replace", new / STATE), disk.all("remove", old)
    written = [path for path in new.iterdir() if path.name not in (STATE, "training_args.bin")]
    assert {"model.safetensors", MANIFEST} <= {path.name for path in written} and not old.exists()
    flushed = [disk.all("flush", path)[-1] for path in written]
    names = disk.all("flush", new)
    assert any(max(flushed) < each < appears for each in names) and disk.all("flush", new / STATE)[0] < appears
    assert any(appears < each < goes for each in names)


RESUMED_FROM = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "immunization_step.safetensors"]
RESUMED_FROM += ["immunization_state.safetensors", STATE, MANIFEST]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {"missing": Path.unlink, "emptied": lambda path: path.write_bytes(b""), "flipped": flip}
CASES = [(name, damage) for name in RESUMED_FROM for damage in DAMAGES if (name, damage) != (MANIFEST, "missing")]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture
def saved(two_checkpoints, trainer, tmp_path):
    """The folder of a run with two checkpoints, where `trainer` has its runs."""
    if not list(two_checkpoints.iterdir()):
        trainer(output_dir=str(two_checkpoints), **CHECKPOINTS | {"max_steps": 2}).train()
    return Path(shutil.copytree(two_checkpoints, tmp_path / "run"))


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_a_checkpoint_that_is_not_what_was_written_is_passed_over(name, damage, saved, trainer):
    DAMAGES[damage](saved / "checkpoint-2" / name)
    last, broken = last_whole_checkpoint(str(saved))
    assert last == str(saved / "checkpoint-1") and list(broken) == [str(saved / "checkpoint-2")]
    assert name in broken[str(saved / "checkpoint-2")]
    with pytest.raises(CheckpointError, match=f"checkpoint-2.*{name}"):
        trainer().train(resume_from_checkpoint=str(saved / "checkpoint-2"))


def test_the_sentence_names_the_checkpoint_and_the_file(saved, trainer, monkeypatch):
    said = []
    monkeypatch.setattr(saving.logger, "warning", said.append)
    (saved / "checkpoint-2" / "optimizer.pt").unlink()
    run = trainer(**CHECKPOINTS)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 3
    assert [str(saved / "checkpoint-2") in each and "optimizer.pt" in each for each in said] == [True]


def test_card_and_record_may_change(saved):
    for name in ("README.md", "immunization.json"):
        (saved / "checkpoint-2" / name).write_text("{}")
    assert last_whole_checkpoint(str(saved)) == (str(saved / "checkpoint-2"), {})


OLDER = [
    # Files of a checkpoint without a list, and the one that is missed.
    (["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "immunization_step.safetensors"], None),
    (["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"], None),
    (["model.safetensors"], None),
    (["adapter_model.safetensors"], None),
    (["pytorch_model_fsdp_0/0.distcp", "optimizer_0/0.distcp", "scheduler.pt", "rng_state_0.pth"], None),
    (["optimizer.bin", "pytorch_model_fsdp.bin", "scheduler.pt", "rng_state_0.pth"], None),
    (["global_step2/mp_rank_00_model_states.pt", "latest", "rng_state_0.pth"], None),
    (["model.safetensors", "immunization_step.safetensors"], "optimizer.pt"),
    (["model.safetensors", "optimizer.pt", "rng_state.pth"], "scheduler.pt"),
    (["model.safetensors", "optimizer.pt", "scheduler.pt"], "rng_state.pth"),
    (["optimizer.pt", "scheduler.pt", "rng_state.pth"], "weights"),
    ([], "weights"),
]


@pytest.mark.parametrize(("names", "missed"), OLDER)
@pytest.mark.parametrize("emptied", [False, True])
def test_a_checkpoint_without_a_list_is_judged_by_its_files(names, missed, emptied, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    for name in names:
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(b"numbers")
    checkpoint.mkdir(exist_ok=True)
    if emptied and names:
        (checkpoint / names[0]).write_bytes(b"")
        missed = names[0]
    hf.TrainerState().save_to_json(str(checkpoint / STATE))
    last, broken = last_whole_checkpoint(str(tmp_path))
    assert (last is None) == (missed is not None)
    assert missed is None or missed in broken[str(checkpoint)]


@pytest.mark.parametrize("options", [{}, {"save_only_model": True}], ids=["all", "model"])
def test_a_run_goes_on_from_a_checkpoint_without_a_list(options, trainer):
    run = trainer(**CHECKPOINTS | {"max_steps": 2}, **options)
    run.train()
    (Path(run.args.output_dir) / "checkpoint-2" / MANIFEST).unlink()
    again = trainer(**CHECKPOINTS, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3


def test_a_run_that_starts_removes_what_a_killed_one_was_writing(trainer):
    run = trainer(**CHECKPOINTS)
    left = [Path(run.args.output_dir) / name / "_unfinished-x" for name in (".", "checkpoint-1")]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    run.train()
    assert not any(folder.exists() for folder in left)


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(trainer):
    run = trainer(**CHECKPOINTS)
    shutil.rmtree(run.args.output_dir)
    Path(run.args.output_dir).write_text("no folder", encoding="utf-8")
    with pytest.raises(ArgumentError, match=r"output_dir.*run"):
        run.train()
    assert run.state.global_step == 0


def test_a_full_disk_is_told_once(trainer, monkeypatch):
    run = trainer(**CHECKPOINTS, callbacks=[FailAt(2, lambda: fail_midway(monkeypatch, FULL))])
    with pytest.raises(CheckpointError) as caught:
        run.train()
    assert str(caught.value).count("Expected") == 1 and "No space left" in str(caught.value)


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
