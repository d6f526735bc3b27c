"""Checkpoints are whole or passed over, and what they lack or hold of another run is said."""

import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_immunize import files
from hf_immunize.errors import ArgumentError, CheckpointError, NonFiniteError
from hf_immunize.training import checkpoints
from hf_immunize.training.arguments import Method
from hf_immunize.training.checkpoints import (
    MANIFEST,
    STATE,
    check_restorable,
    last_whole_checkpoint,
    load_run_state,
    load_weights,
    save_run_state,
)
from hf_immunize.training.step import ImmunizationStep


FULL = OSError(28, "No space left on device")
FAILURES = [FULL, SafetensorError("I/O error: No space left on device"), RuntimeError("PytorchStreamWriter failed")]
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
DISTILLED = {"benign_loss": "distillation", "benign_budget": 0.05, "objective": "concentration"}
STEP_FILE, REFERENCES_FILE = "immunization_step.safetensors", "immunization_state.safetensors"


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# ---- saving a model ----


def fail_midway(monkeypatch, error):
    """Writing weights leaves half a file and then fails."""

    def save_pretrained(self, folder, **options):
        os.makedirs(folder, exist_ok=True)
        Path(folder, "config.json").write_text("{")
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(hf.PreTrainedModel, "save_pretrained", save_pretrained)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failed_save_leaves_the_saved_model_whole(error, trainer, tmp_path, monkeypatch):
    run = trainer()
    run.save_model(str(tmp_path / "model"))
    before = content(tmp_path)
    fail_midway(monkeypatch, error)
    for folder in ("model", "new/model"):
        with pytest.raises(CheckpointError, match=f"{folder}, found"):
            run.save_model(str(tmp_path / folder))
        assert content(tmp_path) == before and not list(tmp_path.rglob("_unfinished-*"))
    assert not (tmp_path / "new" / "model").exists()


# ---- writing checkpoints ----


@pytest.fixture
def at_two(at):
    """Make a callback that does something after the second step, before its checkpoint is written."""
    return lambda action: at("on_step_end", lambda state, control, model: action() if state.global_step == 2 else None)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failed_checkpoint_leaves_the_one_before_from_which_the_run_goes_on(error, trainer, at_two, monkeypatch):
    run = trainer(**CHECKPOINTS, callbacks=[at_two(lambda: fail_midway(monkeypatch, error))])
    with pytest.raises(CheckpointError, match="checkpoint-2") as caught:
        run.train()
    assert str(caught.value).count("Expected") == 1 and str(error) in str(caught.value)
    monkeypatch.undo()
    folder = Path(run.args.output_dir)
    assert last_whole_checkpoint(str(folder))[0] == str(folder / "checkpoint-1")
    assert not list(folder.rglob("_unfinished-*"))
    assert trainer(**CHECKPOINTS).train(resume_from_checkpoint=True).global_step == 3


def test_half_of_a_new_checkpoint_over_an_old_one_is_not_taken_for_whole(trainer, monkeypatch):
    trainer(**CHECKPOINTS | {"max_steps": 1}).train()

    def fail(*args):
        raise SafetensorError("I/O error")

    monkeypatch.setattr(checkpoints, "save_measurements", fail)
    again = trainer(**CHECKPOINTS, learning_rate=0.5)
    with pytest.raises(CheckpointError, match="checkpoint-1"):
        again.train()
    last, broken = last_whole_checkpoint(again.args.output_dir)
    assert last is None and list(broken) == [str(Path(again.args.output_dir) / "checkpoint-1")]


def test_weights_that_are_not_finite_are_not_saved(trainer, at_two):
    run = trainer(**CHECKPOINTS)

    def ruin():  # as an overflowing gradient would
        run.model.classifier.weight.data[0, 0] = float("nan")

    run.add_callback(at_two(ruin))
    with pytest.raises(NonFiniteError, match=r"classifier.weight"):
        run.train()
    last, _ = last_whole_checkpoint(run.args.output_dir)
    assert last is not None and last.endswith("checkpoint-1")
    sound = hf.AutoModelForImageClassification.from_pretrained(last)
    assert all(torch.isfinite(parameter).all() for parameter in sound.parameters())


@pytest.fixture
def disk(monkeypatch):
    """What was asked of the disk, in order: ("flush", path), ("replace", path) or ("remove", path)."""
    calls = []
    flush, replace, rmtree = files.flush, os.replace, shutil.rmtree

    def note(what, path, function, *args, **options):
        # What is staged counts as what it becomes.
        parts = [part for part in str(path).split("/") if what == "remove" or not part.startswith("_unfinished-")]
        calls.append((what, "/".join(parts)))
        return function(*args, **options)

    for module in (files, checkpoints):
        monkeypatch.setattr(module, "flush", lambda path: note("flush", path, flush, path))
    monkeypatch.setattr(os, "replace", lambda a, b: note("replace", b, replace, a, b))
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, *args, **options: note("remove", path, rmtree, path, *args, **options)
    )
    return lambda what, path: [index for index, call in enumerate(calls) if call == (what, str(path))]


