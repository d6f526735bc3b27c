"""A run directory keeps what is finished, whatever happens to it."""

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
    journal = Journal(tmp_path, "mark", [])
    journal.add(outcome(0))
    journal.add(outcome(1))
    return tmp_path


def test_outcomes_come_back_without_loss(kept):
    assert list(Journal(kept, "mark", []).outcomes.values()) == [outcome(0), outcome(1)]


def test_half_a_line_is_dropped_with_a_sentence(kept):
    path = kept / "outcomes.jsonl"
    path.write_text(path.read_text()[:-20])
    said = []
    assert list(Journal(kept, "mark", said).outcomes.values()) == [outcome(0)]
    assert "1 unfinished" in said[0]


def test_what_was_mended_stays_mended(kept):
    path = kept / "outcomes.jsonl"
    path.write_text(path.read_text()[:-20])
    Journal(kept, "mark", []).add(outcome(2))
    said = []
    assert list(Journal(kept, "mark", said).outcomes.values()) == [outcome(0), outcome(2)]
    assert said == []


@pytest.mark.parametrize("content", ["", "{", "\0\0\0\n", '{"attacker": "ridge"}\n'])
def test_a_damaged_file_is_started_anew(tmp_path, content):
    (tmp_path / "outcomes.jsonl").write_text(content)
    said = []
    Journal(tmp_path, "mark", said).add(outcome(0))
    assert said
    assert len(Journal(tmp_path, "mark", []).outcomes) == 1


def test_outcomes_of_other_weights_are_refused(kept):
    with pytest.raises(ArgumentError, match="other weights"):
        Journal(kept, "another mark", [])


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="another run directory"):
        Journal(tmp_path / "file", "mark", [])


def test_fingerprint_tells_weights_apart():
    marks = {fingerprint({"immunized": tiny_vit(seed)}, {}, {}) for seed in (0, 0, 1)}
    assert len(marks) == 2
