import re

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from hf_immunize import rir_ceiling
from hf_immunize.cli.ceiling import ceiling
from hf_immunize.errors import ImmunizationError


app = typer.Typer()
app.command("ceiling")(ceiling)
app.callback()(lambda: None)  # so that the command keeps its name


def call(*arguments, fails=False):
    """What is printed, and the sentence that `main` makes of an error."""
    result = CliRunner().invoke(app, ["ceiling", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})
    assert isinstance(result.exception, ImmunizationError) if fails else result.exit_code == 0, result.output
    return re.sub(r"\s+", " ", result.output + (str(result.exception) if fails else ""))


@pytest.fixture
def saved(tmp_path):
    """Paths of two matrices."""

    def save(P, H):
        for name, X in (("p", P), ("h", H)):
            np.save(tmp_path / f"{name}.npy", X)
        return tmp_path / "p.npy", tmp_path / "h.npy"

    return save


GENERATOR = np.random.default_rng(0)
P = GENERATOR.normal(size=(60, 5)) * np.array([300, 1, 30, 3, 1])
H = GENERATOR.normal(size=(50, 5)) * np.array([3, 30, 1, 10, 300])


@pytest.mark.parametrize("name", ["new/deep/frontier.png", "[v1]y.png", ":smile:y.png"])
def test_numbers_sentence_and_figure(saved, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    text = call(*saved(P, H), "--figure", name)
    assert f"{rir_ceiling(P, H).value:.4g}" in text and "60 × 5" in text
    assert f"Frontier saved to {name}." in text  # what a user typed is no markup
    figure = tmp_path / name
    assert figure.read_bytes().startswith(b"\x89PNG") and 5_000 < figure.stat().st_size < 200_000


def test_what_limits_the_numbers_is_noted(saved):
    assert "3 benign samples in 5 dimensions" in call(*saved(P[:3], H))
    text = call(*saved(P * (np.arange(5) < 4), H))
    assert "infinite" in text and "1 harmful directions are absent" in text
    assert "found zero" in call(*saved(0 * P, H), fails=True)


def test_a_figure_that_fails_costs_no_number(saved, tmp_path):
    text = call(*saved(np.eye(4)[:2], np.eye(4)[2:]), "--figure", tmp_path / "f.png", fails=True)
    assert "Ceiling of RIR: infinite" in text and "share no direction" in text
