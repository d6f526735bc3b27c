from dataclasses import replace

import pytest
from audit_sample import LAYERS, STEPS, attack, lost, make, sample_data

from hf_immunize.audit.report import make_tables


@pytest.fixture(scope="module")
def tables():
    return make_tables(sample_data())


def test_every_table_is_there(tables):
    names = ["headline", "layers", "fine_tuning", "deviation", "steps", "tasks", "curves", "attacks", "outcomes"]
    assert list(tables) == names


def test_accuracy_against_steps_is_a_table_with_intervals(tables):
    curves = tables["curves"]
    rows = curves[(curves["attacker"] == "gd_line_search") & (curves["subject"] == "reference")]
    rows = rows[rows["task"] == "harmful"]
    assert list(rows["step"]) == STEPS
    assert list(rows["accuracy"]) == sorted(rows["accuracy"])
    assert (rows["low"] <= rows["accuracy"]).all() and (rows["seeds"] == 5).all()


def test_every_attack_has_its_gap_to_the_reference(tables):
    attacks = tables["attacks"].set_index(["attacker", "subject", "task", "layer"])
    row = attacks.loc[("ridge", "immunized", "harmful", "classifier")]
    other = attacks.loc[("ridge", "reference", "harmful", "classifier")]
    assert row["gap"].item() == pytest.approx((other["accuracy"] - row["accuracy"]).item())
    assert row["gap_low"].item() <= row["gap"].item() <= row["gap_high"].item()


def test_the_cost_of_an_attack_is_its_seconds_over_seeds():
    runs = attack("ridge", "head_input", "immunized", 0.5, seeds=3)
    timed = [replace(one, seconds=second) for one, second in zip(runs, (1.0, 2.0, 3.0), strict=True)]
    row = make_tables(make(timed))["attacks"].iloc[0]
    assert row["seconds"] == 2 and row["seconds_low"] == 0 and row["seconds_high"] == pytest.approx(4.484, abs=1e-3)


def test_the_headline_has_a_row_for_each_class_of_attackers(tables):
    assert list(tables["headline"]["access"]) == ["head_input", "any_layer", "fine_tuning"]


def test_the_headline_is_the_worst_case_beside_the_reference(tables):
    row = tables["headline"].set_index("access").loc["any_layer"]
    assert (row["attacker"], row["layer"]) == ("ridge", LAYERS[-1])
    assert row["accuracy"] == pytest.approx(0.53, abs=0.005)
    assert row["low"] < row["accuracy"] < row["high"]
    assert row["gap"] == pytest.approx(row["reference_accuracy"] - row["accuracy"])


def test_a_closed_form_has_no_ratio_of_steps(tables):
    headline = tables["headline"].set_index("access")
    assert headline.loc["any_layer", "steps_ratio"] != headline.loc["any_layer", "steps_ratio"]
    assert headline.loc["fine_tuning", "steps_ratio"] == pytest.approx(10 / 3)


def test_a_class_that_was_not_tested_has_no_numbers():
    headline = make_tables(make([]))["headline"]
    assert list(headline["finding"]) == ["not tested"] * 3
    assert headline["accuracy"].isna().all()


def test_the_layers_end_with_the_head(tables):
    assert tables["layers"]["layer"].iloc[-1] == "classifier"
    assert set(LAYERS) <= set(tables["layers"]["layer"])


def test_budgets_grow_up_to_all_steps(tables):
    table = tables["fine_tuning"]
    assert list(table[table["operator"] == "whole_network"]["budget_steps"]) == [300, 1000, 3000]


def test_more_steps_read_no_less(tables):
    whole = tables["fine_tuning"].query("operator == 'whole_network'")
    assert whole["immunized_accuracy"].is_monotonic_increasing


def test_the_best_learning_rate_counts_where_an_operator_has_several_layers():
    runs = [
        *attack("lora_r8", "fine_tuning", "immunized", 0.2, half=10, layer="last"),
        *attack("lora_r8", "fine_tuning", "immunized", 0.4, half=10, layer="all"),
    ]
    table = make_tables(make(runs))["fine_tuning"]
    assert table["immunized_accuracy"].max() == pytest.approx(0.4, abs=0.01)


def test_the_deviation_of_fine_tuning_is_positive_where_learning_is_slower(tables):
    row = tables["deviation"].set_index("operator").loc["whole_network"]
    assert 0 < row["signed_low"] < row["signed"] < row["signed_high"]
    assert row["signed"] == pytest.approx(row["absolute"], rel=0.05)


def test_other_tasks_have_their_own_table(tables):
    assert set(tables["tasks"]["task"]) == {"benign", "unseen", "unrelated"}


def test_every_run_is_an_outcome(tables):
    data = sample_data()
    assert len(tables["outcomes"]) == len(data.outcomes)
    assert set(tables["outcomes"]["status"]) == {"done", "diverged", "skipped"}


def test_what_diverged_is_listed_with_its_reason():
    row = make_tables(make([lost("sgd", "diverged", "the loss is NaN")]))["attacks"].iloc[0]
    assert (row["diverged"], row["note"]) == (1, "the loss is NaN")


def test_a_claim_that_the_verdict_withholds_is_not_in_the_table():
    headline = make_tables(sample_data(utility=None))["headline"]
    assert list(headline["finding"]) == ["no claim", "not prevented", "not prevented"]
