"""Tiny classifiers of many families, with three labels, for images of 32 pixels."""

import transformers as hf


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
    "initializer_range": 0.3,  # with the default of 0.02, features of an untrained network are of the order 1e-18
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
