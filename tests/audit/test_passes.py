"""Features on disk are whole, and leave nothing behind."""

import pytest
import torch

from hf_immunize.audit import journal
from hf_immunize.audit.journal import Pass, StoredPasses, make_folder
from hf_immunize.errors import DiskSpaceError
from hf_immunize.features.extract import Extraction, Layer


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

    monkeypatch.setattr(journal, "save_kept", full)
    with pytest.raises(DiskSpaceError, match=r"No space left.*one process"):
        StoredPasses(tmp_path, WANTED).write(WANTED[0], extraction(0), 0)


def test_what_a_killed_audit_left_is_removed_and_its_outcomes_stay(tmp_path):
    left = make_folder(tmp_path)
    (left / "0").mkdir()
    (tmp_path / "outcomes.jsonl").write_text("{}")
    made = make_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([made.name, "outcomes.jsonl"])
