"""One command makes one row: on tiny images, with interruptions, and never from what other settings left."""

import json

import pytest
import yaml
from networks_fixtures import TRAINING, experiment
from transformers import Trainer
from typer.testing import CliRunner

from examples.networks import cards, data, models, probes, training
from examples.networks.__main__ import main
from hf_immunize.cli import main as cli
from hf_immunize.errors import NonFiniteError
from hf_immunize.hub.record import read_record


@pytest.fixture
def words(tiny, images, tiny_model, tmp_path):
    """A command that is whole."""
    found = ["run", "--experiment", str(tiny), "--model", str(tiny_model), "--data_path", str(images)]
    return [*found, "--output_dir", str(tmp_path / "runs")]


def row_of(tmp_path, name="tiny-default-seed0"):
    return json.loads((tmp_path / "runs" / name / "row.json").read_text())


@pytest.mark.slow
def test_a_run_writes_its_row_card_and_figure(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cards, "CARDS", tmp_path / "cards")
    assert main([*words, "--keep_card"]) == 0
    row, folder = row_of(tmp_path), tmp_path / "runs" / "tiny-default-seed0"
    assert row["objective"] == "concentration"
    assert row["steps"] == 4 and row["settings"]["training"]["max_steps"] == 4
    assert row["images"]["benign"] == {"train": 42, "test": 18} and len(row["test_rows"].split()) == 18
    assert row["sources"]["harmful"] == "arms-3-of-5-classes" and row["sources"]["unseen"] == "arms-2-other-classes"
    # 18 images make no group of 100.
    assert (
        set(row["ratios"]) == {"exact", "exact_unseen", "without_lost", "reference"}
        and row["ratios"]["reference"] is None
    )
    assert row["utility"]["interval"][0] <= row["utility"]["difference"] <= row["utility"]["interval"][1]
    harmful = row["probes"]["harmful"]
    assert set(row["probes"]) == {"harmful", "unseen", "unrelated"}
    assert harmful["any_layer"]["after"]["accuracy"] >= harmful["linear"]["after"]["accuracy"]
    assert harmful["chance"] == pytest.approx(1 / 3) and harmful["by_class"]["fine_tuning"] is None
    assert (folder / "spectra.png").stat().st_size > 1000
    assert row["seconds"]["attacks on the immunized model"] > 0 and row["resumed"] == []
    assert read_record(folder / "model").audit.strongest["head_input"] is not None
    assert "tiny-default-seed0: benign" in capsys.readouterr().out
    assert str(tmp_path) not in json.dumps(row)
    card = (tmp_path / "cards" / "tiny-default-seed0" / "README.md").read_text()
    checked = CliRunner().invoke(cli.app, ["card", str(tmp_path / "cards" / "tiny-default-seed0"), "--check"])
    assert checked.exit_code == 0, checked.output
    assert "spectra.png" in card and (tmp_path / "cards" / "tiny-default-seed0" / "spectra.png").is_file()
    assert "[tiny-default-seed0](tiny-default-seed0/README.md)" in (tmp_path / "cards" / "README.md").read_text()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(words, tmp_path, monkeypatch):
    steps = []
    step = Trainer.training_step

    def cut_off(self, *args, **kwargs):
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(self.state.global_step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        main(words)
    assert not (tmp_path / "runs" / "tiny-default-seed0" / "row.json").exists()

    def counted(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", counted)
    attack, attacked = probes.attack, []
    monkeypatch.setattr(probes, "attack", lambda model, *rest: attacked.append(model) or attack(model, *rest))
    assert main(words) == 0
    assert steps == [0, 1, 2, 2, 3]  # step 2 was done after the last checkpoint
    assert row_of(tmp_path)["resumed"] == ["training, with measuring before and after"]
    # The starting model was attacked before the interruption.
    assert len(attacked) == 1 and attacked[0].endswith("model")
    # What is there is not made again.
    assert main(words) == 0 and len(steps) == 5


@pytest.mark.slow
def test_other_settings_are_not_taken_for_these(words, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "train", lambda file, folder: pytest.fail("trained"))
    monkeypatch.setattr("examples.networks.run._before", lambda *args: {})
    with pytest.raises(pytest.fail.Exception):
        main(words)
    tiny.write_text(experiment(training={**TRAINING, "learning_rate": 1e-2}))
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "training.learning_rate: 0.001 → 0.01" in said and "--redo" in said
    kept = tmp_path / "runs" / "tiny-default-seed0" / "model" / "old"
    kept.parent.mkdir()
    kept.write_text("of the old settings")
    with pytest.raises(pytest.fail.Exception):
        main([*words, "--redo"])
    assert not kept.exists()
    assert (
        yaml.safe_load((tmp_path / "runs" / "tiny-default-seed0" / "train.yaml").read_text())["learning_rate"] == 1e-2
    )


def test_all_goes_on_after_a_run_that_fails(words, tiny, tmp_path, monkeypatch, capsys):
    def fail(file, folder):
        raise NonFiniteError("Expected a finite loss, found NaN.")

    monkeypatch.setattr(training, "train", fail)
    monkeypatch.setattr("examples.networks.run._before", lambda *args: {})
    plan = tmp_path / "plan.yaml"
    entry = {"experiments": [str(tiny)], "methods": ["default", "inner_ridge"], "seeds": [0]}
    plan.write_text(yaml.safe_dump([entry]))
    spec = yaml.safe_load(tiny.read_text())
    tiny.write_text(yaml.safe_dump({**spec, "model": {"name": words[words.index("--model") + 1]}}))
    places = ["--data_path", words[words.index("--data_path") + 1], "--output_dir", str(tmp_path / "runs")]
    assert main(["all", "--plan", str(plan), *places]) == 1
    said = capsys.readouterr().err
    assert "tiny-default-seed0, tiny-inner_ridge-seed0 failed" in said and said.count("found NaN") == 2
    assert "found NaN" in (tmp_path / "runs" / "tiny-default-seed0" / "failed.json").read_text()


RECIPE = {
    "image_size": 8,
    "config": {
        "model_type": "vit",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "image_size": 8,
        "patch_size": 4,
    },
    "arguments": {"num_train_epochs": 2, "per_device_train_batch_size": 21, "use_cpu": True, "disable_tqdm": True},
}


def test_a_starting_model_is_trained_once(images, tmp_path, monkeypatch):
    spec = {"benign": {"source": "animals"}, "harmful": {"source": "arms"}}
    found = data.prepare(spec, "tiny", 0, str(images), tmp_path)
    model, about = models.start_model({"called": "tiny_vit", "train": RECIPE}, found, 0, tmp_path)
    assert about["name"] == "tiny_vit-seed0" and 0 <= about["accuracy"] <= 1 and not about["resumed"]
    monkeypatch.setattr(models, "_train", lambda *args: pytest.fail("trained again"))
    assert models.start_model({"called": "tiny_vit", "train": RECIPE}, found, 0, tmp_path) == (model, about)
    with pytest.raises(pytest.fail.Exception):
        models.start_model({"called": "tiny_vit", "train": {**RECIPE, "image_size": 9}}, found, 0, tmp_path)


def test_the_training_of_a_starting_model_resumes(images, tmp_path, monkeypatch):
    found = data.prepare({"benign": {"source": "animals"}}, "tiny", 0, str(images), tmp_path)
    step, steps = Trainer.training_step, []

    def cut_off(self, *args, **kwargs):
        if self.state.global_step == 3 and len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(self.state.global_step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", cut_off)
    spec = {"called": "tiny_vit", "train": RECIPE}
    with pytest.raises(KeyboardInterrupt):
        models.start_model(spec, found, 0, tmp_path)
    _, about = models.start_model(spec, found, 0, tmp_path)
    assert steps == [0, 1, 2, 2, 3] and about["resumed"]


# ---- the paper's Table 3, up to the download ----


@pytest.mark.slow
def test_an_experiment_of_the_hub_runs_on_a_stand_in(images, tiny_model, tmp_path):
    words = ["run", "--experiment", "resnet18_imagenet_cars", "--method", "kappa", "--data_path", str(images)]
    words += ["--model", str(tiny_model), "--output_dir", str(tmp_path / "runs"), "--attackers", "ridge"]
    for change in ("max_steps=2", "per_device_train_batch_size=8", "use_cpu=true", "dataloader_num_workers=0"):
        words += ["--set", change]
    assert main(words) == 0
    (path,) = (tmp_path / "runs").glob("*/row.json")
    row = json.loads(path.read_text())
    assert row["sources"]["benign"] == "imagenet-1k" and row["sources"]["harmful"] == "stanford_cars"
    # 120 images on either side: groups of 100 overlap, as in the paper.
    assert row["ratios"]["reference"]["num_groups"] == 20 and row["ratios"]["reference"]["std"] >= 0


@pytest.mark.parametrize("experiment", ["resnet18_imagenet_country211", "vit_b16_imagenet_cars"])
def test_without_the_hub_it_says_what_is_missing(experiment, tmp_path, capsys):
    words = ["run", "--experiment", experiment, "--data_path", str(tmp_path), "--output_dir", str(tmp_path / "runs")]
    assert main(words) == 1
    assert "ILSVRC/imagenet-1k" in capsys.readouterr().err


def test_without_the_hub_the_model_is_missed_after_the_data(images, tmp_path, capsys):
    words = ["run", "--experiment", "resnet18_imagenet_cars", "--data_path", str(images)]
    assert main([*words, "--output_dir", str(tmp_path / "runs")]) == 1
    assert "microsoft/resnet-18" in capsys.readouterr().err
