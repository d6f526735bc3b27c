"""The page says what the rows say: tables, pooled differences, bounds, and what is not stopped."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from examples.networks.__main__ import main
from examples.networks.comparison import at_equal_accuracy, contributions, standing
from examples.networks.files import read_json, write_json
from examples.networks.overview import BEGIN, END, overview, write_overview
from examples.networks.page import one_line, write_page
from examples.networks.rows import Group, group_rows, pooled_difference, read_rows, seconds_of
from examples.networks.run import VERSION
from examples.networks.sentences import sentences, stopped
from examples.networks.settings import Run
from hf_immunize.errors import DataError


ROOT = Path(__file__).parents[2]
WANTED = {"benign_points": 1.0, "above_chance_points": 3.0, "unrelated_points": 1.0, "log10_rir": 8, "benign_ratio": 1}


def hits(wrong, size=20):
    return "".join("0" if index in wrong else "1" for index in range(size))


def reading(before, after, chance=0.1):
    one = {
        moment: {"accuracy": accuracy, "attacker": "ridge", "layer": "input of classifier"}
        for moment, accuracy in (("before", before), ("after", after))
    }
    deep = {
        moment: {**found, "accuracy": found["accuracy"] + 0.1, "layer": "layer.3"} for moment, found in one.items()
    }
    by_class = {"head_input": one, "any_layer": deep, "fine_tuning": None}
    sizes = {"chance": chance, "images": [100, 20], "classes": 10}
    return {**sizes, "linear": one, "any_layer": deep, "by_class": by_class}


def a_row(method="default", seed=0, wrong=(0,), probe=0.12, log=9.0, bound="lower", changes=None):
    """A row of made-up figures."""
    run = Run("mobilenet_cars", method, seed, changes or {})
    before, after = hits(()), hits(wrong)
    kappa = {"rank": 20, "images": 20, "dim": 64, "log10_kappa": 3.0, "is_bound": False}
    exact = {"rir": 10**log, "log10_rir": log, "harmful_ratio": 10**log / 2, "benign_ratio": 0.5, "std": None}
    exact |= {"bound": bound, **dict.fromkeys(("harmful", "harmful_reference", "benign", "benign_reference"), kappa)}
    difference = -len(wrong) / 20
    utility = {"size": 20, "immunized": 1 + difference, "reference": 1.0, "difference": difference}
    utility |= {"interval": [difference - 0.1, difference + 0.1], "hits": {"before": before, "after": after}}
    return {
        "name": run.name,
        "experiment": "mobilenet_cars",
        "title": "Cars",
        "method": method,
        "changes": run.changes,
        "seed": seed,
        "command": run.command(),
        "date": "2026-11-23",
        "hardware": "a machine",
        "versions": {"torch": "2"},
        "settings": {
            "version": VERSION,
            "start": {"name": "mobilenet", "weights": "abc"},
            "training": {
                "objective": "concentration" if method == "default" else "kappa",
                "seed": seed,
                "max_steps": 9,
            },
            "audit": {"attackers": ["ridge"]},
        },
        "seconds": {"training, with measuring before and after": 3000.0, "attacks on the immunized model": 600.0},
        "resumed": [],
        "shared": {"name": f"before-seed{seed}", "seconds": {"attacks on the starting model": 600.0}, "resumed": []},
        "start": {"name": "mobilenet"},
        "steps": 9,
        "objective": "silence" if method == "default" else method.removesuffix("_ours"),
        "images": {"benign": {"train": 70, "test": 20}, "harmful": {"train": 100, "test": 20}},
        "sources": {"benign": "samples", "harmful": "cars", "unrelated": "digits"},
        "test_rows": " ".join(str(10 * seed + index) for index in range(20)),
        "ratios": {"exact": exact, "without_lost": {"lost": 0}, "reference": {"rir": 3.5, "std": 1.0}},
        "utility": utility,
        "probes": {"harmful": reading(0.5, probe), "unseen": reading(0.4, 0.3), "unrelated": reading(0.98, 0.975)},
        "warnings": [],
    }


@pytest.fixture
def rows(tmp_path):
    """Three seeds of the default, two settings of the paper's objective."""
    found = [a_row(seed=seed, wrong=range(seed)) for seed in range(3)]
    found.append(a_row("kappa", wrong=(0, 1, 2, 3), probe=0.3, log=1.5, bound=None))
    found.append(a_row("kappa", wrong=(0,), probe=0.4, log=0.5, bound=None, changes={"auto_weight_ratio": 0.1}))
    for row in found:
        write_json(tmp_path / "runs" / row["name"] / "row.json", row)
    return found


