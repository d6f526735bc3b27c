"""What the package knows about single model families, one row each: what structure does not tell.

To add a family, write its row here and its tiny model in tests/families.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


@dataclass(frozen=True)
class Family:
    """A family of image classifiers in transformers."""

    name: str = ""  # as documents call it
    checkpoint: str = ""  # whose sizes the table in docs/backbones.md shows; a family without one is not in it
    head_input: str = ""  # what the classifier reads
    sizes: Mapping[str, Any] = field(default_factory=dict)  # of the checkpoint, where they are not the defaults
    unread: tuple[str, ...] = ()  # modules after the blocks that the classifier does not read
    pooler: str = "pooler"  # the module that makes pooler_output out of last_hidden_state
    backbone: str = ""  # model type of the bare backbone, where the classifier is configured for two towers


CLASS_TOKEN = "class token after the last norm"
CLASS_AND_PATCHES = "class token beside the mean of the patches, after the last norm"
MEAN_TOKEN = "mean of the tokens after the last norm"
MEAN_MAP = "mean of the last feature map"
NORMED_MAP = "norm of the mean of the last feature map"

_DINOV2, _SWINV2 = {"patch_size": 14, "image_size": 518}, {"image_size": 256, "window_size": 8}
_B0 = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "image_size": 224, "hidden_dim": 1280}
_PATCHES = f"{CLASS_AND_PATCHES}; registers left out"
_CLIP, _NORM = "mean of the patches, before the last norm", ("vision_model.post_layernorm",)
_SIGLIP, _HEAD = "mean of the patches after the last norm", ("vision_model.head",)

# Model type of the classifier to its family.
FAMILIES = {
    "vit": Family("ViT", "google/vit-base-patch16-224", CLASS_TOKEN),
    "deit": Family("DeiT", "facebook/deit-base-patch16-224", CLASS_TOKEN),
    "beit": Family("BEiT", "microsoft/beit-base-patch16-224", "norm of the mean of the patches"),
    "dinov2": Family("DINOv2", "facebook/dinov2-base", CLASS_AND_PATCHES, _DINOV2),
    "dinov2_with_registers": Family("DINOv2 with registers", "facebook/dinov2-with-registers-base", _PATCHES, _DINOV2),
    "clip": Family("CLIP", "openai/clip-vit-base-patch32", _CLIP, {}, _NORM, "post_layernorm", "clip_vision_model"),
    "metaclip_2": Family("MetaCLIP 2", unread=_NORM),
    "siglip": Family("SigLIP", "google/siglip-base-patch16-224", _SIGLIP, {}, _HEAD, "head", "siglip_vision_model"),
    "swin": Family("Swin", "microsoft/swin-tiny-patch4-window7-224", MEAN_TOKEN),
    "swinv2": Family("SwinV2", "microsoft/swinv2-tiny-patch4-window8-256", MEAN_TOKEN, _SWINV2),
    "focalnet": Family("FocalNet", "microsoft/focalnet-tiny", MEAN_TOKEN),
    "resnet": Family("ResNet", "microsoft/resnet-50", MEAN_MAP),
    "regnet": Family("RegNet", "facebook/regnet-y-040", MEAN_MAP),
    "convnext": Family("ConvNeXt", "facebook/convnext-tiny-224", NORMED_MAP, pooler="layernorm"),
    "convnextv2": Family("ConvNeXtV2", "facebook/convnextv2-tiny-1k-224", NORMED_MAP, pooler="layernorm"),
    "mobilenet_v2": Family("MobileNetV2", "google/mobilenet_v2_1.0_224", MEAN_MAP),
    "efficientnet": Family("EfficientNet", "google/efficientnet-b0", MEAN_MAP, _B0),
}


def family_of(config: Any) -> Family:
    """The row of a classifier's or a bare backbone's config; an empty one where it has none."""
    kind = config.model_type
    return FAMILIES.get(kind) or next((row for row in FAMILIES.values() if row.backbone == kind), Family())


def classifier_class(config: Any) -> Any:
    """The image classifier of transformers for a config; None where there is none."""
    kind = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None)
    return kind[0] if isinstance(kind, tuple) else kind  # DeiT has a second one, with a teacher


def image_shape(config: Any, default: int) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model takes; ``default`` where any size will do."""
    config = getattr(config, "vision_config", None) or config
    timm = getattr(config, "pretrained_cfg", None) or {}
    size = getattr(config, "image_size", None) or (timm.get("input_size") or [default])[-1]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return getattr(config, "num_channels", 3), height, width
