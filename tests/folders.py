"""What a user has on disk: images in folders, and a tiny classifier."""

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil


def image_folder(root, classes, counts, size, seed=0):
    """Images of noise, so many for each split and class; a class has a shade of its own."""
    generator = np.random.default_rng(seed)
    for split, count in counts.items():
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 128, (size, size, 3)) + 30 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{index}.png")
    return root


def tiny_classifier(folder, names, size=8):
    """A ViT of these classes, with its processor."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    sizes |= {"image_size": size, "patch_size": size // 2, "initializer_range": 0.3}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    model = ViTForImageClassification(ViTConfig(**sizes, **labels))
    model.vit.layernorm.bias.data.normal_()  # without it, normalized features lie in a plane
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)
    return folder