@pytest.fixture
def text(rows, tmp_path):
    return write_page(tmp_path / "runs", tmp_path / "docs" / "networks.md")


def test_the_page_has_a_line_for_each_method(text, tmp_path):
    assert (tmp_path / "docs" / "networks.md").read_text() == text
    assert "| default | 0, 1, 2 | 100.0 ± 0.0 → 95.0 ± 5.0 | −5.0 " in text
    assert "| ≥ 9.00 ± 0.00 |" in text and "| paper (κ) | 0 | 100.0 → 80.0 |" in text
    assert "| 50.0 ± 0.0 → 12.0 ± 0.0 | stopped |" in text and "| 50.0 → 30.0 | not stopped |" in text


def test_the_page_names_commands_settings_and_hours(text, rows):
    assert all(f"`{row['command']}`" in text for row in rows)
    # 5 rows of an hour, 3 starting models of ten minutes each.
    assert "5 rows are here, which took 5.5 hours" in text and "hours more, at the pace of these" in text
    assert "- a machine (5 rows)" in text and "max_steps: 9" in text and "objective=kappa" in text


def test_rows_that_are_not_there_are_named(text):
    words = "--experiment mobilenet_cars --method imma --seed N --set max_steps=300 --data_path DATA"
    assert f"- seed 0: `python -m examples.networks run {words}`" in text
    assert "No row of this experiment was run. It is meant for 1 GPU." in text
    assert "| paper (κ) | 3.467 | 62.36 |  |  |" in text


def test_a_run_that_failed_is_told(rows, tmp_path):
    failure = {"experiment": "mobilenet_cars", "command": "run it", "error": "a loss is\nNaN", "date": "2026-11-23"}
    write_json(tmp_path / "runs" / "x" / "failed.json", failure)
    text = write_page(tmp_path / "runs", tmp_path / "networks.md")
    assert "Ended with an error:\n\n- `run it` (2026-11-23): a loss is NaN" in text


def test_the_figure_is_beside_the_page(text, tmp_path):
    figure = tmp_path / "docs" / "figures" / "networks-mobilenet_cars.png"
    assert f"(figures/{figure.name})" in text and figure.stat().st_size > 5000


def test_the_frontier_has_every_setting(text):
    assert "| paper (κ), auto_weight_ratio=0.1 | 0 | −5.0 | 40.0 | not stopped | 0.50 |" in text


def test_a_page_without_rows_says_what_is_to_run(tmp_path):
    assert main(["page", "--rows", str(tmp_path), "--out", str(tmp_path / "page.md")]) == 0
    text = (tmp_path / "page.md").read_text()
    assert "0 rows are here" in text and "Not run:" in text


def test_a_row_of_an_older_program_is_refused(rows, tmp_path):
    path = tmp_path / "runs" / rows[0]["name"] / "row.json"
    old = read_json(path)
    old["settings"]["version"] = VERSION - 1
    write_json(path, old)
    with pytest.raises(DataError, match="--redo"):
        read_rows(tmp_path / "runs")


# ---- what follows from several rows ----


def test_a_pooled_difference_counts_every_held_out_image():
    rows = [a_row(seed=seed, wrong=range(seed)) for seed in range(3)]
    mean, (low, high), size = pooled_difference(rows)
    assert (mean, size) == (pytest.approx(-3 / 60), 60) and low < mean < high


def test_an_image_in_two_splits_does_not_count_as_two():
    one = a_row(wrong=(0, 1))
    twice = copy.deepcopy(one) | {"seed": 1}
    single, pooled = pooled_difference([one])[1], pooled_difference([one, twice])[1]
    assert pooled == pytest.approx(single)
    elsewhere = twice | {"test_rows": " ".join(str(100 + index) for index in range(20))}
    low, high = pooled_difference([one, elsewhere])[1]
    assert high - low < 0.8 * (pooled[1] - pooled[0])


def test_where_no_image_differs_the_interval_is_not_empty():
    mean, (low, high), _ = pooled_difference([a_row(wrong=())])
    assert mean == 0 and (low, high) == (pytest.approx(-0.15), pytest.approx(0.15))


def test_what_runs_share_is_counted_once():
    rows = [a_row(), a_row("kappa")]
    assert seconds_of(rows) == 2 * 3600 + 600


