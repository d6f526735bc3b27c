"""A run directory keeps what is finished, whatever happens to it: outcomes, features, and parts of processes."""

import pytest
import torch
from attacked import tiny_vit

from hf_immunize.audit import journal
from hf_immunize.audit.journal import Journal, Pass, StoredPasses, fingerprint, make_folder
from hf_immunize.audit.result import Outcome
from hf_immunize.errors import ArgumentError, CheckpointError, DiskSpaceError
from hf_immunize.features.extract import Extraction, Layer


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


# Parts of several processes


LAYER = Layer("blocks.0", False, (4,))
WANTED = [Pass("reference", "harmful", side, ((LAYER, "pooled"),)) for side in ("train", "test")]


def extraction(value):
    rows = torch.full((2, 3), float(value))
    return Extraction(rows, rows + 10, {LAYER.label("pooled"): rows + 20})


def test_parts_are_joined_in_the_order_of_processes(tmp_path):
    stored = StoredPasses(tmp_path, WANTED)
    for process in (2, 0):
        stored.write(WANTED[1], extraction(process), process)
    stored.write(WANTED[1], None, 1)  # it had no images
    found = stored.read(WANTED[1])
    assert found.features[:, 0].tolist() == [0, 0, 2, 2]
    assert found.logits[:, 0].tolist() == [10, 10, 12, 12]
    assert found.views["blocks.0 (pooled)"][:, 0].tolist() == [20, 20, 22, 22]


def test_a_full_disk_is_named_with_what_to_do(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal, "_save", full)
    with pytest.raises(DiskSpaceError, match=r"No space left.*one process"):
        StoredPasses(tmp_path, WANTED).write(WANTED[0], extraction(0), 0)


def test_what_a_killed_audit_left_is_removed_and_its_outcomes_stay(tmp_path):
    left = make_folder(tmp_path)
    (left / "0").mkdir()
    (tmp_path / "outcomes.jsonl").write_text("{}")
    made = make_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([made.name, "outcomes.jsonl"])
