"""The card of a run: with the attacks in it, and, where asked for, kept in ``model_cards/``."""

import shutil
from pathlib import Path
from typing import Any

from hf_immunize.audit.names import label
from hf_immunize.audit.report import AuditReport
from hf_immunize.hub.card import CARD_NAME, attach_audit
from hf_immunize.hub.record import RECORD_NAME, read_record


CARDS = Path(__file__).resolve().parents[2] / "model_cards"


def finish_card(model: Path, report: AuditReport) -> None:
    """Write what the attacks found into record and card.

    Args:
        model: Folder of the checkpoint.
        report: Of the attacks on it and on the model before.
    """
    found: dict[str, Any] = report.for_card()
    named = {
        access: attack and attack | {"attacker": label(attack["attacker"])}
        for access, attack in found["strongest"].items()
    }
    attach_audit(model, found | {"strongest": named})


def keep_card(model: Path, name: str, title: str, cards: Path | None = None) -> Path:
    """Copy record, card and figures of a run, without its weights, and name them in the folder's list.

    Args:
        model: Folder of the checkpoint.
        name: Of the run.
        title: Of the experiment.
        cards: Folder of all cards; by default that of this repository.

    Returns:
        The card.
    """
    cards = cards or CARDS
    place = cards / name
    place.mkdir(parents=True, exist_ok=True)
    for file in (CARD_NAME, RECORD_NAME, *read_record(model).figures):
        shutil.copyfile(model / file, place / file)
    listing = cards / "README.md"
    lines = (
        listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else ["| folder | run |", "|---|---|"]
    )
    entry = f"| [{name}]({name}/README.md) | {title}: [docs/results/networks.md](../docs/results/networks.md) |"
    lines = [line for line in lines if f"]({name}/README.md)" not in line]
    last = max(index for index, line in enumerate(lines) if line.startswith("|"))
    listing.write_text("\n".join([*lines[: last + 1], entry, *lines[last + 1 :]]) + "\n", encoding="utf-8")
    return place / CARD_NAME
