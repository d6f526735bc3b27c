"""Features and images of four classes that any attacker should separate, tiny models to attack, tiny budgets."""

from dataclasses import replace

import pytest
import torch
import transformers as hf
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image

from hf_immunize.attacks.attacker import ProbeBudget, ProbeData, TuningBudget
from hf_immunize.attacks.presets import find_preset


CLASSES = 4


def clusters(rows, seed, dim=12, spread=0.6):
    """Points around four corners; the labels go round."""
    generator = torch.Generator().manual_seed(seed)
    corners = 3 * torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(rows) % CLASSES
    return corners[labels] + spread * torch.randn(rows, dim, generator=generator), labels


def pictures(rows, seed):
    """Images of 8 pixels in the colour that stands for the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % CLASSES
    colours = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0], [-2.0, -2.0, -2.0]])
    return colours[labels][:, :, None, None] + 0.3 * torch.randn(rows, 3, 8, 8, generator=generator), labels


def rows_of(pixels, labels):
    return [{"pixel_values": p, "labels": int(y)} for p, y in zip(pixels, labels, strict=True)]


def saved_images(folder, splits):
    """Pictures as a data set of images on disk, by split."""
    parts = {}
    for split, (pixels, labels) in splits.items():
        shades = ((pixels.clamp(-1, 2) + 1) * 80).byte().permute(0, 2, 3, 1).numpy()
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=list("abcd"))})
        images = [Image.fromarray(image) for image in shades]
        parts[split] = Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
    DatasetDict(parts).save_to_disk(folder)
    return str(folder)


def tiny_vit(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=8, patch_size=4, num_labels=4, **sizes)).eval()


def tiny_resnet(seed=0):
    torch.manual_seed(seed)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=4, **sizes)).eval()


@pytest.fixture
def features():
    return ProbeData(*clusters(120, 0), *clusters(80, 1), CLASSES)


@pytest.fixture
def probe_budget():
    return ProbeBudget(descent_steps=200, iterations=20, steps=60, batch_size=32)


@pytest.fixture
def tuning_budget():
    return TuningBudget(steps=60, trial_steps=15, optimizers={"adamw": (3e-3,)}, evaluations=3)


@pytest.fixture
def tiny_preset(probe_budget, tuning_budget):
    return replace(
        find_preset("quick"),
        probes=("ridge", "gd_line_search"),
        fine_tuning=("bias_only",),
        benign_attackers=("ridge",),
        probe_seeds=2,
        layer_seeds=1,
        tuning_seeds=2,
        random_copies=0,
        max_layers=2,
        probe_budget=probe_budget,
        tuning_budget=replace(tuning_budget, steps=4, trial_steps=2),
    )


@pytest.fixture
def harmful():
    return rows_of(*pictures(40, 0)), rows_of(*pictures(24, 1))
