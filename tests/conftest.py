"""Shared fixtures: tiny seeded models and datasets, offline by force."""

import gc
import os


# Before any import of transformers or datasets: a missing hub model would otherwise take most of a minute to fail.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import numpy as np
import pytest
import torch
from attacked import features, harmful, probe_budget, tiny_preset, tuning_budget  # noqa: F401
from families import BUILDERS
from hub_server import TOKEN, Hub
from PIL import Image


@pytest.fixture(autouse=True, scope="module")
def _small_heap():
    """Leave what was imported out of garbage collections: each Trainer's costs most of a second otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    """The client in this process, turned to the loopback Hub; waiting costs no time."""
    import huggingface_hub

    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    # transformers keeps one client, with the endpoint of its first use.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture
def api(online):
    from huggingface_hub import HfApi

    return HfApi(endpoint=online.url, token=TOKEN)


@pytest.fixture(params=list(BUILDERS))
def family(request):
    return request.param


@pytest.fixture
def tiny():
    """Build a seeded tiny classifier with three labels, in eval mode."""

    def build(name):
        torch.manual_seed(0)
        return BUILDERS[name]().eval()

    return build


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def image_dataset():
    """Six greyscale images of 8 pixels with the classes a, b, c, a, b, c; image i has the shade 20 i."""
    images = [Image.fromarray(np.full((8, 8), 20 * i, np.uint8)) for i in range(6)]
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    return datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2, 0, 1, 2]}, features=columns)


@pytest.fixture
def with_damaged():
    """Put bytes that are no image, or part of one, into a row of an image dataset."""

    def damage(dataset, row, content):
        stored = dataset.cast_column("image", datasets.Image(decode=False))["image"][:]
        stored[row] = content if content is None else {"bytes": content, "path": None}
        rows = {"image": stored, "label": dataset["label"][:]}
        return datasets.Dataset.from_dict(rows, features=dataset.features)

    return damage


@pytest.fixture
def unreadable():
    """Three rows made on the fly, of which none may be read."""

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise AssertionError("an item was read")

    return Rows()
