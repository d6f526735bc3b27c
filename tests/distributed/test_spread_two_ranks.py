"""Two processes cache a trunk as one does, each its share of the images, and share out the attacks of an audit."""

import json

import pytest
from attacked import pictures, saved_images, tiny_vit
from transformers import ViTImageProcessorPil
from typer.testing import CliRunner

from hf_immunize.cli.main import app
from hf_immunize.features.ranks import ALONE


pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def started(torchrun, tmp_path_factory):
    """Where two processes cached trunks, where they then audited, the words of that, and how they ended."""
    folder, root = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("audit")
    for seed, name in enumerate(("model", "reference")):
        tiny_vit(seed).save_pretrained(root / name)
        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(root / name)
    # More than one batch, so that both have some to do; fewer test images than two batches, so that one has none.
    for name, seed in (("harmful", 0), ("benign", 5)):
        saved_images(root / name, {"train": pictures(150, seed), "test": pictures(40, seed + 1)})
    words = ["audit", root / "model", "--reference", root / "reference", "--quick", "--steps", 12]
    words += ["--harmful", root / "harmful", "--benign", root / "benign"]
    words = [*map(str, words), "--attackers", "ridge,knn,bias_only,restore_swap"]
    done = torchrun("spread_two_ranks.py", folder, *words, "--output-dir", root / "out-2")
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, root, words, done


# ---- the cached trunk ----


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("spread_two_ranks")


@pytest.fixture(scope="module")
def folder(started):
    """Where two processes worked."""
    return started[0]


@pytest.fixture(scope="module")
def two(folder):
    """What each of two processes saw."""
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(script, tmp_path_factory):
    """What this process saw."""
    return script.everything(tmp_path_factory.mktemp("one"), ALONE)


def test_shares_are_contiguous(one, two):
    assert [found["processes"] for found in (one, *two)] == [1, 2, 2]
    assert two[0]["shares"] == two[1]["shares"] == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("name", ["many", "few"])
def test_two_processes_store_bit_by_bit_what_one_stores(name, one, two):
    for found in two:
        assert (found["rows"][name], found["labels"][name]) == (one["rows"][name], one["labels"][name])


def test_each_process_wrote_its_part_which_two_and_one_find_again(script, folder, two):
    assert {name: len(list((folder / name).glob("*.arrow"))) for name in ("many", "few")} == {"many": 2, "few": 1}
    assert [found["found_again"] for found in two] == [True, True]
    rows = script.cache(folder / "many", ALONE, script.images(11, 1)).find()
    assert [row["pixel_values"].tolist() for row in rows] == two[0]["rows"]["many"]


def test_a_process_that_fails_ends_all_with_an_error_and_leaves_nothing(folder, two):
    assert two[1]["failure"].startswith("NonFiniteError") and "row 10 of failing" in two[1]["failure"]
    assert two[0]["failure"].startswith("ProcessError") and "row 10 of failing" in two[0]["failure"]
    assert not [path.name for path in folder.iterdir() if path.name.startswith(("failing", "_unfinished"))]


# ---- the audit ----


def report(folder):
    def without_seconds(value):
        if isinstance(value, dict):
            kept = [name for name in value if name != "date" and not name.startswith("seconds")]
            return {name: without_seconds(value[name]) for name in kept}
        return [without_seconds(each) for each in value] if isinstance(value, list) else value

    return without_seconds(json.loads((folder / "audit.json").read_text()))


def test_two_processes_share_an_audit_and_report_what_one_alone_does(started):
    folder, root, words, two = started
    alone = CliRunner().invoke(app, [*words, "--output-dir", str(root / "out-1")])
    assert alone.exit_code == 0, alone.output
    assert report(root / "out-2") == report(root / "out-1")
    tables = [path.name for path in (root / "out-1").glob("*.csv")]
    assert tables and not (root / "out-2" / "_claims").exists()
    ran = [json.loads((folder / f"ran-{rank}.json").read_text()) for rank in (0, 1)]
    lines = [len((root / f"out-{count}" / "outcomes.jsonl").read_text().splitlines()) for count in (1, 2)]
    # Each attack once, after a line that says of what.
    assert all(ran) and len(ran[0]) + len(ran[1]) + 1 == lines[0] == lines[1] > 20
    assert two.stdout.count("Report: ") == 1


def test_one_process_goes_on_where_two_were_interrupted(started):
    _, root, words, _ = started
    lines = (root / "out-2" / "outcomes.jsonl").read_text().splitlines(keepends=True)
    (root / "out-3" / "_claims").mkdir(parents=True)
    (root / "out-3" / "outcomes.jsonl").write_text("".join(lines[: len(lines) // 2]))
    resumed = CliRunner().invoke(app, [*words, "--output-dir", str(root / "out-3")])
    assert resumed.exit_code == 0, resumed.output
    assert report(root / "out-3") == report(root / "out-2")


def test_where_one_process_fails_the_other_ends_and_its_attacks_are_kept(started, torchrun):
    _, root, words, _ = started
    failed = torchrun("failing_audit.py", *words, "--output-dir", root / "out-4")
    assert failed.returncode != 0 and "the weights are gone" in failed.stderr
    found = [json.loads(line) for line in (root / "out-4" / "outcomes.jsonl").read_text().splitlines()[1:]]
    assert found and {one["attacker"] for one in found} == {"ridge"}
