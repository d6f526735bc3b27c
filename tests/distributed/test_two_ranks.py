"""Two processes compute what one would on the whole batch."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = Path(__file__).parent / "scripts" / "two_ranks.py"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found."""
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(SCRIPT), str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What this process found."""
    spec = importlib.util.spec_from_file_location("two_ranks", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.everything(tmp_path_factory.mktemp("one"))


def test_there_were_two_processes(one, two):
    assert (one["world_size"], two["world_size"]) == (1, 2)


@pytest.mark.parametrize("term", ["hessian_r_well", "hessian_r_ill"])
def test_gradients_of_gathered_features_are_exact(term, one, two):
    found, expected = (torch.tensor(each["gradients"][term], dtype=torch.float64) for each in (two, one))
    assert float((found - expected).norm() / expected.norm()) < 1e-12


def test_the_norm_of_the_mean_losss_gradient_is_that_of_one_process(one, two):
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-6)


@pytest.mark.parametrize("weights", ["auto", "fixed", "cached"])
def test_a_step_ends_at_the_same_weights(weights, one, two):
    found, expected = two[weights]["weights"], one[weights]["weights"]
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(values), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weights", ["auto", "fixed", "cached"])
def test_the_log_is_of_all_processes(weights, one, two):
    assert two[weights]["log"] == pytest.approx(one[weights]["log"], rel=1e-4)


@pytest.mark.parametrize("weights", ["auto", "fixed", "cached"])
def test_metrics_are_of_each_image_once(weights, one, two):
    assert "eval_rir" in two[weights]["metrics"]
    assert two[weights]["metrics"] == pytest.approx(one[weights]["metrics"], rel=1e-3)
