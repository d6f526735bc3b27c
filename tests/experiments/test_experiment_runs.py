"""One command makes one row: on tiny images, with interruptions, and never from what other settings left."""

import json

import pytest
import torch
import yaml
from transformers import Trainer

from examples.experiments import attacks, backbones, run, tasks, training
from examples.experiments.__main__ import main
from examples.experiments.measure import ratios
from hf_immunize.errors import NonFiniteError
from hf_immunize.hub.record import read_record
from hf_immunize.training.objectives import DEFAULT
from hf_immunize.vision.loading import load_classifier


NAME = "tiny_arms-default-seed0"


@pytest.fixture
def words(tiny, images, tmp_path):
    """A command that is whole."""
    found = ["run", "--backbone", "tiny", "--task", "arms", "--settings", tiny(), "--data_path", str(images)]
    return [*found, "--output_dir", str(tmp_path / "runs")]


def row_of(tmp_path):
    return json.loads((tmp_path / "runs" / NAME / "row.json").read_text())


@pytest.mark.slow
def test_a_run_writes_its_row_card_and_figure(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "CARDS", tmp_path / "cards")
    assert main([*words, "--keep_card"]) == 0
    row, folder = row_of(tmp_path), tmp_path / "runs" / NAME
    assert row["objective"] == DEFAULT and row["title"] == "Tiny against arms"
    assert row["steps"] == 4 and row["settings"]["training"]["max_steps"] == 4
    assert row["images"]["benign"] == {"train": 42, "test": 18} and len(row["test_rows"].split()) == 18
    assert row["sources"]["harmful"] == "arms-3-of-5-classes" and row["sources"]["unseen"] == "arms-2-other-classes"
    # 18 images make no group of 100.
    assert set(row["ratios"]) == {"exact", "exact_unseen", "without_lost", "reference"}
    assert row["ratios"]["reference"] is None
    assert row["utility"]["interval"][0] <= row["utility"]["difference"] <= row["utility"]["interval"][1]
    harmful = row["probes"]["harmful"]
    assert set(row["probes"]) == {"harmful", "unseen", "unrelated"}
    assert harmful["any_layer"]["after"]["accuracy"] >= harmful["linear"]["after"]["accuracy"]
    assert harmful["chance"] == pytest.approx(1 / 3) and harmful["by_class"]["fine_tuning"] is None
    assert (folder / "spectra.png").stat().st_size > 1000
    assert row["seconds"]["attacks on the immunized model"] > 0 and row["resumed"] == []
    assert read_record(folder / "model").audit.strongest["head_input"] is not None
    said = capsys.readouterr().out
    assert f"{NAME}: benign" in said and f"harmful probe {100 * harmful['linear']['before']['accuracy']:.1f}%" in said
    assert str(tmp_path) not in json.dumps(row)
    card = tmp_path / "cards" / NAME
    assert read_record(card).audit is not None
    assert "spectra.png" in (card / "README.md").read_text() and (card / "spectra.png").is_file()
    assert f"[{NAME}]({NAME}/README.md)" in (tmp_path / "cards" / "README.md").read_text()


