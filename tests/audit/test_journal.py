"""A run directory keeps what is finished, whatever happens to it: outcomes, features, and parts of processes."""

import pytest
from attacked import tiny_vit

from hf_immunize.audit.journal import Journal, fingerprint
from hf_immunize.audit.result import Outcome
from hf_immunize.errors import ArgumentError, CheckpointError


def outcome(seed):
    return Outcome(
        "ridge", "head_input", "immunized", "harmful", "head", seed, "float64", accuracy=0.5, settings={"k": 1}
    )


@pytest.fixture
def kept(tmp_path):
    made = Journal(tmp_path, "mark", [])
    made.add(outcome(0))
    made.add(outcome(1))
    return tmp_path


def test_outcomes_come_back_without_loss_and_those_of_other_weights_are_refused(kept):
    assert list(Journal(kept, "mark", []).outcomes.values()) == [outcome(0), outcome(1)]
    with pytest.raises(ArgumentError, match="other weights"):
        Journal(kept, "another mark", [])


def test_half_a_line_is_dropped_with_a_sentence_and_stays_mended(kept):
    path = kept / "outcomes.jsonl"
    path.write_text(path.read_text()[:-20])
    said, again = [], []
    found = Journal(kept, "mark", said)
    assert list(found.outcomes.values()) == [outcome(0)] and "1 unfinished" in said[0]
    found.add(outcome(2))
    assert list(Journal(kept, "mark", again).outcomes.values()) == [outcome(0), outcome(2)] and again == []


@pytest.mark.parametrize("content", ["", "{", "\0\0\0\n", '{"attacker": "ridge"}\n'])
def test_a_damaged_file_is_started_anew(tmp_path, content):
    (tmp_path / "outcomes.jsonl").write_text(content)
    said = []
    Journal(tmp_path, "mark", said).add(outcome(0))
    assert said
    assert len(Journal(tmp_path, "mark", []).outcomes) == 1


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="another run directory"):
        Journal(tmp_path / "file", "mark", [])


def test_fingerprint_tells_weights_apart():
    marks = {fingerprint({"immunized": tiny_vit(seed)}, {}, {}) for seed in (0, 0, 1)}
    assert len(marks) == 2
