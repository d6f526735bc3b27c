"""Files are whole or absent, on disk when that is said, and known by their checksums."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import BUILDERS

from hf_immunize.audit.journal import Journal
from hf_immunize.audit.result import Outcome
from hf_immunize.errors import ArgumentError, CheckpointError
from hf_immunize.features.cache import TrunkCache
from hf_immunize.features.trunk import split_trunk
from hf_immunize.files import check_writable, checked, remove_leftovers, staged_directory, with_checksum, write_whole
from hf_immunize.hub.record import BaseModelRecord, ImmunizationRecord, MethodRecord, write_record
from hf_immunize.vision.scope import select_trainable


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_files_appear_all_at_once_and_others_stay(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "notes").write_text("mine")
    with staged_directory(target) as staging:
        assert staging.parent == target  # which may be a mount of its own
        (staging / "deep").mkdir()
        (staging / "deep" / "a").write_text("a")
        assert not (target / "deep").exists()
    assert content(target) == {Path("notes"): b"mine", Path("deep/a"): b"a"}


def test_a_failure_is_told_once_and_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), staged_directory(tmp_path / "model"):
        raise KeyError("x")
    with pytest.raises(CheckpointError) as caught, staged_directory(tmp_path / "a"), staged_directory(tmp_path / "b"):
        raise OSError(28, "No space left on device")
    assert str(caught.value).count("Expected") == 1
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").write_text("a file")
    with pytest.raises(CheckpointError, match="model"), staged_directory(tmp_path / "model"):
        pass


def a_directory(folder):
    with staged_directory(folder) as staging:
        (staging / "deep").mkdir()
        for name in ("a", "deep/b"):
            (staging / name).write_text(name)


def a_record(folder):
    write_record(folder, ImmunizationRecord(MethodRecord("kappa", "last_stage", 2, 0), BaseModelRecord("base")))


def a_journal(folder):
    journal = Journal(folder, "weights and data", [])
    for seed in (0, 1):
        journal.add(Outcome("ridge", "head_input", "immunized", "harmful", "head", seed, "float64"))


def a_cached_trunk(folder):
    model = BUILDERS["resnet"]().eval()
    split = split_trunk(model, select_trainable(model, "last_stage"), (3, 32, 32))
    images = [{"pixel_values": torch.randn(3, 32, 32)} for _ in range(4)]
    folder.parent.mkdir(parents=True)
    TrunkCache(model, split, images, folder, progress=False).write()


@pytest.mark.parametrize("write", [a_directory, a_record, a_journal, a_cached_trunk])
def test_files_then_folders_are_flushed_before_a_rename_and_the_new_names_after_it(write, tmp_path, monkeypatch):
    calls, replace = [], os.replace

    def known(path):
        return os.stat(path).st_ino, os.stat(path).st_size if os.path.isfile(path) else None

    def flushed(descriptor):
        about = os.fstat(descriptor)
        calls.append((about.st_ino, about.st_size if stat.S_ISREG(about.st_mode) else None))

    def renamed(source, target):
        within = [path for path in Path(source).rglob("*") if path.is_file()] if os.path.isdir(source) else [source]
        assert within and all(known(path) in calls for path in within)
        assert os.path.isfile(source) or calls[-1] == known(source)  # a folder itself, after its files
        calls.append(("renamed", os.fspath(Path(target).parent)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    write(tmp_path / "new" / "made")
    written = [path for path in (tmp_path / "new" / "made").rglob("*") if path.is_file()]
    assert written and all(known(path) in calls for path in written)
    for index, (what, into) in enumerate(calls):
        assert what != "renamed" or known(into) in calls[index:]
    if write is not a_cached_trunk:  # which is made where its caller has a folder
        assert {known(tmp_path), known(tmp_path / "new")} <= set(calls)
    if write is a_journal:  # once for its first line, and then with each line
        assert len([ino for ino, _ in calls if ino == known(written[0])[0]]) == 3


def test_a_text_is_whole_and_readable_by_others(tmp_path):
    assert write_whole(tmp_path / "deep" / "a.json", "é").read_bytes() == "é".encode()
    usual = tmp_path / "usual"
    usual.touch()
    assert (tmp_path / "deep" / "a.json").stat().st_mode == usual.stat().st_mode
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.json"]


KILLED = """
import os, sys
from hf_immunize.files import staged_directory
with staged_directory(sys.argv[1]) as staging:
    (staging / "half").write_text("half")
    os._exit(9)
"""


def test_what_a_killed_process_left_goes_and_what_is_being_written_stays(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    (left,) = tmp_path.glob("_unfinished-*")
    with staged_directory(tmp_path) as staging:
        (staging / "a").write_text("a")
        remove_leftovers(tmp_path)
        assert not left.exists() and (staging / "a").exists()
    assert content(tmp_path) == {Path("a"): b"a"}


def test_a_folder_that_cannot_be_written_is_named_and_one_that_can_left_as_it_is(tmp_path):
    for folder in (tmp_path, tmp_path / "new" / "deep"):
        check_writable(folder, "--output-dir")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for path in ("file", "file/below", "file/far/below"):
        with pytest.raises(ArgumentError, match=f"--output-dir.*{path}"):
            check_writable(tmp_path / path, "--output-dir")


def test_any_other_byte_in_a_line_is_seen():
    values = {"accuracy": 0.5, "name": "é", "steps": [1, None, float("inf")]}
    line = with_checksum(values)
    assert checked(line) == values
    for position in range(len(line)):
        for bit in range(7):
            other = line[:position] + chr(ord(line[position]) ^ 1 << bit) + line[position + 1 :]
            try:
                found = checked(other)
            except ValueError:
                continue
            assert found == values
