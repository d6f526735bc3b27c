"""The cards in model_cards/ are what their records say."""

from pathlib import Path

import pytest
from hub_server import card_problems
from huggingface_hub import ModelCard

from hf_immunize.hub.card import eval_results, record_rows, render_card
from hf_immunize.hub.record import read_record


ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/immunization.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_card_is_what_its_record_says(folder):
    record, text = read_record(folder), (folder / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.eval_results == eval_results(record)
    assert card_problems(text) == []
    assert [row for row in record_rows(record) if f"| {' | '.join(row)} |" not in text] == []
    assert all(f"({name})" in text for name in record.figures)
    assert text == str(render_card(record)), "run make cards"


def test_list_of_cards_is_complete():
    text = (ROOT / "model_cards" / "README.md").read_text(encoding="utf-8")
    assert len(FOLDERS) >= 3
    assert all(f"({folder.name}/README.md)" in text for folder in FOLDERS)
