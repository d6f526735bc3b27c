import json
import re

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from hf_immunize.cli.ceiling import ceiling


app = typer.Typer()
app.command("ceiling")(ceiling)


@app.callback()
def several():
    """So that the command keeps its name."""


def call(*arguments, code=0):
    result = CliRunner().invoke(app, ["ceiling", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == code, result.output
    return re.sub(r"\s+", " ", result.output)


@pytest.fixture
def files(tmp_path):
    generator = np.random.default_rng(0)
    P, H = (
        generator.normal(size=(60, 5)) * np.array([300, 1, 30, 3, 1]),
        generator.normal(size=(50, 5)) * np.array([3, 30, 1, 10, 300]),
    )
    np.save(tmp_path / "p.npy", P)
    np.save(tmp_path / "h.npy", H)
    return tmp_path / "p.npy", tmp_path / "h.npy", P, H


def test_help_teaches_what_the_number_means():
    text = call("--help")
    for words in ("linear probe", "condition number", "RIR", "CEILING", "not a defence", "npy"):
        assert words in text


def test_numbers_sentence_and_figure(files, tmp_path):
    figure = tmp_path / "frontier.png"
    text = call(*files[:2], "--figure", figure)
    assert "Ceiling of RIR:" in text and "A linear map can immunize" in text and "°" in text
    assert "60 × 5" in text and figure.stat().st_size < 200_000


def test_json_is_strict_and_agrees_with_the_library(files):
    from hf_immunize import rir_ceiling

    found = json.loads(call(*files[:2], "--json"))
    assert found["value"] == pytest.approx(rir_ceiling(files[2], files[3]).value)
    assert found["infinite"] is False and len(found["angles"]) == 5


def test_an_infinite_ceiling_is_said_and_is_valid_json(files, tmp_path):
    P = files[2].copy()
    P[:, 4] = 0
    np.save(tmp_path / "p0.npy", P)
    text = call(tmp_path / "p0.npy", files[1])
    assert "infinite" in text and "1 harmful directions are absent" in text
    found = json.loads(call(tmp_path / "p0.npy", files[1], "--json"))
    assert found["value"] is None and found["infinite"] is True and found["harmful_only"] == 1


def test_safetensors_with_a_key(files, tmp_path):
    for name, X in zip("ph", files[2:], strict=True):
        save_file({"features": torch.tensor(X), "labels": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    paths = tmp_path / "p.safetensors", tmp_path / "h.safetensors"
    assert "Ceiling" in call(*paths, "--key", "features")
    assert "features, labels" in call(*paths, code=2)


def test_constant_columns_are_reported_when_standardizing(files, tmp_path):
    P = files[2].copy()
    P[:, 2] = 7
    np.save(tmp_path / "p1.npy", P)
    assert "1 constant columns of the benign data became 0 (first: 2)" in call(
        tmp_path / "p1.npy", files[1], "--standardize"
    )


def test_few_samples_are_noted(files, tmp_path):
    np.save(tmp_path / "few.npy", files[2][:3])
    assert "3 benign samples in 5 dimensions" in call(tmp_path / "few.npy", files[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda P: P[:, :4], "same columns"),
        (lambda P: P[:1], "two rows"),
        (lambda P: np.where(np.arange(5) == 3, np.nan, P), "row 0, column 3"),
        (lambda P: 0 * P, "zero"),
    ],
)
def test_bad_data_is_one_sentence(files, tmp_path, change, words):
    np.save(tmp_path / "bad.npy", change(files[2]))
    text = call(tmp_path / "bad.npy", files[1], code=2)
    assert text.startswith("Error:") and words in text and "Traceback" not in text


def test_bad_options_are_one_sentence(files):
    assert "float32" in call(*files[:2], "--produced-dtype", "int8", code=2)
    assert "sine" in call(*files[:2], "--tolerance", "3", code=2)
    assert "no file" in call("nowhere.npy", files[1], code=2)


def test_complex_data_are_refused(files, tmp_path):
    np.save(tmp_path / "c.npy", files[2] * 1j)
    assert "Expected real numbers in the benign data" in call(tmp_path / "c.npy", files[1], code=2)


def test_figure_is_checked_before_any_work_and_its_folder_created(files, tmp_path):
    call(*files[:2], "--figure", tmp_path / "new" / "deep" / "f.png")
    assert (tmp_path / "new" / "deep" / "f.png").stat().st_size > 1000
    # The missing data would be found first, if the figure were not looked at before them.
    assert ".png" in call("nowhere.npy", files[1], "--figure", tmp_path / "f.xyz", code=2)
    assert "cannot be made" in call("nowhere.npy", files[1], "--figure", files[0] / "sub" / "f.png", code=2)
    (tmp_path / "d.png").mkdir()
    assert "found the folder" in call("nowhere.npy", files[1], "--figure", tmp_path / "d.png", code=2)


def test_a_figure_that_fails_costs_no_number(tmp_path):
    np.save(tmp_path / "p.npy", np.eye(4)[:2])
    np.save(tmp_path / "h.npy", np.eye(4)[2:])
    text = call(tmp_path / "p.npy", tmp_path / "h.npy", "--figure", tmp_path / "f.png", code=2)
    assert "Ceiling of RIR: infinite" in text and "share no direction" in text


@pytest.mark.parametrize("name", ["[v1]y.npy", "[/v1]y.npy", ":smile:y.npy"])
def test_user_text_is_no_markup(files, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert name in call(name, files[1], code=2)
    figure = name.replace(".npy", ".png").replace("/", "")
    assert f"Frontier saved to {figure}." in call(*files[:2], "--figure", figure)


def test_coded_columns_are_listed(tmp_path):
    rows = "zone[/b],size\na,1\nb,2\na,4\n"
    (tmp_path / "p.csv").write_text(rows)
    assert "order of their values: zone[/b]." in call(tmp_path / "p.csv", tmp_path / "p.csv")
    found = json.loads(call(tmp_path / "p.csv", tmp_path / "p.csv", "--json"))
    assert "zone[/b]" in found["notes"][0]
