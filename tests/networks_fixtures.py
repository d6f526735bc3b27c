"""What the tests of the experiments on networks share: tiny images, and an experiment on them."""

import numpy as np
import yaml
from PIL import Image


ANIMALS = ("cat", "dog", "hen")
ARMS = ("axe", "bow", "gun", "pike", "sword")
TRAINING = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "use_cpu": True}
TRAINING |= {"disable_tqdm": True, "save_steps": 2, "save_total_limit": 1, "logging_steps": 1}


def draw(root, classes, counts, seed):
    generator = np.random.default_rng(seed)
    for split, count in counts.items():
        for shade, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 128, (16, 16, 3)) + 25 * shade
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{index}.png")


def experiment(**parts):
    """An experiment's file, as text."""
    spec = {
        "title": "Tiny",
        "about": "Three animals against five arms.",
        "model": {"name": "set by --model"},
        "benign": {"source": "animals", "test_fraction": 0.3},
        "harmful": {"source": "arms", "classes_used": 3},
        "distillation": {"source": "cifar10", "max_images": 12},
        "unrelated": {"source": "cifar10"},
        "training": TRAINING,
        "audit": {"attackers": ["ridge", "whitening"], "layers": 2, "layer_values": 300},
        "wanted": {"benign_points": 1, "above_chance_points": 3, "log10_rir": 4, "benign_ratio": 1},
    }
    return yaml.safe_dump({**spec, **parts})
