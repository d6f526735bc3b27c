"""Processes whose metrics differ stop together, and go back to the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers as hf


pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = Path(__file__).parent / "scripts" / "callbacks_two_ranks.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes wrote."""
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(SCRIPT), str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", ["restore", "target"])
def test_all_processes_stop_when_one_would(case, found):
    assert [each[case]["step"] for each in found] == [3, 3]


def test_all_processes_go_back_to_the_first_ones_checkpoint(folder, found):
    # The first process, whose accuracy never fell, has not saved the step at which the second stopped.
    saved = hf.ViTForImageClassification.from_pretrained(folder / "restore" / "checkpoint-2")
    expected = sum(float(parameter.detach().double().sum()) for parameter in saved.parameters())
    assert [each["restore"]["sum"] for each in found] == pytest.approx([expected, expected], abs=1e-9)


def test_one_process_alone_draws(folder):
    assert sorted(path.name for path in (folder / "restore" / "spectrum").iterdir()) == [
        "spectrum.png",
        "starting_spectra.safetensors",
    ]
