"""Rows, resumed and refused, and the page that they make."""

import pytest
import yaml

from examples.fine_tuning import page, run
from examples.fine_tuning.__main__ import main
from examples.fine_tuning.plan import planned_runs
from examples.fine_tuning.settings import Run
from hf_immunize.errors import DataError


@pytest.fixture(scope="module")
def places(tmp_path_factory, data_path):
    root = tmp_path_factory.mktemp("runs")
    return {"data_path": str(data_path), "output_dir": str(root / "runs"), "shared": str(root / "shared")}


@pytest.fixture
def row(tiny, places):
    return run.run_one(Run(str(tiny), "silence", **places))


@pytest.mark.slow
def test_row_has_every_attacker_on_both_models(row):
    sides = [set(one) & {"before", "after"} for one in row["attacks"]["tuning"].values()]
    assert set(row["attacks"]["tuning"]) == {"last_stage", "lora_r4"} and all(len(side) == 2 for side in sides)


@pytest.mark.slow
def test_row_that_is_there_is_not_made_again(row, tiny, places, capsys):
    again = run.run_one(Run(str(tiny), "silence", **places))
    assert again == row and "is there already" in capsys.readouterr().out


@pytest.mark.slow
def test_probes_of_the_first_third_do_not_count_as_later(row):
    assert "stages.0" not in row["attacks"]["later"]["before"]["layer"]


@pytest.mark.slow
def test_other_settings_are_refused(row, tiny, places, capsys):
    spec = yaml.safe_load(tiny.read_text())
    spec["training"]["max_steps"] = 3
    tiny.write_text(yaml.safe_dump(spec))
    words = ["run", "--experiment", str(tiny), "--candidate", "silence"]
    words += [word for name, value in places.items() for word in (f"--{name}", value)]
    assert main(words) == 1 and "max_steps: 2 → 3" in capsys.readouterr().err


@pytest.mark.slow
def test_page_has_the_rows_figures_and_names_what_is_missing(row, tiny, places, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump([{"experiments": [str(tiny)], "candidates": ["silence", "flat"], "seeds": [0]}]))
    out = tmp_path / "page.md"
    words = ["page", "--rows", places["output_dir"], "--out", str(out), "--plan", str(plan)]
    assert main(words) == 0
    text = out.read_text()
    read = row["attacks"]["later"]
    cell = " → ".join(f"{100 * read[moment]['accuracy']:.1f}" for moment in ("before", "after"))
    assert f"| {cell} |" in text and "Planned and not run" in text and "--candidate flat" in text


def test_empty_folder_gives_no_page(tmp_path, capsys):
    assert main(["page", "--rows", str(tmp_path), "--out", str(tmp_path / "page.md")]) == 1
    assert "found none" in capsys.readouterr().err


def test_unknown_candidate_is_refused(capsys):
    assert main(["run", "--experiment", "resnet18_far", "--candidate", "prayer"]) == 1
    assert "prayer" in capsys.readouterr().err


def test_listing_names_experiments_and_candidates(capsys):
    main(["list"])
    listed = capsys.readouterr().out
    assert "resnet18_far" in listed and "unrolled" in listed


def test_plan_runs_each_row_once():
    names = [one.name for one in planned_runs()]
    assert len(names) == len(set(names)) > 4


def stub(seed, later, ratio=12.0, deviation=8.0, entering=0.1, is_bound=False):
    """A row as far as the verdict reads it."""
    tuning = {
        "lora_r8": {"deviation": deviation, "half": None},
        "last_stage": {"deviation": 1.0, "half": {"ratio": ratio, "is_bound": is_bound}},
    }
    read = {"later": {"after": {"accuracy": later}}, "entering": {"after": {"accuracy": entering}}}
    attacks = {"chance": 0.1, **read, "tuning": tuning}
    hits = {"before": "1111", "after": "1111"}
    return {"candidate": "depths", "changes": {}, "seed": seed, "attacks": attacks, "utility": {"hits": hits}}


WANTED = {"benign_points": 2.0, "above_chance_points": 10.0, "deviation": 5.0, "times": 10.0}


def test_verdict_takes_the_worst_seed_for_probes():
    said = page.verdict([stub(0, 0.15), stub(1, 0.35)], WANTED)
    assert "later layers" in said.split("missed:")[1]


def test_what_enters_rectifiers_is_judged_beside_it():
    said = page.verdict([stub(0, 0.1, entering=0.99)], WANTED)
    assert "enters rectifiers" in said.split("missed:")[1] and "later layers" in said.split("missed:")[0]


def test_a_bound_below_what_is_wanted_is_neither_reached_nor_missed():
    said = page.verdict([stub(0, 0.1, ratio=5.0, is_bound=True)], WANTED)
    assert "10 times the steps" in said.split("not determined:")[1]


def test_figures_of_some_seeds_say_of_how_many():
    assert page.known([1.0, None, 3.0], lambda value: f"{value:.0f}").endswith("(2 of 3 seeds)")


@pytest.mark.slow
def test_rows_of_other_settings_are_not_printed(row, tiny):
    spec = yaml.safe_load(tiny.read_text())
    spec["training"]["max_steps"] = 9
    with pytest.raises(DataError, match="max_steps: 2 → 9"):
        page.check_settings([row], "tiny", spec)


def test_verdict_says_what_is_reached():
    assert page.verdict([stub(0, 0.15)], WANTED).endswith("missed: nothing")


def test_the_budget_may_be_changed(tiny, tmp_path):
    changed = Run(str(tiny), "silence", training={"benign_budget": 0.1})
    args = run.arguments_of(changed, yaml.safe_load(tiny.read_text()), tmp_path)
    assert args.benign_budget == 0.1 and args.objective == "concentration"
