"""A tiny classifier of each family, with three labels, for images of 32 pixels, and what is expected of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import transformers as hf
from torch.nn.modules.batchnorm import _BatchNorm

from hf_immunize.vision.families import classifier_class


LABELS = {"num_labels": 3}
TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
TRANSFORMER |= {"image_size": 32, "patch_size": 16}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 50}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
DINO = TRANSFORMER | {"mlp_ratio": 2}
TOWERS = {"vision_config": TRANSFORMER, "text_config": TEXT}
CONVOLUTIONAL = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
MOBILE = {"image_size": 32, "depth_multiplier": 0.25, "min_depth": 4, "depth_divisible_by": 4}
# With the default range of 0.02, features of an untrained network are of the order 1e-18.
EFFICIENT = {"image_size": 32, "initializer_range": 0.3, "width_coefficient": 0.25, "depth_coefficient": 0.5}
EFFICIENT |= {"in_channels": [32, 16, 24], "out_channels": [16, 24, 40], "hidden_dim": 320, "strides": [1, 2, 1]}
EFFICIENT |= {"kernel_sizes": [3, 3, 3], "num_block_repeats": [1, 2, 2], "expand_ratios": [1, 6, 6]}
EFFICIENT |= {"depthwise_padding": []}
FOCAL = {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "hidden_sizes": [8, 16]}
FOCAL |= {"focal_levels": [1, 1], "focal_windows": [3, 3]}


# What the head reads, out of the last hidden state of the backbone.
def class_token(model, hidden):
    return hidden[:, 0]


def mean_token(model, hidden):
    return hidden.mean(1)


def mean_patch(model, hidden):
    return hidden[:, 1:].mean(1)


def mean_map(model, hidden):
    return hidden.mean((2, 3))


def normed_map(model, hidden):
    return model.base_model.layernorm(mean_map(model, hidden))


def normed_patch(model, hidden):
    return model.base_model.pooler.layernorm(mean_patch(model, hidden))


def class_and_patches(model, hidden):
    leading = 1 + getattr(model.config, "num_register_tokens", 0)
    return torch.cat([hidden[:, 0], hidden[:, leading:].mean(1)], dim=1)


@dataclass(frozen=True)
class Tiny:
    sizes: dict
    # What the names of the last stage's parameters begin with: blocks, what follows, and the classifier.
    last_stage: tuple[str, ...]
    head_input: Callable
    choke_points: bool = False  # whether the last stage has ReLUs that no shortcut bypasses


def last_two(blocks, *after):
    """Of three blocks."""
    return f"{blocks}.1", f"{blocks}.2", *after


TINY = {
    "vit": Tiny(TRANSFORMER, last_two("vit.layers", "vit.layernorm"), class_token),
    "deit": Tiny(TRANSFORMER, last_two("deit.layers", "deit.layernorm"), class_token),
    "beit": Tiny(TRANSFORMER, last_two("beit.layers", "beit.pooler"), normed_patch),
    "dinov2": Tiny(DINO, last_two("dinov2.encoder.layer", "dinov2.layernorm"), class_and_patches),
    "dinov2_with_registers": Tiny(
        DINO | {"num_register_tokens": 2},
        last_two("dinov2_with_registers.encoder.layer", "dinov2_with_registers.layernorm"),
        class_and_patches,
    ),
    "clip": Tiny(TOWERS, last_two("vision_model.encoder.layers"), mean_patch),
    "metaclip_2": Tiny(TOWERS, last_two("vision_model.encoder.layers"), mean_patch),
    "siglip": Tiny(
        TOWERS,
        last_two("vision_model.encoder.layers", "vision_model.post_layernorm"),
        mean_token,
    ),
    "swin": Tiny(SWIN, ("swin.encoder.layers.1", "swin.layernorm"), mean_token),
    "swinv2": Tiny(SWIN, ("swinv2.encoder.layers.1", "swinv2.layernorm"), mean_token),
    "focalnet": Tiny(FOCAL, ("focalnet.encoder.stages.1", "focalnet.layernorm"), mean_token),
    "resnet": Tiny(CONVOLUTIONAL | {"layer_type": "basic"}, ("resnet.encoder.stages.1",), mean_map, True),
    "regnet": Tiny(CONVOLUTIONAL | {"groups_width": 8}, ("regnet.encoder.stages.1",), mean_map, True),
    "convnext": Tiny(CONVNEXT, ("convnext.encoder.stages.1", "convnext.layernorm"), normed_map),
    "convnextv2": Tiny(CONVNEXT, ("convnextv2.encoder.stages.1", "convnextv2.layernorm"), normed_map),
    "mobilenet_v2": Tiny(
        MOBILE,
        (*(f"mobilenet_v2.layer.{block}" for block in range(12, 16)), "mobilenet_v2.conv_1x1"),
        mean_map,
        True,
    ),
    "efficientnet": Tiny(
        EFFICIENT,
        (*(f"efficientnet.encoder.{part}" for part in ("blocks.1", "blocks.2", "top_conv", "top_bn")),),
        mean_map,
    ),
}


def classifier(name):
    config = hf.AutoConfig.for_model(name, **TINY[name].sizes, **LABELS)
    return classifier_class(config)(config)


def backbone(name, **options):
    config = hf.AutoConfig.for_model(name, **TINY[name].sizes)
    return hf.AutoModel.from_config(getattr(config, "vision_config", config), **options)


BUILDERS = {name: partial(classifier, name) for name in TINY}


def calibrate(model, *batches):
    """Give BatchNorm the mean statistics of batches, without which features of an untrained network vanish."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
    if norms:
        with torch.no_grad():
            for pixels in batches or [torch.randn(16, 3, 32, 32)]:
                model.train()(pixel_values=pixels)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    return model