def test_groups_are_in_the_order_of_methods_with_changes_last():
    rows = [a_row("kappa", changes={"auto_weight_ratio": 1.0}), a_row("kappa"), a_row(seed=1), a_row()]
    groups = group_rows(rows)
    assert [group.title for group in groups] == ["default", "paper (κ)", "paper (κ), auto_weight_ratio=1.0"]
    assert groups[0].seeds == "0, 1"


def test_a_probe_is_stopped_only_if_it_is_in_every_row():
    near, far = a_row(probe=0.12), a_row(seed=1, probe=0.14)
    assert stopped(Group("", "default", {}, [near]), WANTED) == "stopped"
    assert stopped(Group("", "default", {}, [near, far]), WANTED) == "not stopped"


def test_sentences_say_what_is_not_reached():
    said = " ".join(
        sentences(Group("", "kappa", {}, [a_row("kappa", wrong=(0, 1), probe=0.3, log=2.0, bound=None)]), WANTED)
    )
    assert "changed by −10.0 points" in said and "not as wanted (at most 1 points lost in the mean)" in said
    assert "Reading the harmful classes that were used at the classifier's input is not stopped" in said
    assert "harmful classes that were never seen at the classifier's input is not stopped" in said
    assert "is 2.00, (ii) 0.5; not as wanted (10^8, or at the bound); (ii) as wanted (at most 1)" in said
    assert (
        "Fine-tuning was not tried here" in said and "At the best layer the strongest linear probe reads 40.0%" in said
    )


def compared(*rows, by=at_equal_accuracy):
    return "\n".join(by(group_rows(rows)))


def test_at_equal_accuracy_a_method_stands_by_its_best_setting():
    rows = [a_row(wrong=(0,)), a_row("kappa", wrong=range(9), probe=0.1)]
    assert "paper (κ): none of its 1 settings keeps as much" in compared(*rows)
    rows.append(a_row("kappa", wrong=(0,), probe=0.4, changes={"auto_weight_ratio": 0.1}))
    found = compared(*rows)
    assert "| paper (κ), auto_weight_ratio=0.1 | 0 | −5.0 | 40.0 | ≥ 9.00 | −5.0 | 12.0 | ≥ 9.00 |" in found


def test_who_keeps_as_much_is_told_on_shared_seeds():
    # Of all seeds the default loses 22.5 points, of the one that both have none.
    rows = [a_row(wrong=()), a_row(seed=1, wrong=range(9)), a_row("kappa", wrong=range(4), probe=0.1)]
    assert "none of its 1 settings" in compared(*rows)


def test_without_a_shared_seed_nothing_is_compared():
    rows = [a_row(seed=1), a_row("kappa")]
    assert "There is no seed" in compared(*rows) and compared(*rows, by=standing) == ""


def test_a_shorter_run_is_compared_with_a_default_as_short():
    short = {"max_steps": 300}
    rows = [a_row(probe=0.1), a_row(probe=0.5, changes=short), a_row("kappa", probe=0.3, bound=None, changes=short)]
    assert "weaker strongest probe: paper (κ), max_steps=300 (20.0 points, seed 0)." in compared(*rows, by=standing)
    assert "†" not in compared(*rows)
    assert "| paper (κ), max_steps=300 † | 0 | −5.0 | 30.0 |" in compared(rows[0], rows[2])


def test_as_far_behind_as_counts_as_equal_is_equal():
    # 1 of 200 images is half a point.
    rows = [a_row(), a_row("kappa")]
    rows[1]["utility"]["difference"] = rows[0]["utility"]["difference"] - 1 / 200
    assert "1 of 1 settings of other methods keep as much" in compared(*rows, by=standing)


def test_settings_ahead_of_the_default_are_named():
    rows = [
        a_row(probe=0.2, log=1.0, bound=None),
        a_row("kappa", probe=0.1, log=0.5, bound=None),
        a_row("r_ill", probe=0.3, log=2.0, bound=None),
        a_row("imma", probe=0.2, log=0.5, bound="lower"),
        a_row("opt_kappa", probe=0.0, log=9.0, wrong=range(9)),
    ]
    said = compared(*rows, by=standing)
    assert "3 of 4 settings of other methods keep as much" in said
    assert "by a weaker strongest probe: paper (κ) (10.0 points, seed 0)." in said
    assert "by exact RIR: R_ill only (by a factor of 10^1.00, seed 0). Bounds do not tell of IMMA (seed 0)." in said


