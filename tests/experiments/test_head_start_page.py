"""The page of the benchmark says what its rows say, and no more."""

import json
import re

import pytest

from examples.head_start_page import GRID, commands, grouped, main, main_table, sentences
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
        "command": f"python -m examples.benchmark --method {title} --seed {seed} --preset quick",
    }


ROWS = [
    row("undo", (0.5, -0.1), seed=0),
    row("undo", (0.7, 0.1), seed=1),
    row("leace", (0.9, None), benign=-0.05),
    row("unchanged", (0.0, 0.0)),
]


def cells_of(lines):
    """First cell of a line to the others."""
    return {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:-1]}


def test_cells_are_means_over_seeds_with_the_least_in_bold_and_lost_accuracy_marked():
    lines = main_table(grouped(ROWS))
    cells = cells_of(lines)
    assert lines[2].count("vit_near") == 1 and cells["*vit_near: points at stake*"] == ["", "", "", "30", "30"]
    assert cells["UNDO"] == ["0, 1", "+0.0", "3", "60%", "**0%**"]
    assert cells["LEACE as target †"] == ["0", "−5.0", "3", "**90%**", "–"]


def test_the_strongest_of_a_class_precedes_its_attackers_and_those_who_know_the_method_are_marked(tmp_path):
    rows = [row("undo", (0.5, -0.1)), row("leace", (0.4, -0.33))]
    rows[0]["cost"] = [{"attacker": "last_stage", "reference_steps": 4, "immunized_steps": 10, "is_bound": True}]
    for one in rows:
        one["attackers"].append({**one["attackers"][1], "attacker": "every_block", "removed": -0.4})
    lines = main_table(grouped(rows))
    heads = [cell.strip() for cell in lines[0].split("|")[5:-1]]
    assert heads[1] == "strongest, fine-tuning" and heads[2] == "the last stage" and heads[3].endswith("¹")
    cells = cells_of(lines)
    assert cells["UNDO"][3:] == ["50%", "−10%", "−10%", "**−40%**", "≥ 2.5 ×"]
    assert cells["LEACE as target"][3:] == ["40%", "−33%", "−33%", "**−40%**", "–"]


def test_the_default_comes_first_and_settings_in_the_order_of_their_file():
    rows = [row(name, (0, 0), setting=place) for place in ("vit_cifar10_near", "mobilenet_cars") for name in NAMES]
    found = [(group.rows[0]["key"]["setting"], group.title) for group in grouped(rows)]
    assert [place for place, _ in found] == ["mobilenet_cars"] * 2 + ["vit_cifar10_near"] * 2
    assert [title for _, title in found] == ["default", "UNDO"] * 2


NAMES = ("undo", "default")


def test_commands_that_differ_in_method_and_seed_are_one():
    rows = [row(name, (0, 0), seed=seed) for name, seed in (("undo", 0), ("leace", 0), ("undo", 1), ("default", 0))]
    lines = [line.split("--seed ")[1] for line in commands(rows)]
    assert lines == ["0 1 --method undo", "0 --method leace default"]


def test_ten_sentences_prefer_who_keeps_benign_accuracy_and_claim_nothing_without_a_head_start():
    said = sentences(grouped(ROWS))
    assert len(said) == 10
    assert "UNDO" in said[3] and "60% (50% to 70% over seeds)" in said[3] and "0 of 2 are below" in said[3]
    assert "no method" in said[4] and "in 1 lines, most with LEACE as target † (vit_near: −5.0, −6.0" in said[7]
    assert "Of 0 of 2 attackers" in said[2] and " 0 are among them" in said[9]


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
    assert all(line in page for line in commands(ROWS)) and GRID in page and "arXiv:2306.03819" in page
    assert page.count("Written by hand.") == 1
