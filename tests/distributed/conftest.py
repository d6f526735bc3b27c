"""What one process finds and what two find, each started once for all tests: a start costs more than most runs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def torchrun():
    """Run a script on two processes; gives what became of it."""

    def launch(script, *arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += [str(SCRIPTS / script), *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)

    return launch


@pytest.fixture(scope="session")
def load_script():
    """A script as a module."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def script(load_script):
    """What one process and two should agree on."""
    return load_script("two_ranks")


@pytest.fixture(scope="session")
def one_folder(tmp_path_factory):
    """Where one process works."""
    return tmp_path_factory.mktemp("one")


@pytest.fixture(scope="session")
def one(script, one_folder):
    """What this process found."""
    return script.everything(one_folder)


@pytest.fixture(scope="session")
def killed(torchrun, tmp_path_factory):
    """A run on two processes of which one was killed: its folder, and how it ended."""
    folder = tmp_path_factory.mktemp("killed")
    return folder, torchrun("killed_rank.py", folder)


@pytest.fixture(scope="session")
def two_folder(torchrun, one, one_folder, killed, tmp_path_factory):
    """What two processes wrote, who had the folders of the one and of the killed ones beside them."""
    folder = tmp_path_factory.mktemp("two")
    done = torchrun("two_ranks.py", folder, one_folder, killed[0])
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="session")
def two(two_folder):
    """What two processes found, as the first of them wrote it."""
    return json.loads((two_folder / "found.json").read_text())
