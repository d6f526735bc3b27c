import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hf_immunize import cli
from hf_immunize.errors import DataError


def test_help_names_the_commands():
    text = CliRunner().invoke(cli.app, ["--help"]).output
    assert "demo" in text
    assert "train" in text


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from hf_immunize import cli\n"
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


def test_other_errors_keep_their_traceback(monkeypatch):
    def fail():
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(KeyError):
        cli.main()
