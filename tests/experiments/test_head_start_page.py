"""The page of the benchmark says what its rows say, and no more."""

import json
import re

import pytest

from examples.head_start_page import (
    SUITES,
    attackers_table,
    commands,
    grouped,
    main,
    main_table,
    methods,
    planned,
    sentences,
    suite_of,
)
from hf_immunize.errors import DataError


def row(title, removed, benign=0.0, seed=0, setting="vit_near"):
    """A row of two attackers, of each of which so much is removed; None where nothing is at stake."""
    names = [("ridge", "head_input"), ("last_stage", "fine_tuning")]
    attackers = [
        {"attacker": name, "access": access, "removed": share, "reference": 0.5, "random": 0.2}
        | {"immunized": 0.5 - 0.3 * (share or 0), "interval": None if share is None else [share - 0.2, share + 0.2]}
        for (name, access), share in zip(names, removed, strict=True)
    ]
    best = {
        one["access"]: {"removed": one["removed"], "removed_interval": one["interval"], "accuracy": one["immunized"]}
        | {f"{side}_accuracy": one[side] for side in ("reference", "random")}
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
        "command": f"python -m examples.benchmark --method {title} --seed {seed} {SUITES['']}",
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


def test_cells_have_means_and_ends_over_seeds_or_an_interval_and_lost_accuracy_is_marked():
    cells = cells_of(main_table(methods(grouped(ROWS))))
    assert cells["*vit_near: points at stake*"] == ["", "", "30", "", "30"]
    assert cells["UNDO"] == ["0, 1", "+0.0 (+0.0 to +0.0)", "**60% (50% to 70%)**", "–", "0% (−10% to 10%)"]
    assert cells["LEACE as target †"] == ["0", "−5.0 (−6.0 to −4.0)", "**90% (70% to 110%)**", "–", "–"]


def test_each_attacker_has_its_accuracies_and_those_who_know_the_method_are_marked():
    rows = [row("undo", (0.5, -0.1)), row("leace", (0.4, -0.33))]
    rows[0]["cost"] = [{"attacker": "last_stage", "reference_steps": 4, "immunized_steps": 10, "is_bound": True}]
    rows[1]["immunized_on"] = "NVIDIA"
    for one in rows:
        one["attackers"].append({**one["attackers"][1], "attacker": "every_block", "removed": -0.4})
    lines = attackers_table(grouped(rows))
    heads = [cell.strip() for cell in lines[0].split("|")[2:-1]]
    assert heads[1] == "steps of the last stage" and heads[3] == "the last stage" and heads[4].endswith("¹")
    cells = cells_of(lines)
    assert cells["UNDO"] == ["3 (CPU)", "≥ 2.5 ×", *(f"{said}: 50.0% → {after} (20.0%)" for said, after in READ)]
    assert cells["LEACE as target"][:2] == ["3 (GPU)", "–"]


READ = [("**50%**", "35.0%"), ("−10%", "53.0%"), ("−40%", "53.0%")]


def test_the_default_comes_first_and_settings_in_the_order_of_their_file():
    rows = [row(name, (0, 0), setting=place) for place in ("vit_cifar10_near", "mobilenet_cars") for name in NAMES]
    found = [(group.rows[0]["key"]["setting"], group.title) for group in grouped(rows)]
    assert [place for place, _ in found] == ["mobilenet_cars"] * 2 + ["vit_cifar10_near"] * 2
    assert [title for _, title in found] == ["default", "UNDO"] * 2


NAMES = ("undo", "default")
RIDGE = "200 images, 9 steps, 3 seeds, preset standard, closed-form least squares (ridge)"


def test_rows_that_differ_in_more_than_their_seed_are_lines_of_their_own():
    rows = [row("undo", (0, 0), seed=seed) for seed in (0, 1)]
    assert len(grouped(rows)) == 1
    rows[1]["key"]["attack_images"] = 200
    assert len(grouped(rows)) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (SUITES["200 images"], "200 images"),
        (SUITES[""], ""),
        ("--preset standard --attackers ridge --attack_seeds 3 --attack_steps 9 --attack_images 200", RIDGE),
        ("--preset quick --attack_seeds 5", "5 seeds, preset quick"),
    ],
)
def test_settings_name_their_attackers(flags, said):
    assert suite_of({"command": f"python -m examples.benchmark --seed 0 {flags} --data_path DATA"}) == said


