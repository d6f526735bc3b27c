"""`hf-immunize push`, `verify` and `card`, as they are typed."""

import json
import sys
from pathlib import Path

import pytest
from hub_server import USER
from typer.testing import CliRunner

from hf_immunize.cli import main as cli


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


def test_verify_that_agrees_ends_with_0(checkpoint, data):
    done = typed("verify", checkpoint, *data)
    assert done.exit_code == 0
    assert "the figures agree with the record" in " ".join(done.output.split())


def test_verify_that_differs_ends_with_3(checkpoint, data):
    path = checkpoint / "immunization.json"
    values = json.loads(path.read_text())
    values["ratios"]["exact"]["log10_rir"] += 2
    path.write_text(json.dumps(values))
    assert typed("verify", checkpoint, *data).exit_code == 3


def test_verify_that_cannot_say_ends_with_4(checkpoint, data):
    swapped = ["--benign", data[3], "--harmful", data[1]]
    assert typed("verify", checkpoint, *swapped).exit_code == 4


def test_verify_gives_its_figures_as_json(checkpoint, data):
    done = typed("verify", checkpoint, *data, "--json")
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert (found["outcome"], found["exit_code"]) == ("agrees", 0)
    assert {"name", "claimed", "measured", "tolerance", "outcome", "note"} <= set(found["figures"][0])


def test_verify_needs_both_kinds_of_images(checkpoint, data):
    done = typed("verify", checkpoint, *data[:2])
    assert "Expected either --benign and --harmful" in str(done.exception)


def test_push_dry_run_lists_the_files(checkpoint):
    (checkpoint / "secret.txt").write_text("mine")
    done = typed("push", checkpoint, REPO, "--dry-run")
    assert done.exit_code == 0
    assert "model.safetensors" in done.output
    assert "secret.txt" not in done.output
    assert "Nothing was sent" in done.output


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
    words = {"push": [REPO, "--dry-run"], "verify": data, "card": ["--check"]}[command]
    monkeypatch.setattr("sys.argv", ["hf-immunize", command, str(checkpoint), *map(str, words)])
    with pytest.raises(SystemExit):
        cli.main()
    said = "".join(capsys.readouterr())
    assert said
    assert [command for command in ("\x1b[2J", "\x1b]", "\x07", "\u202e") if command in said] == []


@pytest.mark.hub
def test_push_says_what_it_did(checkpoint, online):
    first, second = (typed("push", checkpoint, REPO, "--private") for _ in range(2))
    assert f"Pushed to {online.url}/{REPO}" in first.output
    assert "no commit was made" in second.output
    assert online.repos[REPO].private


def test_card_is_written_and_checked(checkpoint):
    assert typed("card", checkpoint, "--license", "mit").exit_code == 0
    assert typed("card", checkpoint, "--check").exit_code == 0
    path = checkpoint / "README.md"
    path.write_text(path.read_text().replace("ill-conditioned", "unbreakable"))
    assert typed("card", checkpoint, "--check").exit_code == 1


def test_card_without_record_is_one_sentence(tmp_path):
    assert "carries no evidence" in str(typed("card", tmp_path).exception)
