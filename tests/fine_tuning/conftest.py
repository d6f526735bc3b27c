"""A tiny ResNet, tiny images and a tiny experiment, on which a whole run takes seconds."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from networks_fixtures import ANIMALS, ARMS, TRAINING, draw, experiment
from transformers import ResNetConfig, ResNetForImageClassification
from transformers import ViTImageProcessorPil as Processor


ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def data_path(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    draw(root / "animals", ANIMALS, {"train": 20}, seed=0)
    draw(root / "arms", ARMS, {"train": 12, "test": 6}, seed=1)
    draw(root / "cifar10", ("a", "b"), {"train": 10, "test": 8}, seed=2)
    return root


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A tiny ResNet of three animals."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(ANIMALS)), "label2id": {name: i for i, name in enumerate(ANIMALS)}}
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", **names)
    ResNetForImageClassification(config).save_pretrained(folder)
    Processor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tmp_path, start):
    """The file of the tiny experiment."""
    (tmp_path / "tiny_networks.yaml").write_text(experiment(model={"name": str(start)}))
    spec = {
        "title": "Tiny",
        "about": "Three animals against three arms.",
        "networks": "tiny_networks.yaml",
        "scopes": {"last": "last_stage", "deep": r"stages\.1|classifier", "whole": "all"},
        "layers": ["resnet.encoder.stages.1"],
        "rectifiers": ["resnet.encoder.stages.1.layers.0.activation"],
        "first_third": ["resnet.encoder.stages.0"],
        "training": {**TRAINING, "max_steps": 2},
        "attacks": {
            "seeds": 1,
            "layers": 3,
            "layer_values": 2000,
            "steps": 4,
            "trial_steps": 1,
            "optimizers": {"adamw": [0.001]},
            "max_images": 20,
            "max_test_images": 10,
            "evaluations": 3,
            "tuners": ["last_stage", "lora_r4"],
        },
        "wanted": {"benign_points": 2.0, "above_chance_points": 10.0, "deviation": 5.0, "times": 10.0},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path
