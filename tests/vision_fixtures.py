"""Tiny models of many families (tests/families.py), and tiny image datasets."""

import datasets
import numpy as np
import pytest
import torch
from families import BUILDERS
from PIL import Image


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
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    return datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2, 0, 1, 2]}, features=features)


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