@pytest.mark.parametrize("options", [{}, {"save_only_model": True}], ids=["all", "model"])
def test_a_checkpoint_is_on_disk_before_its_state_and_that_before_an_older_one_goes(options, trainer, disk):
    run = trainer(save_strategy="steps", save_steps=1, max_steps=2, save_total_limit=1, **options)
    run.train()
    old, new = (Path(run.args.output_dir) / f"checkpoint-{step}" for step in (1, 2))
    (appears,), (goes,) = disk("replace", new / STATE), disk("remove", old)
    written = [path for path in new.iterdir() if path.name not in (STATE, "training_args.bin")]
    assert {"model.safetensors", MANIFEST} <= {path.name for path in written} and not old.exists()
    flushed = [disk("flush", path)[-1] for path in written]
    names = disk("flush", new)
    assert any(max(flushed) < each < appears for each in names) and disk("flush", new / STATE)[0] < appears
    assert any(appears < each < goes for each in names)


def test_a_run_that_starts_removes_what_a_killed_one_was_writing_and_needs_a_folder_to_write_to(trainer):
    run, again = (trainer(**CHECKPOINTS | {"max_steps": 1}) for _ in range(2))
    left = [Path(run.args.output_dir) / name / "_unfinished-x" for name in (".", "checkpoint-1")]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    run.train()
    assert not any(folder.exists() for folder in left)
    shutil.rmtree(run.args.output_dir)
    Path(run.args.output_dir).write_text("no folder", encoding="utf-8")
    with pytest.raises(ArgumentError, match=r"output_dir.*run"):
        again.train()
    assert again.state.global_step == 0


# ---- finding one that is whole ----


