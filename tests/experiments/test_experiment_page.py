"""The page says what the rows say: tables, pooled differences, bounds, and what is not stopped."""

import copy
from pathlib import Path

import pytest

from examples.experiments.comparison import at_equal_accuracy
from examples.experiments.files import read_json, write_json
from examples.experiments.page import BEGIN, END, write_overview, write_page
from examples.experiments.rows import Group, group_rows, pooled_difference, read_rows
from examples.experiments.run import VERSION
from examples.experiments.sentences import sentences, stopped
from examples.experiments.settings import Run
from examples.experiments.tables import overview
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
    run = Run("mobilenet", "cars", method, seed, changes or {})
    kappa = {"rank": 20, "images": 20, "dim": 64, "log10_kappa": 3.0, "is_bound": False}
    exact = {"rir": 10**log, "log10_rir": log, "harmful_ratio": 10**log / 2, "benign_ratio": 0.5, "std": None}
    exact |= {"bound": bound, **dict.fromkeys(("harmful", "harmful_reference", "benign", "benign_reference"), kappa)}
    difference = -len(wrong) / 20
    utility = {"size": 20, "immunized": 1 + difference, "reference": 1.0, "difference": difference}
    utility |= {"interval": [difference - 0.1, difference + 0.1]}
    objective = "concentration" if method == "default" else "kappa"
    return {
        "name": run.name,
        "backbone": "mobilenet",
        "task": "cars",
        "experiment": run.experiment,
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
            "training": {"objective": objective, "seed": seed, "max_steps": 9},
            "audit": {"attackers": ["ridge"]},
        },
        "seconds": {"training, with measuring before and after": 3000.0, "attacks on the immunized model": 600.0},
        "resumed": [],
        "shared": {"name": f"before-seed{seed}", "seconds": {"attacks on the starting model": 600.0}, "resumed": []},
        "start": {"name": "mobilenet"},
        "steps": 9,
        "objective": "dead_relu" if method == "default" else method.removesuffix("_ours"),
        "images": {"benign": {"train": 70, "test": 20}, "harmful": {"train": 100, "test": 20}},
        "sources": {"benign": "samples", "harmful": "cars", "unrelated": "digits"},
        "test_rows": " ".join(str(10 * seed + index) for index in range(20)),
        "ratios": {"exact": exact, "without_lost": {"lost": 0}, "reference": {"rir": 3.5, "std": 1.0}},
        "utility": utility | {"hits": {"before": hits(()), "after": hits(wrong)}},
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


def test_the_page_has_every_row_its_figures_and_what_is_missing(rows, tmp_path):
    failure = {"experiment": "mobilenet_cars", "command": "run it", "error": "a loss is\nNaN", "date": "2026-11-23"}
    write_json(tmp_path / "runs" / "x" / "failed.json", failure)
    readme, out = tmp_path / "README.md", tmp_path / "docs" / "networks.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    text = write_page(tmp_path / "runs", out, readme=readme)
    assert out.read_text() == text
    # Tables.
    assert "| default | 0, 1, 2 | 100.0 ± 0.0 → 95.0 ± 5.0 | −5.0 " in text
    assert "| ≥ 9.00 ± 0.00 |" in text and "| paper (κ) | 0 | 100.0 → 80.0 |" in text
    assert "| 50.0 ± 0.0 → 12.0 ± 0.0 | stopped |" in text and "| 50.0 → 30.0 | not stopped |" in text
    assert "| paper (κ), auto_weight_ratio=0.1 | 0 | −5.0 | 40.0 | not stopped | 0.50 |" in text
    assert "| default | used classes | any layer | 60.0 ± 0.0 | 22.0 ± 0.0 | ridge at layer.3 | 10.0% |" in text
    # How it was made: 5 rows of an hour, 3 starting models of ten minutes each.
    assert all(f"`{row['command']}`" in text for row in rows) and "5 rows are here, which took 5.5 hours" in text
    # What is not there.
    words = "--backbone mobilenet --task cars --method imma --seed N --set max_steps=300 --data_path DATA"
    assert f"- seed 0: `python -m examples.experiments run {words}`" in text
    assert "Ended with an error:\n\n- `run it` (2026-11-23): a loss is NaN" in text
    # Its figure, and the overview in the README.
    figure = out.parent / "figures" / "networks-mobilenet_cars.png"
    assert f"(figures/{figure.name})" in text and figure.stat().st_size > 5000
    shown = readme.read_text().removeprefix(f"before\n{BEGIN}\n").removesuffix(f"\n{END}\nafter\n")
    assert "| Cars | 0, 1, 2 | −5.0 (" in shown and "old" not in shown and shown in text