def test_commands_that_differ_in_method_and_seed_are_one():
    rows = [row(name, (0, 0), seed=seed) for name, seed in (("undo", 0), ("leace", 0), ("undo", 1), ("default", 0))]
    lines = [line.split("--seed ")[1] for line in commands(rows)]
    assert lines == ["0 1 --method undo", "0 --method leace default"]


def test_of_the_plan_is_said_what_there_is_and_what_is_not():
    rows = [row(name, (0, 0), setting="vit_cifar10_near") for name in ("undo", "default")]
    rows += [row("undo", (None, None), setting="vit_cifar10_far"), row("tar", (0, 0), setting="vit_cifar10_near")]
    for one in rows:
        one["command"] = f"python -m examples.benchmark {SUITES['200 images']}"
    for one in rows[2]["removed"].values():
        if one is not None:
            one["reference_accuracy"] = 0.29  # nine points above random weights
    rows[3]["key"]["changes"] = {"max_steps": 3}  # another row than that of the plan
    rows.append(row("leace", (0, 0), setting="elsewhere"))
    rows.append(row("sophon", (0, 0), setting="vit_cifar10_near"))  # of other attackers than the plan's
    lines, said = planned(grouped(rows))
    assert "of whose 63 rows 3 are above" in said and len(lines) == 9
    missing, idle = re.fullmatch(r".*Not yet: (.*)\. Not yet, where under 10 points (.*)", said).groups()
    assert "; sophon, leace, weight_distance, tar, " in missing and "vit_cifar10_far" not in missing
    assert idle.endswith(
        "could be claimed: default, sophon, leace, weight_distance, tar, contraction, kappa, r_ill, opt_kappa, imma "
        "on vit_cifar10_far with 200 images"
    )


def test_ten_sentences_answer_first_and_claim_nothing_that_intervals_leave_open():
    said = sentences(methods(grouped(ROWS)))
    assert len(said) == 10
    assert sentences(methods(grouped([*ROWS, ROWS[0] | {"title": "retrained"}]))) == said
    assert said[0].startswith("Fine-tuning, by the strongest") and "of 1 shares none is set apart from 0%" in said[0]
    assert "0% (−10% to 10%), of UNDO on vit_near, benign +0.0" in said[0]
    assert "of 2 shares 2 are set apart from 0%: **60% (50% to 70%)**, of UNDO" in said[1]
    assert "of no method a share can be claimed" in said[2] and "Of 0 of 2 attackers" in said[4]
    assert "Of 1 shares of single fine-tuning attackers 0 are set apart" in said[5]
    assert "Lines: 2" in said[7] and "in 1 of them, marked †, most with LEACE as target † on vit_near" in said[8]


def test_pages_hold_table_figure_and_the_commands_of_their_rows(tmp_path):
    rows = tmp_path / "rows.jsonl"
    with pytest.raises(DataError, match="found none"):
        main(["--rows", str(rows)])
    noted = [one | {"note": "Written by hand."} for one in ROWS[:2]]
    rows.write_text("".join(json.dumps(one) + "\n" for one in [*noted, *ROWS[2:]]))
    main(["--rows", str(rows), "--out", str(tmp_path / "docs" / "head-start.md")])
    page = (tmp_path / "docs" / "head-start.md").read_text()
    figure = re.search(r"!\[.*\]\((.*)\)", page)[1]
    assert (tmp_path / "docs" / figure).read_bytes()[:4] == b"\x89PNG"
    assert all(line in page for line in commands(ROWS[:3])) and "unchanged" not in page and "arXiv:2306.03819" in page
    assert page.count("Written by hand.") == 1
    beside = re.search(r"\[each attacker\]\((.*)\)", page)[1]
    each = (tmp_path / "docs" / beside).read_text()
    assert "→" in each and "](head-start.md)" in each and "unchanged" in each
