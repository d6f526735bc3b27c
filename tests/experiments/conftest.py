"""Tiny images, a tiny model and a file of tiny settings, on which a whole run takes seconds."""

import sys
from pathlib import Path

import pytest
import yaml
from folders import image_folder, tiny_classifier


ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

ANIMALS, ARMS = ("cat", "dog", "hen"), ("axe", "bow", "gun", "pike", "sword")
TRAINING = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "use_cpu": True}
TRAINING |= {"disable_tqdm": True, "save_steps": 2, "save_total_limit": 1, "logging_steps": 1}


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A data path with animals (unsplit), arms, and CIFAR-10's and ImageNet's names for more of such."""
    root = tmp_path_factory.mktemp("data")
    drawn = [("animals", ANIMALS, {"train": 20}), ("arms", ARMS, {"train": 12, "test": 6})]
    drawn += [("cifar10", ("a", "b"), {"train": 10, "test": 8})]
    drawn += [("imagenet-1k", ANIMALS, {"train": 12, "validation": 40})]
    drawn += [("stanford_cars", ARMS, {"train": 12, "test": 24})]
    for seed, (folder, classes, counts) in enumerate(drawn):
        image_folder(root / folder, classes, counts, 16, seed)
    return root


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A tiny ViT of three animals."""
    return tiny_classifier(tmp_path_factory.mktemp("model") / "tiny", ANIMALS)


@pytest.fixture
def tiny(tmp_path, tiny_model):
    """Writes a file of tiny settings, of which parts of the backbone or the task may be changed."""

    def write(plan=(), **parts):
        backbone = {
            "title": "Tiny",
            "about": "Three animals",
            "start": {"name": str(tiny_model)},
            "benign": {"source": "animals", "test_fraction": 0.3},
            "distillation": {"source": "cifar10", "max_images": 12},
            "training": TRAINING,
        }
        task = {
            "title": "against arms",
            "about": "of five kinds.",
            "harmful": {"source": "arms", "classes_used": 3},
            "unrelated": {"source": "cifar10"},
            "audit": {"attackers": ["ridge", "whitening"], "layers": 2, "layer_values": 300},
            "wanted": {"benign_points": 1, "above_chance_points": 3, "log10_rir": 4, "benign_ratio": 1},
        }
        backbone |= {name: part for name, part in parts.items() if name in backbone}
        task |= {name: part for name, part in parts.items() if name not in backbone}
        path = tmp_path / "tiny.yaml"
        backbone = {name: part for name, part in backbone.items() if part is not None}
        settings = {"backbones": {"tiny": backbone}, "tasks": {"arms": task}, "plan": list(plan)}
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    return write


@pytest.fixture
def run_of(tiny, images, tmp_path):
    """A tiny run, of which seed and place or parts of the settings may be changed."""
    from examples.experiments.settings import Run

    def make(seed=0, place="runs", **parts):
        places = {"data_path": str(images), "output_dir": str(tmp_path / place)}
        return Run("tiny", "arms", seed=seed, settings=tiny(**parts), **places)

    return make
