"""The main job, end to end, as a newcomer starts it."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import ViTForImageClassification, ViTImageProcessorPil

from hf_immunize import verify
from hf_immunize.audit.statistics import paired_utility
from hf_immunize.cli.demo import Probing, audit_record, decoded, demo_sentence, digit_splits, hits, slowing
from hf_immunize.hub.card import render_card
from hf_immunize.hub.push import push
from hf_immunize.hub.record import read_record


def probing(steps, least_squares=0.9, size=269, bend=1.0):
    """Descent that rises evenly to 0.9 within some steps; from ``bend`` of the way on, a hundred times as slowly."""
    t = torch.arange(1, 1001) / steps
    way = torch.where(t < bend, t, bend + (t - bend) / 100)
    return Probing(0.9 * way.clamp(max=1), torch.ones(1000), least_squares, size)


def sentence(new, growth=10.0):
    utility = paired_utility(torch.tensor([True] * 9 + [False]), torch.tensor([True] * 8 + [False] * 2))
    return demo_sentence({"eval_accuracy": 0.9, "eval_rir": 100.0}, growth, utility, None, probing(100), new)


@pytest.mark.parametrize(
    ("after", "verb"),
    [
        (probing(100), "is not slowed"),
        (probing(150), "is hardly slowed"),
        (probing(400), "is slowed"),
        (probing(5000), "is slowed"),
        # As before up to 77 %, which is within the noise of 269 images of the 81 % to reach.
        (probing(100, bend=0.86), "is perhaps slowed"),
    ],
)
def test_what_is_said_of_descent_is_what_the_images_bear_out(after, verb):
    assert slowing(probing(100), after).verb == verb


def test_more_images_say_more():
    few, many = (slowing(probing(100, size=size), probing(100, bend=0.86, size=size)) for size in (269, 100_000))
    assert few.low < 1.1 < 1.3 < many.low <= many.high < few.high and many.target == few.target


def test_steps_beyond_what_was_tried_are_a_bound():
    found = slowing(probing(100), probing(5000))
    assert found.is_bound and found.after is None and "more than 1,000 after" in found.steps


def test_what_descent_never_reached_before_is_not_compared():
    assert slowing(probing(5000), probing(100)).verb == "cannot be compared"


@pytest.mark.parametrize("growth", [0.5, 10.0])
@pytest.mark.parametrize("least_squares", [0.2, 0.88])
def test_sentence_claims_what_was_measured(growth, least_squares):
    said = sentence(probing(400, least_squares), growth)
    assert ("did not become worse conditioned" in said) == (growth < 1)
    assert ("stays possible" in said) == (least_squares > 0.5)
    assert f"{least_squares:.1%}" in said and "+10.0 points" in said


def test_audit_names_the_stronger_attacker():
    before, after = probing(100), probing(5000, least_squares=0.88)
    attack = audit_record(before, after).strongest["head_input"]
    assert (attack.accuracy, attack.reference_accuracy) == (0.88, pytest.approx(0.9))
    assert "least squares" in attack.attacker


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    subprocess.run([sys.executable, "-m", "hf_immunize", "demo", "--output-dir", str(folder)], check=True, cwd=folder)
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.outcome
def test_demo_raises_its_ratio(demo):
    """25 to 331 over seeds 0 to 4 on two processors; without immunization it is 1."""
    _, results = demo
    assert results["before"]["eval_rir"] == pytest.approx(1)
    assert results["after"]["eval_rir"] >= 3


@pytest.mark.slow
@pytest.mark.outcome
def test_demo_keeps_benign_accuracy(demo):
    """97 to 100 % over seeds 0 to 4 on two processors; an untrained model guesses."""
    folder, results = demo
    model = ViTForImageClassification.from_pretrained(folder)
    processor = ViTImageProcessorPil.from_pretrained(folder)
    rows = decoded(digit_splits(0)[0]["test"], processor)
    torch.manual_seed(0)
    kept, untrained = (hits(one, rows).double().mean() for one in (model, ViTForImageClassification(model.config)))
    assert kept == pytest.approx(results["after"]["eval_accuracy"])
    assert kept > 0.9 and untrained < 0.5


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
