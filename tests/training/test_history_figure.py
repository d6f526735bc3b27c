"""The curves are those of the log, each where it belongs."""

import math

import pytest

from hf_immunize.training.spectrum_figure import history_panels, new_figure


LOG = [
    {"step": 0, "eval_loss": 0.7, "eval_accuracy": 0.9, "eval_benign_accuracy": 0.9, "eval_benign_loss": 0.7},
    {"step": 1, "loss": 0.6, "grad_norm": 2.0, "learning_rate": 1e-3, "r_ill": 0.2, "harmful_weight": 3.0, "epoch": 1},
    {"step": 2, "eval_accuracy": 0.8, "eval_benign_log10_kappa": 3.0, "eval_harmful_log10_kappa": 5.0},
    {"step": 2, "eval_log10_rir": 1.5, "eval_rir_is_lower_bound": 1.0, "eval_rir_is_upper_bound": 0.0},
    {"step": 2, "train_runtime": 3.0, "train_loss": 0.6},
]


def drawn(history):
    """Title to the labelled lines of its panel."""
    panels = history_panels(history)
    _, axes = new_figure(max(len(panels), 1))
    for panel, draw in zip(axes, panels, strict=False):
        draw(panel)
    return {
        panel.get_title(): {
            line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
            for line in panel.get_lines()
            if not line.get_label().startswith("_")
        }
        for panel in axes[: len(panels)]
    }


def test_each_quantity_has_its_panel():
    assert [set(lines) for lines in drawn(LOG).values()] == [
        {"loss", "r_ill", "eval_loss"},
        {"eval_benign_log10_kappa", "eval_harmful_log10_kappa"},
        {"eval_accuracy"},
        {"eval_log10_rir", "lower bound"},
    ]


def test_a_curve_has_the_logs_steps_and_values():
    assert drawn(LOG)["Accuracy"]["eval_accuracy"] == ([0, 2], [0.9, 0.8])


def test_what_was_not_logged_has_no_panel():
    assert list(drawn(LOG[1:2])) == ["Losses and terms"]


def test_nothing_is_drawn_of_an_empty_log():
    assert history_panels([]) == []


def test_several_evaluation_sets_have_a_curve_each():
    log = [{"step": 1, "eval_a_accuracy": 0.5}, {"step": 1, "eval_b_accuracy": 0.6}]
    assert set(drawn(log)["Accuracy"]) == {"eval_a_accuracy", "eval_b_accuracy"}


def test_what_is_not_a_number_is_left_out():
    log = [{"step": 1, "eval_log10_rir": math.nan}, {"step": 2, "eval_log10_rir": 1.0}]
    (lines,) = drawn(log).values()
    assert lines["eval_log10_rir"] == ([2], [1.0])


def test_condition_numbers_of_a_sample_give_way_to_those_of_the_evaluation_set():
    log = [{"step": 1, "eval_benign_log10_kappa": 3.0, "spectrum_benign_log10_kappa": 3.1}]
    (lines,) = drawn(log).values()
    assert set(lines) == {"eval_benign_log10_kappa"}


@pytest.mark.parametrize("loss", [-0.5, 0.0, 0.5])
def test_losses_of_any_sign_are_drawn(loss):
    assert drawn([{"step": 1, "loss": loss}])["Losses and terms"]["loss"] == ([1], [loss])


def test_rir_of_a_sample_is_drawn_where_there_is_no_other():
    log = [{"step": 1, "spectrum_log10_rir": 2.0}]
    (lines,) = drawn(log).values()
    assert set(lines) == {"spectrum_log10_rir"}


@pytest.mark.parametrize(("bound", "said"), [(0.0, set()), (1.0, {"lower bound"})])
def test_a_condition_number_that_is_a_bound_is_marked(bound, said):
    log = [{"step": 1, "eval_harmful_log10_kappa": 9.0, "eval_harmful_is_bound": bound}]
    (lines,) = drawn(log).values()
    assert set(lines) == {"eval_harmful_log10_kappa"} | said