def test_a_row_of_an_older_program_is_refused(rows, tmp_path):
    path = tmp_path / "runs" / rows[0]["name"] / "row.json"
    old = read_json(path)
    old["settings"]["version"] = VERSION - 1
    write_json(path, old)
    with pytest.raises(DataError, match="--redo"):
        read_rows(tmp_path / "runs")


def test_the_readme_shows_the_overview_of_the_page(tmp_path):
    readme = (ROOT / "README.md").read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert readme.startswith("| experiment |") and readme in (ROOT / "docs/results/networks.md").read_text()
    assert "not run" in overview(group_rows([a_row("kappa")]))
    (tmp_path / "README.md").write_text("without marks")
    with pytest.raises(DataError, match=r"README\.md"):
        write_overview(tmp_path / "README.md", "table")


def test_a_pooled_difference_counts_every_held_out_image_and_none_twice():
    mean, (low, high), size = pooled_difference([a_row(seed=seed, wrong=range(seed)) for seed in range(3)])
    assert (mean, size) == (pytest.approx(-3 / 60), 60) and low < mean < high
    one = a_row(wrong=(0, 1))
    twice = copy.deepcopy(one) | {"seed": 1}
    single, pooled = pooled_difference([one])[1], pooled_difference([one, twice])[1]
    assert pooled == pytest.approx(single)
    elsewhere = twice | {"test_rows": " ".join(str(100 + index) for index in range(20))}
    low, high = pooled_difference([one, elsewhere])[1]
    assert high - low < 0.8 * (pooled[1] - pooled[0])
    # Where no image differs, the interval is not empty.
    mean, (low, high), _ = pooled_difference([a_row(wrong=())])
    assert mean == 0 and (low, high) == (pytest.approx(-0.15), pytest.approx(0.15))


def test_sentences_say_what_is_not_reached_and_how_many_images_are_lost():
    row = a_row("kappa", wrong=(0, 1), probe=0.3, log=2.0, bound=None)
    row["ratios"]["without_lost"] = {"lost": 2, "benign_ratio": 0.9}
    said = sentences(Group("", "kappa", {}, [row]), WANTED)
    for figures in (
        ("−10.0 points", "not as wanted (at most 1 points"),
        ("harmful classes that were used", "is not stopped", "30.0%"),
        ("never seen", "is not stopped"),
        ("best layer", "40.0%"),
        ("2.00, (ii) 0.5; not as wanted (10^8", "(ii) as wanted", "2 of 20 held-out", "(ii) is 0.9"),
        ("Fine-tuning was not tried",),
    ):
        assert any(all(one in sentence for one in figures) for sentence in said), figures
    # Stopped is what is stopped in every row.
    near, far = a_row(probe=0.12), a_row(seed=1, probe=0.14)
    assert stopped(Group("", "default", {}, [near]), WANTED) == "stopped"
    assert stopped(Group("", "default", {}, [near, far]), WANTED) == "not stopped"


def compared(*rows):
    return "\n".join(at_equal_accuracy(group_rows(rows)))


def test_at_equal_accuracy_a_method_stands_by_its_best_setting_on_shared_seeds():
    rows = [a_row(wrong=(0,)), a_row("kappa", wrong=range(9), probe=0.1)]
    assert "paper (κ): none of its 1 settings keeps as much" in compared(*rows)
    # 1 of 200 images is half a point, which counts as equal; two are not.
    near = a_row("kappa")
    near["utility"]["difference"] = rows[0]["utility"]["difference"] - 1 / 200
    assert "| paper (κ) | 0 | −5.5 |" in compared(rows[0], near)
    near["utility"]["difference"] -= 1 / 200
    assert "none of its 1 settings" in compared(rows[0], near)
    rows.append(a_row("kappa", wrong=(0,), probe=0.4, changes={"auto_weight_ratio": 0.1}))
    found = compared(*rows)
    assert "| paper (κ), auto_weight_ratio=0.1 | 0 | −5.0 | 40.0 | ≥ 9.00 | −5.0 | 12.0 | ≥ 9.00 |" in found
    # Of all seeds the default loses 22.5 points, of the one that both have none.
    rows = [a_row(wrong=()), a_row(seed=1, wrong=range(9)), a_row("kappa", wrong=range(4), probe=0.1)]
    assert "none of its 1 settings" in compared(*rows) and "There is no seed" in compared(
        a_row(seed=1), a_row("kappa")
    )
    # A shorter run with a default as short.
    short = {"max_steps": 300}
    rows = [a_row(probe=0.1), a_row(probe=0.5, changes=short), a_row("kappa", probe=0.3, bound=None, changes=short)]
    found = compared(*rows)
    assert "| paper (κ), max_steps=300 | 0 | −5.0 | 30.0 | 9.00 | −5.0 | 50.0 |" in found and "†" not in found
    assert "| paper (κ), max_steps=300 † | 0 | −5.0 | 30.0 |" in compared(rows[0], rows[2])
