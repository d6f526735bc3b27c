"""The main job, end to end, as a newcomer starts it."""

import json
import subprocess
import sys

import pytest
import torch

from hf_immunize import verify
from hf_immunize.demo_probing import Probing, audit_record, demo_sentence
from hf_immunize.hub.card import render_card
from hf_immunize.hub.push import push
from hf_immunize.hub.record import read_record


def probing(*, slow, least_squares):
    curve = torch.linspace(0.2, 0.5 if slow else 0.9, 1000)
    return Probing(curve=curve, convergence=torch.ones(1000), least_squares=least_squares)


def sentence(before, after):
    metrics = {"eval_accuracy": 0.9, "eval_rir": 100.0}
    return demo_sentence(metrics, metrics, before, after)


def test_sentence_says_when_descent_is_not_slowed():
    same = probing(slow=False, least_squares=0.9)
    assert "is not slowed" in sentence(same, same)


def test_sentence_says_when_descent_is_slowed():
    assert "more than 1,000 after" in sentence(
        probing(slow=False, least_squares=0.9), probing(slow=True, least_squares=0.9)
    )


def test_sentence_does_not_make_much_of_a_little():
    before, after = (Probing(torch.linspace(0.2, top, 1000), torch.ones(1000), 0.9) for top in (0.9, 0.85))
    assert "is hardly slowed" in sentence(before, after)


def test_sentence_gives_the_least_squares_attacker():
    assert "least squares still reads 88.0%" in sentence(
        probing(slow=False, least_squares=0.9), probing(slow=True, least_squares=0.88)
    )


def test_audit_names_the_stronger_attacker():
    before, after = probing(slow=False, least_squares=0.9), probing(slow=True, least_squares=0.88)
    attack = audit_record(before, after).strongest["head_input"]
    assert (attack.accuracy, attack.reference_accuracy) == (0.88, pytest.approx(0.9))
    assert "least squares" in attack.attacker


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    subprocess.run([sys.executable, "-m", "hf_immunize", "demo", "--output-dir", str(folder)], check=True, cwd=folder)
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_demo_reaches_its_ratio(demo):
    _, results = demo
    assert results["after"]["eval_rir"] >= 100


@pytest.mark.slow
def test_demo_keeps_benign_accuracy(demo):
    _, results = demo
    assert results["after"]["eval_accuracy"] >= results["before"]["eval_accuracy"] - 0.01


@pytest.mark.slow
def test_demo_leaves_checkpoint_record_card_and_figure(demo):
    folder, _ = demo
    names = {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", "before_after.png"}
    names |= {"immunization.json"}
    assert names <= {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_demo_checkpoint_loads_without_this_library(demo):
    folder, _ = demo
    code = (
        "import sys; sys.modules['hf_immunize'] = None\n"
        "from transformers import AutoModelForImageClassification\n"
        f"print(AutoModelForImageClassification.from_pretrained({str(folder)!r}).config.num_labels)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    assert out.stdout.strip() == "5"


@pytest.mark.slow
def test_demo_record_has_its_figures(demo):
    folder, results = demo
    record = read_record(folder)
    assert 10 ** record.ratios["exact"].log10_rir == pytest.approx(results["after"]["eval_rir"])
    assert record.audit.strongest["head_input"].accuracy >= results["probing"]["after"]["least_squares"]


@pytest.mark.slow
def test_demo_card_is_that_of_its_record(demo):
    folder, _ = demo
    card = (folder / "README.md").read_text()
    assert str(render_card(read_record(folder), existing=card)) == card


@pytest.mark.slow
def test_demo_measured_again_agrees(demo):
    folder, _ = demo
    data = {name: str(folder / "held_out" / name) for name in ("benign", "harmful")}
    assert verify(folder, **data, progress=False).outcome == "agrees"


@pytest.mark.slow
def test_demo_would_push_no_data_and_no_pickle(demo):
    folder, _ = demo
    assert set(push(folder, "user/demo", dry_run=True).files) == {
        "README.md",
        "before_after.png",
        "config.json",
        "immunization.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
