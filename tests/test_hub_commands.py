"""`hf-immunize push`, `verify` and `card`, as they are typed."""

import json
import sys
from pathlib import Path

import pytest
from hub_server import USER
from typer.testing import CliRunner

from hf_immunize.cli import main as cli
from hf_immunize.hub.record import read_record, write_record


sys.path.insert(0, str(Path(__file__).parent / "hub"))
from checkpoints import benign_images, harmful_images, tiny_model, write_checkpoint


REPO = f"{USER}/immunized"


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint")[0]


@pytest.fixture
def data(tmp_path):
    benign_images().save_to_disk(tmp_path / "benign")
    harmful_images().save_to_disk(tmp_path / "harmful")
    return ["--benign", tmp_path / "benign", "--harmful", tmp_path / "harmful"]


def typed(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_verify_ends_with_what_it_found(checkpoint, data):
    done = typed("verify", checkpoint, *data)
    assert done.exit_code == 0
    assert "the figures agree with the record" in " ".join(done.output.split())
    assert typed("verify", checkpoint, "--benign", data[3], "--harmful", data[1]).exit_code == 4
    path = checkpoint / "immunization.json"
    values = json.loads(path.read_text())
    values["ratios"]["exact"]["log10_rir"] += 2
    path.write_text(json.dumps(values))
    assert typed("verify", checkpoint, *data).exit_code == 3


ODD = "\x1b[2Jodd\x1b]0;title\x07\u202e"


def odd_weights(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / f"{ODD}.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tiny_model().state_dict(), f"{ODD}.safetensors")}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


def odd_field(checkpoint):
    path = checkpoint / "immunization.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ratios": {ODD: 1}}))


def odd_link(checkpoint):
    (checkpoint / f"{ODD}.safetensors").symlink_to(f"/{ODD}")


@pytest.mark.parametrize("spoil", [odd_weights, odd_field, odd_link])
@pytest.mark.parametrize("command", ["push", "verify", "card"])
def test_names_do_not_command_the_terminal(command, spoil, checkpoint, data, monkeypatch, capsys):
    spoil(checkpoint)
    words = {"push": [REPO, "--dry-run"], "verify": data, "card": []}[command]
    monkeypatch.setattr("sys.argv", ["hf-immunize", command, str(checkpoint), *map(str, words)])
    with pytest.raises(SystemExit):
        cli.main()
    said = "".join(capsys.readouterr())
    assert said
    assert [command for command in ("\x1b[2J", "\x1b]", "\x07", "\u202e") if command in said] == []


@pytest.mark.hub
def test_push_says_what_it_did(checkpoint, online):
    (checkpoint / "secret.txt").write_text("mine")
    dry, first, second = (typed("push", checkpoint, REPO, *word) for word in (["--dry-run"], ["--private"], []))
    assert "model.safetensors" in dry.output and "secret.txt" not in dry.output and "Nothing was sent" in dry.output
    assert f"Pushed to {online.url}/{REPO}" in first.output
    assert "no commit was made" in second.output
    assert online.repos[REPO].private


def test_card_is_written_from_the_record(checkpoint):
    assert typed("card", checkpoint, "--license", "mit", "--name", "Mine").exit_code == 0
    assert "license: mit" in (checkpoint / "README.md").read_text()
    record, said = read_record(checkpoint), []
    for audit in (record.audit, None):
        record.audit = audit
        write_record(checkpoint, record)
        said.append([typed("card", checkpoint).output, typed("push", checkpoint, REPO, "--dry-run").output])
    assert ["--attach" in text for both in said for text in both] == [False, False, True, True]
    (checkpoint / "immunization.json").unlink()
    assert "carries no evidence" in str(typed("card", checkpoint).exception)