@pytest.fixture(scope="module")
def two_checkpoints(trainer_in, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    trainer_in(folder, **CHECKPOINTS | {"max_steps": 2}).train()
    return folder


@pytest.fixture
def saved(two_checkpoints, tmp_path):
    """The folder of a run with two checkpoints, where `trainer` has its runs."""
    return Path(shutil.copytree(two_checkpoints, tmp_path / "run"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


RESUMED_FROM = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", STEP_FILE, REFERENCES_FILE]
RESUMED_FROM += [STATE, MANIFEST]
DAMAGES = {"missing": Path.unlink, "emptied": lambda path: path.write_bytes(b""), "flipped": flip}
CASES = [(name, damage) for name in RESUMED_FROM for damage in DAMAGES if (name, damage) != (MANIFEST, "missing")]


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_a_checkpoint_that_is_not_what_was_written_is_passed_over(name, damage, saved):
    DAMAGES[damage](saved / "checkpoint-2" / name)
    last, broken = last_whole_checkpoint(str(saved))
    assert last == str(saved / "checkpoint-1") and list(broken) == [str(saved / "checkpoint-2")]
    assert name in broken[str(saved / "checkpoint-2")]


def test_a_run_says_which_checkpoint_it_passes_over_and_refuses_to_resume_from_it(saved, trainer, warnings):
    for name in ("README.md", "immunization.json"):  # card and record may change
        (saved / "checkpoint-2" / name).write_text("{}")
    assert last_whole_checkpoint(str(saved)) == (str(saved / "checkpoint-2"), {})
    (saved / "checkpoint-2" / "optimizer.pt").unlink()
    run = trainer(**CHECKPOINTS)
    with pytest.raises(CheckpointError, match=r"checkpoint-2.*optimizer\.pt"):
        run.train(resume_from_checkpoint=str(saved / "checkpoint-2"))
    for given in (True, "checkpoint-7"):  # which are not there
        with pytest.raises(CheckpointError, match="found"):
            trainer(output_dir=str(saved / "empty")).train(resume_from_checkpoint=given)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 3
    assert [str(saved / "checkpoint-2") in each for each in warnings if "optimizer.pt" in each] == [True]


# ---- resuming ----


@pytest.fixture
def stopped(trainer, tmp_path):
    """Make a run of one step, and give the folder of its checkpoint."""

    def make(*without, **options):
        trainer(**CHECKPOINTS | {"max_steps": 1}, **options).train()
        folder = tmp_path / "run" / "checkpoint-1"
        for name in without:
            (folder / name).unlink()
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("without", "options"),
    [((STEP_FILE, MANIFEST), {}), ((MANIFEST,), {}), ((MANIFEST,), {"save_only_model": True})],
)
def test_a_run_goes_on_without_a_list_and_without_a_starting_model_where_none_is_needed(
    without, options, stopped, trainer, warnings
):
    lost = STEP_FILE in without or bool(options)
    run = trainer(max_steps=2, **options)
    run.train(resume_from_checkpoint=stopped(*without, **options))
    assert run.state.global_step == 2 and any(STEP_FILE in each for each in warnings) == lost
    if lost:
        shutil.rmtree(run.args.output_dir)
        folder = stopped(*without, **DISTILLED, **options)
        with pytest.raises(CheckpointError, match=rf"{STEP_FILE} in .*checkpoint-1"):
            trainer(max_steps=2, **DISTILLED).train(resume_from_checkpoint=folder)


def test_the_choice_is_not_made_anew(stopped, trainer, monkeypatch):
    chosen = {**DISTILLED, "objective": "dead_relu"}
    folder = stopped(model="resnet", **chosen)

    def sought(*args):
        raise AssertionError("a resumed run knows its choice")

    monkeypatch.setattr("hf_immunize.training.objectives.choke_points", sought)
    run = trainer("resnet", max_steps=2, **chosen)
    run.train(resume_from_checkpoint=folder)
    assert len(run._step.choice.reads) == 1


def test_other_settings_are_named_and_used(stopped, trainer, warnings):
    folder = stopped(objective="kappa", auto_weight_ratio=0.5, harmful_weight="0.3")
    trainer(max_steps=2, auto_weight_ratio="0.5", harmful_weight=0.3).train(resume_from_checkpoint=folder)
    assert not warnings
    run = trainer(max_steps=2, objective="r_ill", auto_weight_ratio=0.4, harmful_weight=0.3)
    run.train(resume_from_checkpoint=folder)
    assert "objective=r_ill (was kappa), auto_weight_ratio=0.4 (was 0.5)" in warnings[0]
    assert "r_well" not in run.state.log_history[-2]


@pytest.mark.parametrize("options", [{}, DISTILLED])
def test_another_scope_and_a_damaged_state_are_refused(options, stopped, trainer):
    folder = stopped(MANIFEST, **options)
    with pytest.raises(ArgumentError, match=r"checkpoint-1.*trainable="):
        trainer(max_steps=2, trainable="all", **options).train(resume_from_checkpoint=folder)
    state = load_file(Path(folder, STEP_FILE))
    del state["weighting/norm_weight"]  # as an older version wrote it
    save_file(state, Path(folder, STEP_FILE))
    with pytest.raises(CheckpointError, match=rf"norm_weight.*{STEP_FILE}.*version"):
        trainer(max_steps=2, **options).train(resume_from_checkpoint=folder)
    Path(folder, STEP_FILE).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=STEP_FILE):
        trainer(max_steps=2, **options).train(resume_from_checkpoint=folder)


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ((4, 2), (4, 2), None),
        ((4, 2), (8, 1), "drawn otherwise"),
        ((4, 2), (4, 1), "set per_device_train_batch_size=8"),
        ((4, 2), (3, 3), "run on 2 processes"),
    ],
)
def test_other_batches_and_processes_are_said(before, now, words, tiny, tmp_path, monkeypatch, warnings):
    """Images of a process and number of processes, when the run was stopped and when it goes on."""
    step = ImmunizationStep(tiny(), Method())
    monkeypatch.setattr(checkpoints, "world_size", lambda: before[1])
    save_run_state(str(tmp_path), step, {}, before[0])
    monkeypatch.setattr(checkpoints, "world_size", lambda: now[1])
    assert load_run_state(str(tmp_path), step, now[0]) == {}
    assert not warnings if words is None else words in warnings[0]


# ---- loading into the model in memory ----


class Own(torch.nn.Module):
    """A model that is none of transformers'."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3 * 8 * 8, 2)

    def forward(self, pixel_values, labels):
        logits = self.linear(pixel_values.flatten(1))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def with_adapter(model):
    targets = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][:2]
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, modules_to_save=["classifier"]))


KINDS = {"transformers": lambda tiny: tiny(), "peft": lambda tiny: with_adapter(tiny()), "own": lambda tiny: Own()}


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_weights_of_an_earlier_checkpoint_come_back_and_trainable_ones_stay_so(kind, tiny, plain, at, tmp_path):
    model, kept = KINDS[kind](tiny), []

    def keep(state, control, model):
        kept.append({name: value.clone() for name, value in model.state_dict().items()})

    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    plain(at("on_save", keep), model=model, eval_strategy="no").train()
    assert any(not torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    load_weights(model, str(tmp_path / "run" / "checkpoint-1"))
    torch.testing.assert_close(dict(model.state_dict()), kept[0], rtol=0, atol=0)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    for _ in range(2):  # a folder without weights, and one with those of another model
        with pytest.raises(CheckpointError, match="Expected the weights of this"):
            load_weights(model, str(tmp_path / "other"))
        tiny("resnet").save_pretrained(tmp_path / "other")


def test_weights_in_parts_cannot_be_gone_back_to(arguments, monkeypatch):
    check_restorable(arguments(save_strategy="steps"))
    monkeypatch.setattr(checkpoints, "sharded_weights", lambda: True)
    with pytest.raises(ArgumentError, match="sharded by FSDP or DeepSpeed"):
        check_restorable(arguments(save_strategy="steps"))
