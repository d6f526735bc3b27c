"""Rows of docs/results/time.md: a model against itself is no slower, rounding and export are told from training."""

import re
import sys
from pathlib import Path

import pytest
from folders import image_folder, tiny_classifier


sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.probing import main


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("probing")
    kept = image_folder(root / "kept", ["cat", "dog"], {"train": 12, "test": 6}, 8)
    harmful = image_folder(root / "harmful", ["rifle", "pistol", "axe"], {"train": 12, "test": 6}, 8, seed=1)
    return tiny_classifier(str(root / "model"), ["cat", "dog"]), str(kept), str(harmful)


def rows(places, capsys, *options):
    """What is printed: name to the cells of the start and of the other model."""
    model, benign, harmful = places
    main([model, model, "--benign", benign, "--harmful", harmful, "--steps", "8", *options])
    lines = (line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    return {cells[0]: cells[1:] for line in lines for cells in [line.strip("| ").split(" | ")]}


def test_a_model_against_itself_takes_the_same_steps_and_has_a_ratio_of_1(places, capsys):
    found = rows(places, capsys)
    steps = {name: cells for name, cells in found.items() if "steps of" in name or "ridge" in name}
    assert len(steps) == 7 and all(start == other for start, other in steps.values())
    assert re.match(r"RIR = 1 |RIR = 1\.0", found["intercept"][1]), found["intercept"]


def test_classes_are_measured_apart_where_asked(places, capsys):
    found = rows(places, capsys, "--apart", "at")  # cat, and not dog
    accuracies = [float(cells[0].rstrip("%")) for name, cells in found.items() if name.startswith("benign accuracy")]
    whole, *parts = accuracies
    assert len(parts) == 2 and abs(sum(parts) / 2 - whole) < 0.11  # each class has as many images


def test_learning_the_benign_task_again_is_counted_where_asked(places, capsys):
    found = rows(places, capsys, "--fine_tuning", "2")
    start, other = next(cells for name, cells in found.items() if "fine-tuning" in name)
    assert start == other and len(re.findall(r"[\d,]+ \(best", start)) == 2


def test_int8_and_benign_training_change_the_second_model_alone(places, capsys):
    plain = rows(places, capsys)
    for options in (("--saved_as", "int8"), ("--benign_steps", "3")):
        changed = rows(places, capsys, *options)
        assert changed["benign loss"][0] == plain["benign loss"][0], options
        assert changed["intercept"][1] != plain["intercept"][1], options


def test_onnx_runtime_reads_the_same_features(places, capsys):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    plain, exported = rows(places, capsys), rows(places, capsys, "--saved_as", "onnx")
    assert exported["benign loss"] == plain["benign loss"] and exported["harmful: ridge"] == plain["harmful: ridge"]
