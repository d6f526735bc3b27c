"""Two processes cache a trunk and audit as one does, each its share of the images."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from attacked import pictures, saved_images, tiny_vit
from transformers import ViTImageProcessorPil
from typer.testing import CliRunner

from hf_immunize.cli.main import app
from hf_immunize.features.ranks import ALONE


pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = Path(__file__).parent / "scripts" / "spread_two_ranks.py"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Where two processes cached trunks, where they then audited, the words of that, and how they ended."""
    folder, root = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("audit")
    for seed, name in enumerate(("model", "reference")):
        tiny_vit(seed).save_pretrained(root / name)
        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(root / name)
    # More than one batch, so that both have some to do; fewer test images than two batches, so that one has none.
    for name, seed in (("harmful", 0), ("benign", 5)):
        saved_images(root / name, {"train": pictures(150, seed), "test": pictures(40, seed + 1)})
    words = ["audit", root / "model", "--reference", root / "reference", "--quick"]
    words += ["--harmful", root / "harmful", "--benign", root / "benign"]
    words = [*map(str, words), "--attackers", "ridge,knn,bias_only,restore_interpolation"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    launch += [str(folder), *words, "--output-dir", str(root / "out-2")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, root, words, done


# ---- the cached trunk ----


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("spread_two_ranks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_there_were_two_processes(one, two):
    assert [found["processes"] for found in (one, *two)] == [1, 2, 2]


def test_shares_are_contiguous_and_none_is_lost(two):
    assert two[0]["shares"] == two[1]["shares"] == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("name", ["many", "few"])
def test_two_processes_store_bit_by_bit_what_one_stores(name, one, two):
    for found in two:
        assert (found["rows"][name], found["labels"][name]) == (one["rows"][name], one["labels"][name])


def test_each_process_wrote_its_part(folder):
    parts = {name: len(list((folder / name).glob("*.arrow"))) for name in ("many", "few")}
    assert parts == {"many": 2, "few": 1}


def test_what_two_processes_stored_is_found_again_by_two_and_by_one(script, folder, two):
    assert [found["found_again"] for found in two] == [True, True]
    rows = script.cache(folder / "many", ALONE, script.images(11, 1)).find()
    assert [row["pixel_values"].tolist() for row in rows] == two[0]["rows"]["many"]


def test_a_process_that_fails_ends_all_with_an_error_and_leaves_nothing(folder, two):
    assert two[1]["failure"].startswith("NonFiniteError") and "row 10 of failing" in two[1]["failure"]
    assert two[0]["failure"].startswith("ProcessError") and "row 10 of failing" in two[0]["failure"]
    assert not [path.name for path in folder.iterdir() if path.name.startswith(("failing", "_unfinished"))]


def test_disks_of_their_own_are_told_from_a_shared_one(two):
    assert [(found["shared_folder"], found["own_folder"]) for found in two] == [(True, False)] * 2


# ---- the audit ----


@pytest.fixture(scope="module")
def audited(started):
    """The run directories of one process and of two, and what was printed."""
    _, root, words, two = started
    alone = CliRunner().invoke(app, [*words, "--output-dir", str(root / "out-1")])
    assert alone.exit_code == 0, alone.output
    return root, two


def report(folder):
    def without_seconds(value):
        if isinstance(value, dict):
            kept = [name for name in value if name != "date" and not name.startswith("seconds")]
            return {name: without_seconds(value[name]) for name in kept}
        return [without_seconds(each) for each in value] if isinstance(value, list) else value

    return without_seconds(json.loads((folder / "audit.json").read_text()))


def test_two_processes_report_what_one_reports(audited):
    root, _ = audited
    assert report(root / "out-2") == report(root / "out-1")


def test_outcomes_are_kept_once(audited):
    root, _ = audited
    lines = [len((root / f"out-{count}" / "outcomes.jsonl").read_text().splitlines()) for count in (1, 2)]
    assert lines[0] == lines[1] > 20


def test_the_report_is_printed_once_and_one_process_shows_progress(audited):
    _, two = audited
    assert two.stdout.count("Report: ") == 1
    # One bar for the training images, one for the test images, as they begin.
    assert two.stderr.count("reference: harmful:   0%") == 2
    assert two.stderr.count("Loading weights:   0%") == 2


def test_features_are_gone_when_the_report_is_there(audited):
    root, _ = audited
    assert not list((root / "out-2").glob("_unfinished*"))
