"""Models of timm in transformers' wrapper, where timm is installed."""

import pytest
import torch
import transformers as hf

from hf_immunize.errors import HeadError, ScopeError
from hf_immunize.vision.head import find_head, penultimate_features
from hf_immunize.vision.scope import last_stage, select_trainable


pytest.importorskip("timm", reason="pip install 'hf-immunize[timm]', and a torchvision of the same build as torch")

# Architecture -> (head, what the last stage's parameters begin with).
EXPECTED = {
    "resnet18": ("fc", ["layer4.", "fc."]),
    "vit_tiny_patch16_224": ("head", ["blocks.11.", "norm.", "head."]),
    "beit_base_patch16_224": ("head", ["blocks.11.", "fc_norm.", "head."]),
    "convnext_atto": ("head.fc", ["stages.3.", "head.norm.", "head.fc."]),
    "swin_tiny_patch4_window7_224": ("head.fc", ["layers.3.", "norm.", "head.fc."]),
    "mobilenetv2_100": ("classifier", ["blocks.5.", "blocks.6.", "conv_head.", "bn2.", "classifier."]),
}


@pytest.fixture
def wrapped():
    """Build a seeded classifier with three labels, in eval mode."""

    def build(architecture):
        torch.manual_seed(0)
        config = hf.TimmWrapperConfig(architecture=architecture, num_labels=3)
        return hf.TimmWrapperForImageClassification(config).eval()

    return build


@pytest.mark.parametrize("architecture", list(EXPECTED))
def test_head_and_last_stage_are_found_and_features_are_what_the_head_reads(wrapped, architecture):
    model, pixels = wrapped(architecture), torch.randn(2, 3, 224, 224)
    head, stage = EXPECTED[architecture]
    prefixes = tuple(f"timm_model.{part}" for part in stage)
    expected = [name for name, _ in model.named_parameters() if name.startswith(prefixes)]
    assert find_head(model)[0] == f"timm_model.{head}" and select_trainable(model, "last_stage") == expected
    logits = model(pixel_values=pixels).logits
    torch.testing.assert_close(find_head(model)[1](penultimate_features(model, pixels)), logits)


def test_two_heads_and_blocks_that_are_not_separable_are_refused(wrapped):
    with pytest.raises(HeadError, match=r"'timm_model.head', 'timm_model.head_dist'"):
        find_head(wrapped("deit_tiny_distilled_patch16_224"))
    with pytest.raises(ScopeError, match="last_stage"):
        last_stage(wrapped("densenet121"))
