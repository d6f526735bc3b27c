import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from hf_immunize import rir_ceiling
from hf_immunize.cli.ceiling import ceiling
from hf_immunize.errors import ImmunizationError


app = typer.Typer()
app.command("ceiling")(ceiling)


@app.callback()
def several():
    """So that the command keeps its name."""


def call(*arguments, fails=False):
    """What is printed, and the sentence that `main` makes of an error."""
    result = CliRunner().invoke(app, ["ceiling", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})
    assert isinstance(result.exception, ImmunizationError) if fails else result.exit_code == 0, result.output
    return re.sub(r"\s+", " ", result.output + (str(result.exception) if fails else ""))


@pytest.fixture
def files(tmp_path):
    generator = np.random.default_rng(0)
    P = generator.normal(size=(60, 5)) * np.array([300, 1, 30, 3, 1])
    H = generator.normal(size=(50, 5)) * np.array([3, 30, 1, 10, 300])
    np.save(tmp_path / "p.npy", P)
    np.save(tmp_path / "h.npy", H)
    return tmp_path / "p.npy", tmp_path / "h.npy", P, H


@pytest.fixture
def changed(files, tmp_path):
    """The benign data after a change, in a file of its own."""

    def change(function):
        np.save(tmp_path / "changed.npy", function(files[2].copy()))
        return tmp_path / "changed.npy"

    return change


def test_numbers_sentence_and_figure(files, tmp_path):
    figure = tmp_path / "new" / "deep" / "frontier.png"
    text = call(*files[:2], "--figure", figure)
    assert f"{rir_ceiling(files[2], files[3]).value:.4g}" in text and "60 × 5" in text and "°" in text
    assert figure.read_bytes().startswith(b"\x89PNG") and 5_000 < figure.stat().st_size < 200_000


def test_json_is_strict_and_agrees_with_the_library(files, changed):
    found = json.loads(call(*files[:2], "--json"))
    assert found["value"] == pytest.approx(rir_ceiling(files[2], files[3]).value)
    assert found["infinite"] is False and len(found["angles"]) == 5
    lacking = changed(lambda P: P * (np.arange(5) < 4))
    found = json.loads(call(lacking, files[1], "--json"))
    assert found["value"] is None and found["infinite"] is True and found["harmful_only"] == 1
    text = call(lacking, files[1])
    assert "infinite" in text and "1 harmful directions are absent" in text


def test_safetensors_with_a_key(files, tmp_path):
    for name, X in zip("ph", files[2:], strict=True):
        save_file({"features": torch.tensor(X), "labels": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    paths = tmp_path / "p.safetensors", tmp_path / "h.safetensors"
    assert "Ceiling" in call(*paths, "--key", "features")
    assert "features, labels" in call(*paths, fails=True)


def test_what_limits_the_numbers_is_noted(files, changed):
    constant = changed(lambda P: np.where(np.arange(5) == 2, 7, P))
    assert "1 constant columns of the benign data" in call(constant, files[1], "--standardize")
    assert "3 benign samples in 5 dimensions" in call(changed(lambda P: P[:3]), files[1])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda P: P[:, :4], "4 and 5"),
        (lambda P: P[:1], "benign data, found 1"),
        (lambda P: np.where(np.arange(5) == 3, np.nan, P), "row 0, column 3"),
        (lambda P: 0 * P, "benign data with a spectrum, found zero"),
        (lambda P: P * 1j, "benign data, found torch.complex128"),
    ],
)
def test_bad_data_are_named(files, changed, change, found):
    assert found in call(changed(change), files[1], fails=True)


def test_bad_options_are_named_before_any_work(files, tmp_path):
    (tmp_path / "d.png").mkdir()
    for arguments, found in (
        (("--produced-dtype", "int8"), "int8"),
        (("--tolerance", "3"), "3"),
        (("--figure", tmp_path / "f.xyz"), "f.xyz"),
        (("--figure", files[0] / "sub" / "f.png"), "p.npy/sub"),
        (("--figure", tmp_path / "d.png"), "d.png"),
    ):
        # The missing data would be found first, if the figure were not looked at before them.
        assert found in call("nowhere.npy" if "--figure" in arguments else files[0], files[1], *arguments, fails=True)


def test_a_figure_that_fails_costs_no_number(tmp_path):
    np.save(tmp_path / "p.npy", np.eye(4)[:2])
    np.save(tmp_path / "h.npy", np.eye(4)[2:])
    text = call(tmp_path / "p.npy", tmp_path / "h.npy", "--figure", tmp_path / "f.png", fails=True)
    assert "Ceiling of RIR: infinite" in text and "share no direction" in text


@pytest.mark.parametrize(
    ("P", "H", "label", "title"),
    [
        (np.diag([1.0, 5, 2]), [[1.0, 2.0, 0.5], [0.2, 1.0, 4.0]], "{0.value:.3g}", "can reach"),
        (np.diag([1.0, 5, 2]), np.ones((4, 3)), "one harmful direction", "can reach"),
        (
            np.diag([1.0, 5, 0]),
            np.diag([3.0, 1, 2]),
            "shared directions: RIR = {0.common_value:.3g}",
            "directions (2)",
        ),
    ],
)
def test_legend_and_title_say_what_the_line_is_for(tmp_path, monkeypatch, P, H, label, title):
    drawn = []
    monkeypatch.setattr(plt, "close", lambda figure: drawn.append(figure.axes[0]))
    np.save(tmp_path / "p.npy", P)
    np.save(tmp_path / "h.npy", H)
    call(tmp_path / "p.npy", tmp_path / "h.npy", "--figure", tmp_path / "f.png")
    assert label.format(rir_ceiling(P, H)) in drawn[0].get_legend().get_texts()[0].get_text()
    assert drawn[0].get_title().endswith(title)


@pytest.mark.parametrize("name", ["[v1]y.npy", "[/v1]y.npy", ":smile:y.npy"])
def test_user_text_is_no_markup(files, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    figure = name.replace(".npy", ".png").replace("/", "")
    assert f"Frontier saved to {figure}." in call(*files[:2], "--figure", figure)


def test_coded_columns_are_listed(tmp_path):
    (tmp_path / "p.csv").write_text("zone[/b],size\na,1\nb,2\na,4\n")
    assert "order of their values: zone[/b]." in call(tmp_path / "p.csv", tmp_path / "p.csv")
    assert "zone[/b]" in json.loads(call(tmp_path / "p.csv", tmp_path / "p.csv", "--json"))["notes"][0]
