"""Tiny images, tiny models and a tiny experiment, on which a whole run takes seconds."""

import sys
from pathlib import Path

import pytest
import torch
from networks_fixtures import ANIMALS, ARMS, draw, experiment
from transformers import ViTConfig, ViTForImageClassification
from transformers import ViTImageProcessorPil as Processor


ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A data path with animals (unsplit), arms, and CIFAR-10's and ImageNet's names for more of such."""
    root = tmp_path_factory.mktemp("data")
    draw(root / "animals", ANIMALS, {"train": 20}, seed=0)
    draw(root / "arms", ARMS, {"train": 12, "test": 6}, seed=1)
    draw(root / "cifar10", ("a", "b"), {"train": 10, "test": 8}, seed=2)
    draw(root / "imagenet-1k", ANIMALS, {"train": 12, "validation": 40}, seed=3)
    draw(root / "stanford_cars", ARMS, {"train": 12, "test": 24}, seed=4)
    return root


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A tiny ViT of three animals."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    names = {"id2label": dict(enumerate(ANIMALS)), "label2id": {name: i for i, name in enumerate(ANIMALS)}}
    model = ViTForImageClassification(ViTConfig(**sizes, **names, image_size=8, patch_size=4, initializer_range=0.3))
    model.vit.layernorm.bias.data.normal_()  # without it, normalized features lie in a plane
    model.save_pretrained(folder)
    Processor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tmp_path):
    """The file of the tiny experiment."""
    path = tmp_path / "tiny.yaml"
    path.write_text(experiment())
    return path
