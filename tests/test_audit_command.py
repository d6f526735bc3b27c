"""`hf-immunize audit` from the terminal."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from attacked import pictures, saved_images, tiny_vit
from transformers import ViTImageProcessorPil
from typer.testing import CliRunner

from hf_immunize.cli.audit import _data
from hf_immunize.cli.main import app
from hf_immunize.data.sources import HeldOut
from hf_immunize.errors import ArgumentError, CardError, RecordError, WeightsError
from hf_immunize.hub.card import attach_audit, plain
from hf_immunize.hub.load import hash_weights
from hf_immunize.hub.record import BaseModelRecord, ImmunizationRecord, MethodRecord, read_record, write_record


def saved(folder, seed):
    splits = {"train": pictures(24, seed + len("train")), "test": pictures(12, seed + len("test"))}
    return saved_images(folder, splits)


@pytest.fixture
def model(tmp_path):
    tiny_vit().save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_changed_budget_and_further_tasks_are_in_the_report(model, tmp_path):
    tasks = ("harmful", "benign", "unseen", "unrelated")
    given = [word for index, task in enumerate(tasks) for word in (f"--{task}", saved(tmp_path / task, index))]
    budget = ["--steps", "8", "--seeds", "1", "--max-images", "20"]
    out = ["--output-dir", str(tmp_path / "out"), "--attackers", "ridge,adamw", "--quick"]
    result = CliRunner().invoke(app, ["audit", model, "--reference", model, *given, *budget, *out])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "audit.json").read_text())["data"]
    assert set(found["tasks"]) == set(tasks)
    assert found["preset"] == "quick, changed"
    assert (found["budget"]["probe_steps"], found["budget"]["images_of_a_task"]) == (8, 20)
    assert (tmp_path / "out" / "outcomes.jsonl").exists()


def test_one_data_set_is_split_by_harmful_classes(tmp_path):
    asked = SimpleNamespace(harmful=None, benign=None, dataset=saved(tmp_path / "both", 0), label_column=None)
    asked.harmful_test = asked.benign_test = None
    asked.harmful_classes = ["c", "d"]
    harmful, benign = _data(asked, HeldOut)
    assert harmful.train.features["label"].names == ["c", "d"]
    assert benign.test.features["label"].names == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "--harmful"),
        (["--dataset", "y"], "--harmful-classes"),
        (["--harmful-test", "x", "--dataset", "y", "--harmful-classes", "a"], "--harmful"),
        (["--harmful", "x", "--benign-test", "y"], "--benign"),
        (["--dataset", "x", "--harmful-classes", "a", "--benign", "y"], "--benign"),
        (["--harmful", "x", "--harmful-classes", "a"], "--dataset"),
        (["--harmful", "x", "--attackers", ""], "attackers"),
        (["--harmful", "x", "--attackers", ","], "attackers"),
        (["--harmful", "x", "--quick", "--full"], "--quick"),
        (["--harmful", "x", "--steps", "0"], "steps"),
        (["--harmful", "x", "--seeds", "-1"], "seeds"),
        (["--harmful", "x", "--seed", "-1"], "seed"),
        (["--harmful", "x", "--test-fraction", "nan"], "fraction"),
        (["--harmful", "", "--quick"], "harmful"),
    ],
)
def test_what_would_do_nothing_or_the_impossible_is_one_sentence(model, tmp_path, words, named):
    result = CliRunner().invoke(app, ["audit", model, *words, "--output-dir", str(tmp_path / "out")])
    assert isinstance(result.exception, ArgumentError) and named in str(result.exception)
    assert not (tmp_path / "out").exists()


FOUND = {"preset": "quick", "preset_version": 1, "strongest": {"head_input": {"attacker": "AdamW", "accuracy": 0.5}}}


@pytest.fixture
def recorded(model):
    record = ImmunizationRecord(MethodRecord("kappa", "all", 1, 0), BaseModelRecord("user/base"))
    record.weights = hash_weights(model)
    write_record(model, record)
    return model


@pytest.mark.slow
def test_an_attached_audit_is_in_the_record_and_its_strongest_attackers_on_the_card(recorded, tmp_path):
    words = ["audit", recorded, "--harmful", saved(tmp_path / "harmful", 0), "--quick", "--attach", "--output-dir"]
    words += [str(tmp_path / "out"), "--attackers", "ridge,last_stage"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    strongest = read_record(recorded).audit.strongest
    names = {access: attack.attacker for access, attack in strongest.items()}
    ridge = "closed-form least squares (ridge)"
    assert names == {"head_input": ridge, "any_layer": ridge, "fine_tuning": "fine-tuning of the last stage"}
    card = (Path(recorded) / "README.md").read_text()
    assert all(plain(name) in card for name in names.values())
    assert f"{strongest['fine_tuning'].accuracy:.1%}" in card


def test_an_audit_that_has_ended_is_attached_by_its_command_without_another_attack(recorded, tmp_path, monkeypatch):
    words = ["audit", recorded, "--harmful", saved(tmp_path / "harmful", 0), "--quick", "--attackers", "ridge"]
    words += ["--output-dir", str(tmp_path / "out")]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0 and "--attach" in found.output and read_record(recorded).audit is None
    monkeypatch.setattr(sys.modules["hf_immunize.audit.run"], "guarded", lambda _: pytest.fail("attacked again"))
    found = CliRunner().invoke(app, [*words, "--attach"])
    assert found.exit_code == 0 and read_record(recorded).audit is not None


@pytest.mark.parametrize(("local", "error"), [(True, RecordError), (False, ArgumentError)])
def test_an_audit_is_attached_to_a_record_in_a_folder_only(model, local, error):
    result = CliRunner().invoke(app, ["audit", model if local else "user/model", "--harmful", "x", "--attach"])
    assert isinstance(result.exception, error)


def test_of_an_audit_that_cannot_be_attached_nothing_is_written(recorded):
    before = (Path(recorded) / "immunization.json").read_bytes()
    (Path(recorded) / "README.md").write_text("---\n: [\n---\nmine\n")
    with pytest.raises(CardError):
        attach_audit(recorded, FOUND)
    tiny_vit(seed=1).save_pretrained(recorded)
    with pytest.raises(WeightsError, match="has changed"):
        attach_audit(recorded, FOUND)
    assert (Path(recorded) / "immunization.json").read_bytes() == before
