"""`hf-immunize train` on what a newcomer has: a folder of images."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from typer.testing import CliRunner

from hf_immunize.cli import main as cli
from hf_immunize.cli.train import load_splits, parse_arguments, run_train
from hf_immunize.errors import ArgumentError, DataError, WeightsError
from hf_immunize.hub.record import read_record
from hf_immunize.vision.bare import load_with_linear_head


CLASSES = ("cat", "dog", "gun", "knife")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An imagefolder with greyscale, RGB and RGBA images of unequal size."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                mode = ("RGB", "L", "RGBA")[index % 3]
                shape = (10 + index, 12, *{"RGB": (3,), "L": (), "RGBA": (4,)}[mode])
                pixels = generator.integers(0, 128, shape) + 30 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=2,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def flags(model, output, *more):
    common = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--report_to", "none", "--use_cpu"]
    return ["--model", str(model), "--output_dir", str(output), "--disable_tqdm", "True", *common, *map(str, more)]


@pytest.fixture(scope="module")
def finished(images, model, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    return output, run_train(flags(model, output, "--dataset", images, "--harmful_classes", "gun", "knife"))


def test_imagefolder_is_split_by_harmful_classes(finished):
    _, results = finished
    assert results["images"] == {"benign_train": 16, "harmful_train": 16, "benign_eval": 8, "harmful_eval": 8}


def test_checkpoint_is_plain_transformers(finished):
    output, _ = finished
    assert type(AutoModelForImageClassification.from_pretrained(output)).__name__ == "ViTForImageClassification"


def test_writes_results_card_and_figure(finished):
    output, _ = finished
    assert {"results.json", "README.md", "spectra.png", "preprocessor_config.json"} <= {
        p.name for p in output.iterdir()
    }


def test_writes_a_record_of_the_classes_without_paths(finished):
    output, results = finished
    record = read_record(output)
    assert record.harmful.classes == ["gun", "knife"]
    assert record.metric.before == results["before"]["eval_accuracy"]
    assert [(data.train_size, data.size) for data in (record.benign, record.harmful)] == [(16, 8), (16, 8)]
    assert str(output.parent) not in (output / "immunization.json").read_text() + (output / "README.md").read_text()


def test_measured_again_the_record_agrees(finished, images):
    output, _ = finished
    words = ["verify", output, "--dataset", images, "--harmful-classes", "gun", "--harmful-classes", "knife"]
    assert CliRunner().invoke(cli.app, [str(word) for word in words]).exit_code == 0


def test_figure_is_named_by_the_record_and_shown_by_the_card(finished):
    output, _ = finished
    assert read_record(output).figures == ["spectra.png"]
    assert "(spectra.png)" in (output / "README.md").read_text()


def test_groups_of_too_few_images_are_left_out(images, model, tmp_path):
    run_train(flags(model, tmp_path, "--dataset", images, "--harmful_classes", "gun", "knife", "--groups"))
    assert set(read_record(tmp_path).ratios) == {"exact"}


def test_results_are_strict_json(finished):
    output, _ = finished

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads((output / "results.json").read_text(), parse_constant=refuse)


def test_resumes(finished, images, model):
    output, results = finished
    args = flags(model, output, "--dataset", images, "--harmful_classes", "gun", "knife")
    args[args.index("--max_steps") + 1] = "3"
    resumed = run_train([*args, "--resume_from_checkpoint", "True"])
    assert resumed["steps"] == 3
    assert resumed["before"] == results["before"]


def test_config_file_is_overridden_by_flags(tmp_path, model):
    config = tmp_path / "args.yaml"
    config.write_text("learning_rate: 0.5\nmax_steps: 7\nbenign: a\nharmful: b\n")
    _, training = parse_arguments(["--config", str(config), "--model", str(model), "--max_steps", "9"])
    assert (training.learning_rate, training.max_steps) == (0.5, 9)


def test_config_file_with_unknown_name_is_refused(tmp_path, model):
    config = tmp_path / "args.json"
    config.write_text('{"learning_rat": 0.5}')
    with pytest.raises(ArgumentError, match="learning_rat"):
        parse_arguments(["--config", str(config), "--model", str(model)])


@pytest.mark.parametrize(
    "words",
    [
        ["--benign", "a"],
        ["--dataset", "a"],
        ["--benign", "a", "--harmful", "b", "--dataset", "c", "--harmful_classes", "d"],
        ["--benign", "a", "--harmful", "b", "--eval_fraction", "1.5"],
    ],
)
def test_incomplete_data_arguments_are_refused(words, model):
    with pytest.raises(ArgumentError, match="Expected"):
        parse_arguments(["--model", str(model), *words])


def test_unknown_harmful_class_lists_the_classes(images, model, tmp_path):
    with pytest.raises(DataError, match="knife"):
        run_train(flags(model, tmp_path, "--dataset", images, "--harmful_classes", "tank"))


def test_labels_beyond_the_head_name_the_remedy(images, model, tmp_path):
    with pytest.raises(DataError, match="num_labels=4"):
        run_train(flags(model, tmp_path, "--benign", images, "--harmful", images))


def test_new_head_takes_the_benign_classes(images, model, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_immunize.cli.train.logger.warning", said.append)
    run_train(flags(model, tmp_path, "--benign", images, "--harmful", images, "--new_head"))
    assert any("--benign_loss task --benign_budget none" in line for line in said)
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.id2label == dict(enumerate(CLASSES))


def test_a_backbone_without_a_classifier_gets_no_head_unsaid(images, model, tmp_path):
    backbone = tmp_path / "backbone"
    ViTForImageClassification.from_pretrained(model).vit.save_pretrained(backbone)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(backbone)
    with pytest.raises(WeightsError, match="classifier"):
        run_train(flags(backbone, tmp_path / "run", "--dataset", images, "--harmful_classes", "gun", "knife"))


def test_a_run_resumed_with_other_images_tells_what_was_before_on_those(images, model, tmp_path):
    words = ["--harmful_classes", "gun", "knife", "--seed", "3", "--save_steps", "1"]
    first = run_train(flags(model, tmp_path, "--dataset", images, *words))
    args = flags(model, tmp_path, "--dataset", images, *words, "--max_images", "5", "--resume_from_checkpoint", "True")
    args[args.index("--max_steps") + 1] = "3"
    resumed = run_train(args)["before"]
    other = run_train(flags(model, tmp_path / "other", "--dataset", images, *words, "--max_images", "5"))["before"]
    names = ("eval_accuracy", "eval_benign_rank", "eval_harmful_log10_kappa")
    assert [resumed[name] for name in names] == pytest.approx([other[name] for name in names])
    assert [resumed[name] for name in names] != pytest.approx([first["before"][name] for name in names])


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"], ["{}"]])
def test_config_file_is_read_however_it_is_given(tmp_path, form):
    config = tmp_path / "args.yaml"
    config.write_text("model: m\nobjective: r_ill\nbenign: a\nharmful: b\n")
    _, training = parse_arguments([word.format(config) for word in form])
    assert training.objective == "r_ill"


def test_unknown_flag_suggests_the_near_one():
    with pytest.raises(ArgumentError, match="--learning_rate"):
        parse_arguments(["--model", "m", "--benign", "a", "--harmful", "b", "--learning_ratee", "1"])


def test_missing_model_is_one_sentence(images, tmp_path):
    with pytest.raises(ArgumentError, match="nowhere"):
        run_train(flags("./nowhere", tmp_path, "--dataset", images, "--harmful_classes", "gun", "knife"))


def numbered(tmp_path, names):
    for split in ("train", "test"):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def test_harmful_class_typed_as_a_name_of_digits_is_a_name(tmp_path):
    source = numbered(tmp_path, ["1", "3", "5"])
    data, training = parse_arguments(["--model", "m", "--dataset", str(source), "--harmful_classes", "1", "--use_cpu"])
    benign, _ = load_splits(data, training)
    assert benign.train.features["label"].names == ["3", "5"]


@pytest.mark.parametrize(
    "words",
    [
        ["--harmful_classes", "a", "b,c"],
        ["--harmful_classes", "a", "--harmful_classes", "b,c"],
        ["--harmful-classes", "a", "--harmful-classes=b,c"],
    ],
)
def test_classes_are_given_at_once_or_one_flag_each_and_override_the_file(words, tmp_path):
    (tmp_path / "run.yaml").write_text("harmful_classes: [x, y]\n", encoding="utf-8")
    given = ["--model", "m", "--dataset", "d", "--use_cpu", "--config", str(tmp_path / "run.yaml")]
    assert parse_arguments([*given, *words])[0].harmful_classes == ["a", "b,c"]
    assert parse_arguments(given)[0].harmful_classes == ["x", "y"]


def test_a_bare_backbone_with_pooling_is_trained_with_a_head_of_its_own(images, model, tmp_path):
    words = flags(model, tmp_path, "--dataset", images, "--harmful_classes", "gun", "knife", "--new_head", "True")
    run_train([*words, "--pooling", "cls"])
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "ViTModel"
    head = load_with_linear_head(tmp_path).classifier
    assert (head.in_features, head.out_features) == (8, 2)
