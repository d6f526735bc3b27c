"""Tiny models of many families, and tiny image datasets."""

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image


LABELS = {"num_labels": 3}
TRANSFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 16,
}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 50}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
CONVOLUTIONAL = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
EFFICIENT = {
    "image_size": 32,
    "width_coefficient": 0.25,
    "depth_coefficient": 0.5,
    "hidden_dim": 320,
    "in_channels": [32, 16, 24],
    "out_channels": [16, 24, 40],
    "kernel_sizes": [3, 3, 3],
    "strides": [1, 2, 1],
    "num_block_repeats": [1, 2, 2],
    "expand_ratios": [1, 6, 6],
    "depthwise_padding": [],
}
FOCAL = {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "hidden_sizes": [8, 16]}
FOCAL |= {"focal_levels": [1, 1], "focal_windows": [3, 3]}

BUILDERS = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**TRANSFORMER, **LABELS)),
    "deit": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**TRANSFORMER, **LABELS)),
    "beit": lambda: hf.BeitForImageClassification(hf.BeitConfig(**TRANSFORMER, **LABELS)),
    "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**TRANSFORMER, mlp_ratio=2, **LABELS)),
    "dinov2_with_registers": lambda: hf.Dinov2WithRegistersForImageClassification(
        hf.Dinov2WithRegistersConfig(**TRANSFORMER, mlp_ratio=2, num_register_tokens=2, **LABELS)
    ),
    "clip": lambda: hf.CLIPForImageClassification(
        hf.CLIPConfig(vision_config=TRANSFORMER, text_config=TEXT, **LABELS)
    ),
    "siglip": lambda: hf.SiglipForImageClassification(
        hf.SiglipConfig(vision_config=TRANSFORMER, text_config=TEXT, **LABELS)
    ),
    "swin": lambda: hf.SwinForImageClassification(hf.SwinConfig(**SWIN, **LABELS)),
    "swinv2": lambda: hf.Swinv2ForImageClassification(hf.Swinv2Config(**SWIN, **LABELS)),
    "focalnet": lambda: hf.FocalNetForImageClassification(hf.FocalNetConfig(**FOCAL, **LABELS)),
    "resnet": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**CONVOLUTIONAL, layer_type="basic", **LABELS)),
    "regnet": lambda: hf.RegNetForImageClassification(hf.RegNetConfig(**CONVOLUTIONAL, groups_width=8, **LABELS)),
    "convnext": lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, **LABELS)
    ),
    "convnextv2": lambda: hf.ConvNextV2ForImageClassification(
        hf.ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, **LABELS)
    ),
    "mobilenet_v2": lambda: hf.MobileNetV2ForImageClassification(
        hf.MobileNetV2Config(image_size=32, depth_multiplier=0.25, min_depth=4, depth_divisible_by=4, **LABELS)
    ),
    "efficientnet": lambda: hf.EfficientNetForImageClassification(hf.EfficientNetConfig(**EFFICIENT, **LABELS)),
}


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
