"""`hf-immunize train` on what a newcomer has: a folder of images."""

import json
import shlex
import sys

import numpy as np
import pytest
from folders import image_folder, tiny_classifier
from PIL import Image
from transformers import AutoModelForImageClassification, ViTForImageClassification, ViTImageProcessorPil
from typer.testing import CliRunner

from hf_immunize.audit.report import AuditReport
from hf_immunize.cli.main import app
from hf_immunize.cli.train import audit_command, load_splits, parse_arguments, print_table, run_train
from hf_immunize.errors import ArgumentError, DataError, WeightsError
from hf_immunize.hub.card import INTERCEPT_ROW, metric_rows, plain
from hf_immunize.hub.record import read_record


CLASSES = ("cat", "dog", "gun", "knife")
HARMFUL = ("--harmful_classes", "gun", "knife")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An imagefolder with greyscale, RGB and RGBA images of unequal size."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                shape = (10 + index, 12, *((3,), (), (4,))[index % 3])
                pixels = generator.integers(0, 128, shape) + 30 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_classifier(tmp_path_factory.mktemp("model"), CLASSES[:2])


def flags(model, output, *more, steps=2):
    common = ["--max_steps", steps, "--per_device_train_batch_size", 4, "--report_to", "none", "--use_cpu"]
    words = ["--model", model, "--output_dir", output, "--disable_tqdm", "True", *common, *more]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def finished(images, model, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    return output, run_train(flags(model, output, "--dataset", images, *HARMFUL))


def test_a_folder_of_images_becomes_a_checkpoint_with_record_card_and_figure(finished):
    output, results = finished
    assert results["images"] == {
        "benign_train": 16,
        "harmful_train": 16,
        "distillation": 96,
        "benign_eval": 8,
        "harmful_eval": 8,
    }
    assert type(AutoModelForImageClassification.from_pretrained(output)).__name__ == "ViTForImageClassification"
    record, card = read_record(output), (output / "README.md").read_text()
    assert record.harmful.classes == ["gun", "knife"]
    assert record.metric.before == results["before"]["eval_accuracy"]
    assert [(data.train_size, data.size) for data in (record.benign, record.harmful)] == [(16, 8), (16, 8)]
    assert set(record.ratios) == {"exact", "intercept"}
    assert record.figures == ["spectra.png"] and (output / "spectra.png").exists() and "(spectra.png)" in card
    assert (output / "preprocessor_config.json").exists()
    assert str(output.parent) not in (output / "immunization.json").read_text() + card

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads((output / "results.json").read_text(), parse_constant=refuse)


def test_the_terminal_has_what_is_read_first_and_the_card_the_rest(finished, capsys):
    output, results = finished
    print_table(results)
    said, card = capsys.readouterr().out, (output / "README.md").read_text()
    shown = {name for name, *_ in metric_rows(results["before"], results["after"]) if f"{name} " in said}
    assert {"benign accuracy", "steps of a harmful probe", INTERCEPT_ROW} <= shown
    assert "κ" not in said and "rank" not in said and "log10 κ" in card and "rank" in card


def test_without_matplotlib_there_is_no_figure_and_all_the_rest(images, model, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run_train(flags(model, tmp_path, "--dataset", images, *HARMFUL))
    assert "pip install 'hf-immunize[plots]'" in caplog.text
    assert not (tmp_path / "spectra.png").exists() and (tmp_path / "model.safetensors").exists()


def test_resumes(finished, images, model):
    output, results = finished
    words = ("--dataset", images, *HARMFUL, "--resume_from_checkpoint", "True")
    resumed = run_train(flags(model, output, *words, steps=3))
    assert resumed["steps"] == 3
    assert metric_rows(resumed["before"], {}) == metric_rows(results["before"], {})


def test_a_config_file_is_read_and_flags_override_it(tmp_path):
    config = tmp_path / "args.yaml"
    lines = ["model: m", "dataset: d", "harmful_classes: [x, y]", "objective: r_ill", "learning_rate: 1e-3"]
    lines += ["max_steps: 7", "use_cpu: true", "eval_strategy: no", "report_to: none", "lr_scheduler_kwargs: {a: 1}"]
    config.write_text("\n".join(lines), encoding="utf-8")
    data, training = parse_arguments(["--config", str(config)])
    assert (data.harmful_classes, training.objective, training.learning_rate) == (["x", "y"], "r_ill", 1e-3)
    assert (training.eval_strategy, training.report_to, training.lr_scheduler_kwargs) == ("no", [], {"a": 1})
    words = ["--max_steps", "9", "--harmful_classes", "a", "--harmful-classes=b,c"]
    data, training = parse_arguments([f"--config={config}", *words])
    assert (data.harmful_classes, training.learning_rate, training.max_steps) == (["a", "b,c"], 1e-3, 9)


def test_unknown_flag_suggests_the_near_one():
    with pytest.raises(ArgumentError, match="--learning_rate"):
        parse_arguments(["--model", "m", "--benign", "a", "--harmful", "b", "--learning_ratee", "1"])


@pytest.mark.parametrize(
    ("words", "error", "named"),
    [
        (("--dataset", "{images}", "--harmful_classes", "tank"), DataError, "knife"),
        (("--benign", "{images}", "--harmful", "{images}"), DataError, "eval_dataset.*knife"),
        # It would get a head drawn at random otherwise.
        (("--dataset", "{images}", *HARMFUL, "--model", "{tmp}/backbone"), WeightsError, "classifier"),
    ],
)
def test_what_does_not_fit_is_named(images, model, tmp_path, words, error, named):
    ViTForImageClassification.from_pretrained(model).vit.save_pretrained(tmp_path / "backbone")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "backbone")
    with pytest.raises(error, match=named):
        run_train(flags(model, tmp_path / "run", *(word.format(images=images, tmp=tmp_path) for word in words)))


def test_new_head_takes_the_benign_classes(images, model, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_immunize.cli.train.logger.warning", said.append)
    results = run_train(flags(model, tmp_path, "--benign", images, "--harmful", images, "--new_head"))
    assert any("--benign_loss task" in line for line in said)
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.id2label == dict(enumerate(CLASSES))
    # Why little is reached stays to be read: the two sides are the same images.
    *_, why = read_record(tmp_path).remarks
    assert results["summary"].endswith(why) and plain(why) in (tmp_path / "README.md").read_text()


def test_the_audit_that_is_printed_can_be_typed(finished, images, model, tmp_path):
    output, _ = finished
    (tmp_path / "it's here").symlink_to(images)
    given = flags(model, output, "--dataset", tmp_path / "it's here", *HARMFUL)
    command = audit_command(*parse_arguments(given))
    quick = ["--quick", "--attackers", "ridge", "--output-dir", str(tmp_path / "audit")]
    done = CliRunner().invoke(app, [*shlex.split(command)[1:], *quick])
    assert done.exit_code == 0, done.output
    found = AuditReport.load(tmp_path / "audit").data
    assert (found.model, found.reference) == (output.name, model.name)
    assert found.tasks["harmful"].num_classes == found.tasks["benign"].num_classes == 2


def test_harmful_class_typed_as_a_name_of_digits_is_a_name(tmp_path):
    images = image_folder(tmp_path, ("1", "3", "5"), {"train": 4, "test": 4}, 8)
    given = ["--model", "m", "--dataset", str(images), "--harmful_classes", "1", "--use_cpu"]
    benign, _ = load_splits(*parse_arguments(given))
    assert benign.train.features["label"].names == ["3", "5"]
