"""Training, audit and verification measure on the same images, and not on those that were trained on."""

from functools import partial
from types import SimpleNamespace

import pytest
from datasets import DatasetDict
from folders import image_folder, tiny_classifier
from typer.testing import CliRunner

from hf_immunize import verify
from hf_immunize.audit.report import AuditReport
from hf_immunize.audit.run import audit
from hf_immunize.cli import main as cli
from hf_immunize.cli.audit import _data, _draw
from hf_immunize.cli.hub import _sides
from hf_immunize.cli.train import load_splits, parse_arguments, run_train
from hf_immunize.data.images import image_hashes
from hf_immunize.errors import RecordError, TrainingImagesError
from hf_immunize.hub.record import read_record, write_record


SEED, FRACTION = 7, 0.4


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images without a test split."""
    return image_folder(tmp_path_factory.mktemp("images"), ("cat", "dog", "gun", "knife"), {"": 30}, 8)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    model, output = tiny_classifier(tmp_path_factory.mktemp("model"), ("cat", "dog")), tmp_path_factory.mktemp("run")
    given = ["--dataset", images, "--harmful_classes", "gun", "knife", "--seed", SEED, "--eval_fraction", FRACTION]
    given += ["--max_steps", 2, "--per_device_train_batch_size", 4, "--report_to", "none", "--use_cpu"]
    given = [str(word) for word in ["--model", model, "--output_dir", output, "--disable_tqdm", "True", *given]]
    run_train(given)
    return output, load_splits(*parse_arguments(given))


def seen(dataset):
    return set(image_hashes(dataset, "image").tolist())


def test_audit_and_verify_measure_on_what_training_held_out(run, images):
    output, trained = run
    record = read_record(output)
    for data in (record.benign, record.harmful):
        assert (data.held_out_fraction, data.held_out_seed) == (FRACTION, SEED)
    names = ("harmful", "benign", "harmful_test", "benign_test", "label_column", "test_fraction", "seed")
    asked = SimpleNamespace(model=str(output), revision="main", **dict.fromkeys(names))
    asked.dataset, asked.harmful_classes = str(images), ["gun", "knife"]
    harmful, benign = _data(asked, partial(_draw, asked))
    checked = _sides(str(images), ["gun", "knife"], record)
    for side, audited, verified in zip(trained, (benign, harmful), checked, strict=True):
        assert seen(audited.test) == seen(verified) == seen(side.test)
        assert seen(audited.train) == seen(side.train)


@pytest.mark.parametrize(
    "damaged", [{"train_sketch": "no hash"}, {"sketch": "0" * 17}, {"held_out_fraction": 1.0}, {"held_out_seed": -1}]
)
def test_a_record_with_a_damaged_split_is_refused(run, damaged):
    record = read_record(run[0])
    for name, value in damaged.items():
        setattr(record.benign, name, value)
    with pytest.raises(RecordError, match=next(iter(damaged))):
        record.to_json()


def typed(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


CLASSES_TYPED = ("--harmful-classes", "gun", "--harmful-classes", "knife")


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ([], False),
        (["--seed", "8"], True),
        # Of a smaller part of the same draw, all were held out; the draw of a larger part begins with the same images.
        (["--test-fraction", "0.3"], False),
        (["--test-fraction", "0.8"], True),
    ],
)
def test_an_audit_of_another_split_is_refused(run, images, tmp_path, changed, refused):
    options = ["--quick", "--attackers", "ridge", "--output-dir", tmp_path, *changed]
    found = typed("audit", run[0], "--dataset", images, *CLASSES_TYPED, *options)
    assert isinstance(found.exception, TrainingImagesError) if refused else found.exit_code == 0, found.output
    # The record confirms the split, so that nobody has to be warned of it.
    assert refused or AuditReport.load(tmp_path).data.warnings == []


def test_training_images_under_another_name_are_refused(run, tmp_path):
    output, (benign, harmful) = run
    for side, parts in (("benign", benign), ("harmful", harmful)):
        DatasetDict(train=parts.test, test=parts.train).save_to_disk(tmp_path / side)
    sources = {side: str(tmp_path / side) for side in ("benign", "harmful")}
    with pytest.raises(TrainingImagesError, match="harmful"):
        audit(str(output), preset="quick", attackers=["ridge"], progress=False, **sources)
    with pytest.raises(TrainingImagesError, match="benign"):
        verify(output, progress=False, **sources)


def test_a_record_that_knows_no_training_images_refuses_none_and_a_split_by_itself_is_warned_of(run, images, tmp_path):
    output, (benign, harmful) = run
    record = read_record(output)
    for data in (record.benign, record.harmful):
        data.train_sketch = data.sketch = data.held_out_fraction = data.held_out_seed = None
    for path in output.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    write_record(tmp_path, record)
    assert verify(tmp_path, benign=benign.train, harmful=harmful.train, progress=False).exit_code == 4
    options = ["--quick", "--attackers", "ridge", "--output-dir", tmp_path / "audit"]
    assert typed("audit", tmp_path, "--dataset", images, *CLASSES_TYPED, *options).exit_code == 0
    assert len(AuditReport.load(tmp_path / "audit").data.warnings) == 2


def test_verify_holds_out_by_itself(run, images):
    assert typed("verify", run[0], "--dataset", images, *CLASSES_TYPED).exit_code == 0
