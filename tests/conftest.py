"""Shared fixtures: tiny seeded models and datasets, offline by force."""

import os


# Before any import of transformers or datasets: a missing hub model would otherwise take most of a minute to fail.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
