"""The benchmark on a GPU: its table without one, and its loop on tiny models."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification


sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_rows_are_empty_and_it_says_so():
    found = gpu.run()
    (table,) = found["tables"]
    assert "No GPU" in found["summary"] and not any(cell for row in table["rows"] for cell in row[2:])
    assert all(len(row) == len(gpu.COLUMNS) for row in table["rows"])


def test_every_variant_is_set_against_the_plain_trainer():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=10)
    model = ResNetForImageClassification(config)
    rows = gpu.compare({"tiny": model}, torch.device("cpu"), side=4, size=32, count=4, rounds=1)
    assert [row[1] for row in rows] == ["plain", *gpu.VARIANTS] and rows[0][3] == "1.000"
    assert all(len(row) == len(gpu.COLUMNS) for row in rows)
