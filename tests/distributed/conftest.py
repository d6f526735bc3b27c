"""What one process finds and what two find, each started once for all tests: a start costs more than most runs."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from folders import image_folder, tiny_classifier
from hub_server import TOKEN, Hub


SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def torchrun():
    """Run a script on two processes; gives what became of it."""

    return lambda script, *arguments, **environment: finished(launched(script, *arguments, **environment))


@pytest.fixture(scope="session")
def served():
    """A Hub on loopback, to which processes push."""
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def online(served):
    """Environment of processes that push there."""
    return {"HF_ENDPOINT": served.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


def launched(script, *arguments, how=("--standalone",), processes=2, **more):
    """A launcher of processes that run a script."""
    command = [sys.executable, "-m", "torch.distributed.run", *how, "--nproc_per_node", str(processes)]
    command += [str(SCRIPTS / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)} | more
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(launcher, within=400):
    """What became of a launcher and its processes."""
    try:
        said = launcher.communicate(timeout=within)
    finally:
        launcher.terminate()  # which ends its processes too
    return subprocess.CompletedProcess(launcher.args, launcher.returncode, *said)


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
    """A run on two processes of which one was killed: its folder, and how it ended, after how many seconds."""
    folder = tmp_path_factory.mktemp("killed")
    return folder, torchrun("killed_rank.py", folder), seconds_since_the_kill(folder)


def seconds_since_the_kill(folder):
    """By the file that was written just before it."""
    return time.time() - (folder / "killed").stat().st_mtime


@pytest.fixture(scope="session")
def three(tmp_path_factory):
    """What three processes found, two of a launcher and one of another, and how both ended when one was killed."""
    folder = tmp_path_factory.mktemp("three")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    how = [
        "--nnodes",
        "2",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        f"127.0.0.1:{port}",
        "--local_addr",
        "127.0.0.1",
    ]
    machines = [launched("three_ranks.py", folder, how=how, processes=count) for count in (2, 1)]
    ended = [finished(machine) for machine in machines]
    assert (folder / "found.json").is_file(), [each.stderr[-4000:] for each in ended]
    return json.loads((folder / "found.json").read_text()), ended, seconds_since_the_kill(folder)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A tiny classifier of pets, and images of pets and of weapons; no batch size divides those to test on."""
    root = tmp_path_factory.mktemp("images")
    for seed, (task, classes) in enumerate({"pets": ("cat", "dog"), "weapons": ("gun", "knife")}.items()):
        image_folder(root / task, classes, {"train": 12, "test": 7}, 8, seed)
    tiny_classifier(root / "model", ("cat", "dog"))
    return root


@pytest.fixture(scope="session")
def two_folder(torchrun, online, one, one_folder, killed, images, tmp_path_factory):
    """What two processes wrote, who had the folders of the one and of the killed ones beside them."""
    folder = tmp_path_factory.mktemp("two")
    done = torchrun("two_ranks.py", folder, one_folder, killed[0], images, **online)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="session")
def two(two_folder):
    """What two processes found, as the first of them wrote it."""
    return json.loads((two_folder / "found.json").read_text())


@pytest.fixture(scope="session")
def zero(torchrun, online, images, tmp_path_factory):
    """Where two processes worked with DeepSpeed, and what they found, by stage."""
    folder = tmp_path_factory.mktemp("zero")
    done = torchrun("zero.py", folder, images, **online)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads((folder / "found.json").read_text())