def test_no_setting_ahead_is_told_too():
    rows = [a_row(), a_row("kappa", probe=0.3, log=1.0, bound=None)]
    said = compared(*rows, by=standing)
    assert "by a weaker strongest probe: none." in said and "by exact RIR: none." in said
    assert standing(group_rows([a_row()])) == []


def test_objective_and_recipe_stand_side_by_side_on_one_seed():
    short = {"max_steps": 300}
    rows = [a_row(seed=seed) for seed in (0, 1)]
    rows += [a_row("default", seed=1, probe=0.2, changes=short), a_row("kappa", seed=1, probe=0.3, changes=short)]
    rows += [a_row("kappa_ours", seed=1, probe=0.25, log=2.0, bound=None, changes=short)]
    said = compared(*rows, by=contributions)
    assert "All of seed 1, max_steps=300" in said
    assert "| default (silence) |  |  |  | −5.0 | 20.0 | ≥ 9.00 |" in said
    assert "| κ | −5.0 | 30.0 | ≥ 9.00 | −5.0 | 25.0 | 2.00 |" in said
    assert contributions(group_rows(rows[:2])) == []


def test_what_auto_took_is_told_by_seed_where_it_differs():
    rows = [a_row(seed=seed) for seed in range(3)]
    assert group_rows(rows)[0].objectives == "silence"
    rows[1]["objective"] = "concentration"
    assert group_rows(rows)[0].objectives == "silence (0, 2), concentration (1)"


def test_one_line_for_the_terminal():
    assert "log10 RIR ≥ 9.00" in one_line(a_row()) and "harmful probe 50.0% → 12.0%" in one_line(a_row())


def test_names_of_the_plan_are_yaml(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump([{"experiments": ["vit_cifar10"], "methods": ["default"], "seeds": [7]}]))
    text = write_page(tmp_path / "none", tmp_path / "page.md", plan)
    assert (
        "- seed 7: `python -m examples.networks run --experiment vit_cifar10 --method default" in text
        and "mobilenet" not in text
    )


def test_the_ceiling_of_a_linear_map_is_told_where_the_features_are_there(rows, tmp_path):
    place = tmp_path / "runs" / "shared" / "before" / "before-seed0"
    place.mkdir(parents=True)
    diagonal = torch.diag(torch.tensor([1.0, 3.0]))
    save_file({"benign": diagonal, "harmful": torch.eye(2)}, place / "features.safetensors")
    text = write_page(tmp_path / "runs", tmp_path / "networks.md")
    assert "could reach an RIR of at most 81." in text and "A ridge classifier" not in text


def test_how_well_images_are_told_apart_is_told(rows, tmp_path):
    place = tmp_path / "runs" / "shared" / "before" / "before-seed0"
    place.mkdir(parents=True)
    benign = torch.randn(70, 5, generator=torch.Generator().manual_seed(0))
    save_file({"benign": benign, "harmful": benign + 20}, place / "features.safetensors")
    text = write_page(tmp_path / "runs", tmp_path / "networks.md")
    assert "puts 100.0% of harmful and benign images on their own side (100.0% to 100.0% in 40 draws of 64" in text


class TestOverview:
    def test_it_is_on_the_page_and_between_the_marks_of_the_readme(self, rows, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
        text = write_page(tmp_path / "runs", tmp_path / "networks.md", readme=readme)
        shown = readme.read_text().removeprefix(f"before\n{BEGIN}\n").removesuffix(f"\n{END}\nafter\n")
        assert "| 0, 1, 2 | −5.0 (" in shown and "old" not in shown and shown in text

    def test_the_readme_shows_that_of_the_page(self):
        readme = (ROOT / "README.md").read_text().partition(BEGIN)[2].partition(END)[0].strip()
        assert readme.startswith("| experiment |") and readme in (ROOT / "docs/results/networks.md").read_text()

    def test_a_file_without_marks_is_named(self, tmp_path):
        (tmp_path / "README.md").write_text("nothing")
        with pytest.raises(DataError, match=r"README\.md, between which the table belongs"):
            write_overview(tmp_path / "README.md", "table")

    def test_without_rows_of_the_default_it_says_so(self):
        assert "not run" in overview(group_rows([a_row("kappa")]))


def test_images_that_share_the_fate_of_harmful_ones_are_counted(rows):
    row = a_row()
    row["ratios"]["without_lost"] = {"lost": 2, "benign_ratio": 0.9}
    found = " ".join(sentences(Group("mobilenet_cars", "default", {}, [row]), WANTED))
    assert "2 of 20 held-out benign images keep at most a tenth" in found and "without them (ii) is 0.9" in found
