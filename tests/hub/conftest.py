"""A tiny immunized checkpoint with its record."""

import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest


sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import benign_images, harmful_images, reference_model, write_checkpoint

from hf_immunize.hub.record import read_record


@pytest.fixture
def benign():
    return benign_images()


@pytest.fixture
def harmful():
    return harmful_images()


@pytest.fixture
def reference():
    return reference_model()


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("made"))[0]


@pytest.fixture
def checkpoint(made, tmp_path):
    return shutil.copytree(made, tmp_path / "checkpoint")


@pytest.fixture
def record(checkpoint):
    return read_record(checkpoint)


@pytest.fixture
def impatient(online, monkeypatch):
    """The client waits a moment where it waits long."""
    monkeypatch.setattr("hf_immunize.hub.load.TIME_LIMIT", 0.3)
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(huggingface_hub.constants, name, 0.3)


@pytest.fixture
def tamper():
    """Change one weight of a checkpoint."""

    def change(folder):
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-2] ^= 0x40
        path.write_bytes(bytes(content))

    return change
