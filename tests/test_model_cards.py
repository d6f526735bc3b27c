"""The cards in model_cards/ are what their records say."""

from pathlib import Path

import pytest
from hub_server import card_problems
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from hf_immunize.cli.main import main as cli
from hf_immunize.hub.card import eval_results
from hf_immunize.hub.record import read_record


FOLDERS = sorted(path.parent for path in (Path(__file__).parents[1] / "model_cards").glob("*/immunization.json"))


def test_there_are_cards():
    assert len(FOLDERS) >= 3


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_card_is_what_its_record_says(folder):
    done = CliRunner().invoke(cli.app, ["card", str(folder), "--check"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_card_is_made_from_the_record_alone(folder, tmp_path):
    (tmp_path / "immunization.json").write_bytes((folder / "immunization.json").read_bytes())
    assert CliRunner().invoke(cli.app, ["card", str(tmp_path)]).exit_code == 0
    assert (tmp_path / "README.md").read_bytes() == (folder / "README.md").read_bytes()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_card_reads_back_and_is_accepted(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results == eval_results(read_record(folder))
    assert card_problems(str(card)) == []


def test_list_of_cards_is_complete():
    text = (Path(__file__).parents[1] / "model_cards" / "README.md").read_text()
    assert all(f"({folder.name}/README.md)" in text for folder in FOLDERS)


def test_readme_shows_the_card_of_the_demo():
    root = Path(__file__).parents[1]
    excerpt = (root / "README.md").read_text().split("<!-- card of the demo -->")[1].strip()
    card = (root / "model_cards" / "digits-demo" / "README.md").read_text()
    for line in excerpt.splitlines():
        assert line.removeprefix(">").strip().strip("*") in card
