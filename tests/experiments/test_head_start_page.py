"""The page of the benchmark says what its rows say, and no more."""

import json
import re

import pytest

from examples.head_start_page import GRID, grouped, main, main_table, sentences
from hf_immunize.errors import DataError


def row(title, removed, benign=0.0, seed=0, setting="vit_near"):
    """A row of two attackers, of each of which so much is removed; None where nothing is at stake."""
    names = [("ridge", "head_input"), ("last_stage", "fine_tuning")]
    attackers = [
        {"attacker": name, "access": access, "head_start": 0.3 if share is not None else 0.02, "removed": share}
        | {"interval": None if share is None else [share - 0.2, share + 0.2]}
        for (name, access), share in zip(names, removed, strict=True)
    ]
    best = {
        one["access"]: {"attacker": one["attacker"], "removed": one["removed"], "removed_interval": one["interval"]}
        for one in attackers
    }
    key = {"method": f"examples.field_methods:{title}", "setting": setting, "seed": seed, "changes": {}}
    return {
        "title": title,
        "key": key | {"preset": {"name": "quick", "version": 5}},
        "benign": {"difference": benign, "interval": [benign - 0.01, benign + 0.01]},
        "seconds": {"immunizing": 3.0, "audit": 5.0},
        "attackers": attackers,
        "removed": {"any_layer": None, **best},
        "cost": [],
        "hardware": "two cores",
        "command": f"python -m examples.benchmark {title}",
    }


ROWS = [
    row("undo", (0.5, -0.1), seed=0),
    row("undo", (0.7, 0.1), seed=1),
    row("leace", (0.9, None), benign=-0.05),
    row("unchanged", (0.0, 0.0)),
]


def test_cells_are_means_over_seeds_with_the_least_in_bold_and_lost_accuracy_marked():
    lines = main_table(grouped(ROWS))
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:-1]}
    assert lines[2].count("vit_near") == 1 and "".join(cells["*vit_near*"]) == ""
    assert cells["UNDO"] == ["0, 1", "+0.0", "3", "60% of 30", "**0% of 30**"]
    assert cells["LEACE as target †"] == ["0", "−5.0", "3", "**90% of 30**", "– of 2"]


def test_attackers_who_know_the_method_stand_apart_and_steps_beside_the_shares(tmp_path):
    rows = [row("undo", (0.5, -0.1)), row("undo", (0.4, -0.33))]
    rows[0]["cost"] = [{"attacker": "last_stage", "reference_steps": 4, "immunized_steps": 10, "is_bound": True}]
    rows[1]["attackers"][1]["attacker"] = "every_block"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main(["--rows", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "page.md")])
    page, _, apart = (tmp_path / "page.md").read_text().partition("## Under attackers who know the method")
    assert "≥ 2.5 ×" in page and "−10% of 30" in page and "−33%" not in page
    assert "**−33% of 30**" in apart


def test_ten_sentences_prefer_who_keeps_benign_accuracy_and_claim_nothing_without_a_head_start():
    said = sentences(grouped(ROWS))
    assert len(said) == 10
    assert "UNDO" in said[3] and "60%" in said[3] and "0 of 2 are below" in said[3]
    assert "no method" in said[4] and "LEACE as target † (vit_near: −5.0, −6.0 to −4.0)" in said[7]
    assert "Of 1 of 2 attackers" in said[2] and " 0 are among them" in said[9]


def test_the_page_holds_table_figure_and_the_commands_of_its_rows(tmp_path):
    rows = tmp_path / "rows.jsonl"
    with pytest.raises(DataError, match="found none"):
        main(["--rows", str(rows)])
    noted = [one | {"note": "Written by hand."} for one in ROWS[:2]]
    rows.write_text("".join(json.dumps(one) + "\n" for one in [*noted, *ROWS[2:]]))
    main(["--rows", str(rows), "--out", str(tmp_path / "docs" / "head-start.md")])
    page = (tmp_path / "docs" / "head-start.md").read_text()
    figure = re.search(r"!\[.*\]\((.*)\)", page)[1]
    assert (tmp_path / "docs" / figure).read_bytes()[:4] == b"\x89PNG"
    assert all(one["command"] in page for one in ROWS) and GRID in page and "arXiv:2306.03819" in page
    assert page.count("Written by hand.") == 1
