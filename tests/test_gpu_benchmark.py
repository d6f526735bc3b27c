"""The loop of the benchmark on a GPU, on a tiny model."""

import sys
from pathlib import Path

import torch
from transformers import ResNetConfig, ResNetForImageClassification


sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu


def test_every_variant_is_set_against_the_plain_trainer():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=10)
    model = ResNetForImageClassification(config)
    rows = gpu.compare({"tiny": model}, torch.device("cpu"), side=4, size=32, count=4, rounds=1)
    assert [row[1] for row in rows] == ["plain", *gpu.VARIANTS] and rows[0][3] == "1.000"
    assert all(len(row) == len(gpu.COLUMNS) for row in rows)
