import dataclasses

import pytest
from huggingface_hub import ModelCard

from hf_immunize.hub.card import CardFacts, plain, render_card


@pytest.fixture
def facts():
    return CardFacts(
        base_model="user/vit-small",
        benign="pets",
        harmful="weapons",
        images={"benign_train": 10, "benign_eval": 4, "harmful_train": 10, "harmful_eval": 4},
        objective="kappa",
        trainable="last_stage",
        steps=3,
        seed=0,
        before={"eval_accuracy": 0.9, "eval_rir": 1.0, "eval_log10_rir": 0.0},
        after={"eval_accuracy": 0.88, "eval_rir": 1234.0, "eval_log10_rir": 3.091, "eval_rir_is_lower_bound": 1.0},
        summary="It was measured.",
    )


def test_metadata_reads_back(facts):
    data = ModelCard(str(render_card(facts))).data
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "accuracy": 0.88,
        "log10_rir": 3.091,
    }


def test_tags_name_the_method(facts):
    assert "model-immunization" in ModelCard(str(render_card(facts))).data.tags


def test_bound_keeps_its_direction(facts):
    assert "| RIR (exact) | 1 | ≥ 1,234 |" in str(render_card(facts))


def test_undetermined_ratio_is_no_number(facts):
    facts.after |= {"eval_rir": None, "eval_log10_rir": None, "eval_rir_is_upper_bound": 1.0}
    card = render_card(facts)
    assert "| RIR (exact) | 1 | undetermined |" in str(card)
    assert [result.metric_type for result in card.data.eval_results] == ["accuracy"]


def test_says_what_is_not_stopped_without_an_audit(facts):
    assert "No audit was made" in str(render_card(facts))


@pytest.mark.parametrize(
    "name",
    ["x\n---\nlicense: mit\n---", "<script>alert(1)</script>", "a | b | c", "[click](http://e.vil)", "'\": {y}"],
)
def test_names_cannot_inject(facts, name):
    hostile = render_card(dataclasses.replace(facts, benign=name, harmful=name, base_model=name))
    card = ModelCard(str(hostile))
    data = card.data
    assert "<script>" not in card.text
    assert "](http" not in card.text
    assert data.to_dict().get("license") is None
    assert data.tags == facts.tags


def test_kappa_of_a_collapsed_side_is_a_bound(facts):
    facts.after |= {"eval_harmful_log10_kappa": 14.3, "eval_harmful_is_bound": 1.0}
    assert "| log10 κ of harmful features | – | ≥ 14.30 |" in str(render_card(facts))


def test_addresses_in_names_do_not_become_links():
    assert "://" not in plain("https://evil.example")
    assert "www." not in plain("www.evil.example")


def test_plain_keeps_ordinary_names():
    assert plain("Golden retriever 2") == "Golden retriever 2"