def cut_off(monkeypatch, after):
    """Interrupt the Trainer once, after so many steps; the list of the steps that were begun."""
    steps, step = [], Trainer.training_step

    def training_step(self, *args, **kwargs):
        if len(steps) == after and not (after_that := steps.count("cut")):
            steps.append("cut")
            raise KeyboardInterrupt(after_that)
        steps.append(self.state.global_step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return steps


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(words, tmp_path, monkeypatch):
    steps = cut_off(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        main(words)
    assert not (tmp_path / "runs" / NAME / "row.json").exists()
    attack, attacked = attacks.attack, []
    monkeypatch.setattr(attacks, "attack", lambda model, *rest: attacked.append(model) or attack(model, *rest))
    assert main(words) == 0
    assert steps == [0, 1, 2, "cut", 2, 3]  # step 2 was done after the last checkpoint
    assert row_of(tmp_path)["resumed"] == ["training, with measuring before and after"]
    # The starting model was attacked before the interruption.
    assert len(attacked) == 1 and attacked[0].endswith("model")
    # What is there is not made again.
    assert main(words) == 0 and len(steps) == 6


@pytest.fixture
def failing(monkeypatch, tmp_path):
    """A training that fails."""

    def fail(file, folder):
        raise NonFiniteError("Expected a finite loss, found NaN.")

    monkeypatch.setattr(training, "train", fail)
    monkeypatch.setattr(run, "_starting", lambda *args: tmp_path)


def test_other_settings_are_not_taken_for_these(failing, words, tiny, tmp_path, capsys):
    assert main(words) == 1
    tiny(training={"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True})
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "training.learning_rate: 0.001 → 0.01" in said and "--redo" in said
    kept = tmp_path / "runs" / NAME / "model" / "old"
    kept.parent.mkdir()
    kept.write_text("of the old settings")
    assert main([*words, "--redo"]) == 1 and "found NaN" in capsys.readouterr().err
    assert not kept.exists()
    assert yaml.safe_load((tmp_path / "runs" / NAME / "train.yaml").read_text())["learning_rate"] == 1e-2


def test_all_goes_on_after_a_run_that_fails(failing, words, tiny, tmp_path, capsys):
    entry = {"runs": {"tiny": ["arms"]}, "methods": ["default", "kappa_ours"], "seeds": [0]}
    tiny(plan=[entry])
    assert main(["all", *words[5:]]) == 1
    said = capsys.readouterr().err
    assert f"{NAME}, tiny_arms-kappa_ours-seed0 failed" in said and said.count("found NaN") == 2
    assert "found NaN" in (tmp_path / "runs" / NAME / "failed.json").read_text()


RECIPE = {
    "make": "trained",
    "image_size": 8,
    "config": {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
    "arguments": {"num_train_epochs": 2, "per_device_train_batch_size": 21, "use_cpu": True, "disable_tqdm": True},
}
RECIPE["config"] |= {"intermediate_size": 8, "image_size": 8, "patch_size": 4}


def test_a_starting_model_is_trained_once_and_its_training_resumes(run_of, monkeypatch):
    one = run_of(start=RECIPE)
    found = tasks.prepare(one)
    steps = cut_off(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        backbones.start_model(one, found)
    model, about = backbones.start_model(one, found)
    assert steps == [0, 1, 2, "cut", 2, 3] and about["resumed"]
    assert about["name"] == "tiny-seed0" and 0 <= about["accuracy"] <= 1
    assert backbones.start_model(one, found) == (model, about) and len(steps) == 6
    monkeypatch.setitem(backbones.MAKERS, "trained", lambda *args: pytest.fail("trained again"))
    with pytest.raises(pytest.fail.Exception):
        backbones.start_model(run_of(start={**RECIPE, "image_size": 9}), found)


def test_a_starting_model_that_has_seen_the_harmful_images_names_the_benign_classes_alone(run_of, monkeypatch):
    one, seen, shifted = run_of(start={**RECIPE, "also": ["harmful"]}), [], backbones.Shifted
    found = tasks.prepare(one)
    rows = {side: found.load(side, "train") for side in ("benign", "harmful")}
    monkeypatch.setattr(backbones, "Shifted", lambda pixels, labels: seen.append(labels) or shifted(pixels, labels))
    model, _ = backbones.start_model(one, found)
    benign, harmful = (torch.tensor(rows[side]["label"]) for side in ("benign", "harmful"))
    names = rows["benign"].features["label"].names
    assert torch.equal(seen[0], torch.cat([benign, harmful + len(names)]))
    loaded = load_classifier(model)
    assert list(loaded.config.id2label.values()) == names and loaded.classifier.out_features == len(names)
    assert backbones.start_model(run_of(start=RECIPE), found)[0] != model


def test_of_a_larger_head_the_first_rows_are_kept_and_all_else():
    more, fewer = (backbones.new_model(RECIPE["config"], list(names)) for names in ("abcde", "abc"))
    pixels = torch.rand(2, 3, 8, 8)
    cut = backbones.first_classes(more.eval(), fewer).eval()
    torch.testing.assert_close(cut(pixels).logits, more(pixels).logits[:, :3])


def test_lost_benign_images_are_counted_and_ratios_are_given_without_them():
    draw = torch.Generator().manual_seed(0)
    before = {side: torch.randn(30, 60, generator=draw) for side in ("benign", "harmful")}
    after = {side: features.clone() for side, features in before.items()}
    after["benign"][:2] *= 1e-3
    found = ratios(before, after)
    assert found["without_lost"]["lost"] == 2 and found["exact"]["benign_ratio"] > 1e4
    assert found["without_lost"]["benign_ratio"] == pytest.approx(1)
    assert ratios(before, before)["without_lost"] == {"lost": 0}
