"""What a run keeps for being resumed, on however many processes."""

import logging

import pytest

from hf_immunize.training import run_state
from hf_immunize.training.arguments import Method
from hf_immunize.training.run_state import load_run_state, save_run_state
from hf_immunize.training.step import ImmunizationStep


@pytest.fixture
def said(tiny, tmp_path, monkeypatch, caplog):
    """What is said when a run of some batch and processes goes on with others."""
    step = ImmunizationStep(tiny(), Method())

    def resume(before, now):
        monkeypatch.setattr(run_state, "world_size", lambda: before[1])
        save_run_state(str(tmp_path), step, {}, before[0])
        monkeypatch.setattr(run_state, "world_size", lambda: now[1])
        logger = logging.getLogger(run_state.__name__)
        monkeypatch.setattr(logger, "propagate", True)
        logger.addHandler(caplog.handler)
        caplog.clear()
        assert load_run_state(str(tmp_path), step, now[0]) == {}
        logger.removeHandler(caplog.handler)
        return caplog.text

    return resume


def test_the_same_batches_on_as_many_processes_need_no_word(said):
    assert said((4, 2), (4, 2)) == ""


def test_other_processes_with_the_same_batches_are_mentioned(said):
    assert "on 2 processes and goes on on 1, at the same batches" in said((4, 2), (8, 1))


def test_another_batch_is_warned_of_with_the_size_that_fits(said):
    text = said((4, 2), (4, 1))
    assert "batches of 8 benign images (4 on each of 2 processes) and goes on at 4 (4 on each of 1)" in text
    assert "With per_device_train_batch_size=8 it goes on as it was." in text


def test_a_number_of_processes_that_cannot_share_the_batch_is_told_of(said):
    assert "On a number of processes that divides 8 it can go on" in said((4, 2), (3, 3))
