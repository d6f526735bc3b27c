import logging
import subprocess
import sys
import unicodedata

import pytest
from typer.testing import CliRunner

from hf_immunize.cli import main as cli
from hf_immunize.errors import DataError


def test_help_names_the_commands():
    text = CliRunner().invoke(cli.app, ["--help"]).output
    assert "demo" in text
    assert "train" in text


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from hf_immunize.cli import main as cli\n"
        "CliRunner().invoke(cli.app, ['--help'])\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_named_error_becomes_one_sentence(monkeypatch, capsys):
    def fail():
        raise DataError("Expected an image, found none. Give one.")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip() == "DataError: Expected an image, found none. Give one."


COMMANDS = {
    "train": "--model {0}/none --benign {0}/none --harmful {0}/none --use_cpu --report_to none --output_dir",
    "audit": "{0}/none --harmful {0}/none --output-dir",
    "demo": "--output-dir",
    "ceiling": "{0}/none.npy {0}/none.npy --figure",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_read(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    words = COMMANDS[command].format(tmp_path).split()
    monkeypatch.setattr(sys, "argv", ["hf-immunize", command, *words, str(tmp_path / "file" / "below.png")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert str(tmp_path / "file") in said.err.replace("\n", "") and "none" not in said.err


@pytest.mark.parametrize("name", ["\x1b[2J\x1b]0;x\x07", "\u202eevil", "\x9b31m", "a\rb", "\ud800"])
def test_no_name_commands_the_terminal(monkeypatch, capsys, caplog, name):
    def fail():
        logging.getLogger("hf_immunize.data.sources").warning("%s", f"Left out {name}.")
        raise DataError(f"Expected an image, found none in {name}. Give one.")

    monkeypatch.setattr(cli, "app", fail)
    before = logging.getLogRecordFactory()
    try:
        with pytest.raises(SystemExit):
            cli.main()
    finally:
        logging.setLogRecordFactory(before)
    for said in (capsys.readouterr().err, caplog.messages[0]):
        assert "found none in" in said or "Left out" in said
        assert not [c for c in said.rstrip("\n") if unicodedata.category(c) in ("Cc", "Cf", "Cs")]


def test_other_errors_keep_their_traceback(monkeypatch):
    def fail():
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(KeyError):
        cli.main()
