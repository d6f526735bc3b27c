"""Files are whole or absent, on disk when that is said, and known by their checksums."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_immunize import files
from hf_immunize.errors import ArgumentError, CheckpointError
from hf_immunize.files import check_writable, checked, remove_leftovers, staged_directory, with_checksum, write_whole


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_files_appear_all_at_once(tmp_path):
    with staged_directory(tmp_path / "model") as staging:
        (staging / "deep").mkdir()
        (staging / "deep" / "a").write_text("a")
        assert not (tmp_path / "model" / "deep").exists()
    assert content(tmp_path / "model") == {Path("deep/a"): b"a"}


def test_other_files_stay(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with staged_directory(tmp_path) as staging:
        (staging / "a").write_text("a")
    assert content(tmp_path) == {Path("notes"): b"mine", Path("a"): b"a"}


def test_files_are_moved_within_the_target_which_may_be_a_mount(tmp_path):
    with staged_directory(tmp_path / "model") as staging:
        assert staging.parent == tmp_path / "model"


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(CheckpointError, match="model"), staged_directory(tmp_path / "model"):
        pass


def test_errors_of_another_kind_pass_and_leave_nothing(tmp_path):
    with pytest.raises(KeyError), staged_directory(tmp_path / "model"):
        raise KeyError("x")
    assert not list(tmp_path.iterdir())


def test_files_and_then_their_names_are_on_disk_when_it_is_said(tmp_path, monkeypatch):
    calls = []
    flush, replace = files.flush, os.replace
    monkeypatch.setattr(files, "flush", lambda path: (calls.append(("flush", Path(path).name)), flush(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("replace", Path(b).name)), replace(a, b)))
    with staged_directory(tmp_path / "new" / "model") as staging:
        (staging / "deep").mkdir()
        for name in ("a", "deep/b"):
            (staging / name).write_text(name)
    assert calls[:4] == [("flush", "a"), ("flush", "b"), ("replace", "a"), ("replace", "b")]
    # The names in the folders, and those of the folders that are new.
    assert [name for _, name in calls[4:]] == ["deep", "model", "new", tmp_path.name]


def test_flushing_asks_the_system_for_files_and_folders(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: asked.append(os.fstat(descriptor).st_ino))
    write_whole(tmp_path / "a", "a")
    assert asked == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]


def test_a_text_is_whole_and_readable_by_others(tmp_path):
    assert write_whole(tmp_path / "deep" / "a.json", "é").read_bytes() == "é".encode()
    usual = tmp_path / "usual"
    usual.touch()
    assert (tmp_path / "deep" / "a.json").stat().st_mode == usual.stat().st_mode
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.json"]


def test_a_failure_within_is_told_once(tmp_path):
    with pytest.raises(CheckpointError) as caught, staged_directory(tmp_path), staged_directory(tmp_path / "deep"):
        raise OSError(28, "No space left on device")
    assert str(caught.value).count("Expected") == 1


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


@pytest.mark.parametrize("path", ["file", "file/below", "file/far/below"])
def test_a_folder_that_cannot_be_written_is_named(path, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match=f"--output-dir.*{path}"):
        check_writable(tmp_path / path, "--output-dir")


def test_a_folder_that_can_be_written_is_left_as_it_is(tmp_path):
    for folder in (tmp_path, tmp_path / "new" / "deep"):
        check_writable(folder, "--output-dir")
    assert not list(tmp_path.iterdir())


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
