"""The last stage of each family, and what stays in eval mode."""

import pytest
import torch
import transformers as hf
from torch import nn

from hf_immunize.errors import HeadError, ScopeError
from hf_immunize.vision.head import penultimate_features
from hf_immunize.vision.scope import has_batch_statistics, last_stage, modules_in_eval, select_trainable


def in_training(model, trainable, **options):
    """Put a model into training as the Trainer does; the modules that stay in eval mode."""
    frozen = modules_in_eval(model, select_trainable(model, trainable), **options)
    model.train()
    for module in frozen:
        module.training = False
    return frozen


@pytest.mark.parametrize(("blocks", "first"), [(1, 0), (2, 1), (3, 1), (12, 8), (24, 16)])
def test_of_blocks_of_one_resolution_the_last_third_is_the_stage_and_at_least_two(blocks, first):
    sizes = {"hidden_size": 4, "num_attention_heads": 1, "intermediate_size": 4, "image_size": 4, "patch_size": 4}
    model = hf.ViTForImageClassification(hf.ViTConfig(**sizes, num_hidden_layers=blocks))
    found = {int(name.split(".")[2]) for name in last_stage(model) if ".layers." in name}
    assert found == set(range(first, blocks))


class Plain(nn.Module):
    """A classifier without any list of blocks, with the little of a transformers model that is used."""

    def __init__(self):
        super().__init__()
        self.config = hf.PretrainedConfig(num_labels=3)
        self.body, self.classifier = nn.Linear(4, 8), nn.Linear(8, 3)

    @property
    def base_model(self):
        return self


def test_a_model_without_blocks_or_with_nothing_before_the_last_asks_for_an_expression():
    model = Plain()
    with pytest.raises(ScopeError, match="none in Plain"):
        last_stage(model)
    model.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3))
    with pytest.raises(ScopeError, match="none in Plain"):
        last_stage(model)


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ("last_stage", last_stage),
        ("all", lambda model: [name for name, _ in model.named_parameters()]),
        (r"layers\.1\..*q_proj", lambda _: [f"vit.layers.1.attention.q_proj.{part}" for part in ("weight", "bias")]),
    ],
)
def test_select_sets_requires_grad_both_ways(tiny, trainable, expected):
    model = tiny("vit").requires_grad_(False)
    model.vit.embeddings.requires_grad_(True)
    found = select_trainable(model, trainable)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == found == expected(model)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("(", r"'\(' \(missing"),
        ("last_block", r"'classifier.bias', found none"),
        ("^classifier", "the head 'classifier' alone"),
        *((pattern, "every one") for pattern in ("", ".", "classifier|")),
    ],
)
def test_an_expression_that_chooses_no_part_is_refused_and_changes_nothing(tiny, pattern, found):
    model = tiny("vit")
    with pytest.raises(ScopeError, match=found):
        select_trainable(model, pattern)
    with pytest.raises(HeadError):
        select_trainable(model, "all", head_module="vit")
    assert all(p.requires_grad for p in model.parameters())


def test_dropout_trains_within_a_trainable_block_only():
    config = hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4)
    model = hf.SwinForImageClassification(config)
    in_eval = in_training(model, "last_stage")
    frozen, trained = model.swin.encoder.layers[0].blocks[0], model.swin.encoder.layers[1].blocks[1]
    assert frozen.dropout in in_eval and model.swin.embeddings.dropout in in_eval
    assert trained.dropout not in in_eval and trained.drop_path not in in_eval


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet"])
def test_dropout_before_the_head_never_drops(tiny, pixels, name):
    model = tiny(name)
    released = penultimate_features(model, pixels)
    assert model.dropout in in_training(model, "all")
    if name == "mobilenet_v2":
        torch.testing.assert_close(penultimate_features(model, pixels), released)


@pytest.mark.parametrize("freeze", [True, False])
def test_batchnorm_of_the_trainable_part_is_frozen_on_request(tiny, pixels, freeze):
    model = tiny("resnet")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    in_eval = in_training(model, "last_stage", freeze_batchnorm=freeze)
    norms = {name: module in in_eval for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert all(frozen == (freeze or "stages.1." not in name) for name, frozen in norms.items())
    model(pixel_values=pixels)
    changed = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert all("stages.1." in name for name in changed) and bool(changed) != freeze
    # One forward pass over two sides is two, unless features depend on the batch.
    assert has_batch_statistics(model, in_eval) != freeze
    if freeze:
        apart = torch.cat([penultimate_features(model, image[None]) for image in pixels])
        torch.testing.assert_close(penultimate_features(model, pixels), apart)
