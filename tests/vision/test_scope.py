"""The last stage of each family, and what stays in eval mode."""

import pytest
import torch
import transformers as hf
from torch import nn

from hf_immunize.errors import HeadError, ScopeError
from hf_immunize.vision.head import penultimate_features
from hf_immunize.vision.scope import has_batch_statistics, last_stage, modules_in_eval, select_trainable


def train(model, still):
    model.train()
    for module in still:
        module.training = False


def test_blocks_of_pvt_are_stages_although_their_attention_strides():
    config = hf.PvtConfig(
        image_size=32,
        hidden_sizes=[8, 16, 16],
        depths=[1, 1, 1],
        num_encoder_blocks=3,
        num_attention_heads=[1, 2, 2],
        sequence_reduction_ratios=[2, 2, 1],
        patch_sizes=[4, 2, 2],
        strides=[4, 2, 1],
        mlp_ratios=[4, 4, 4],
        num_labels=3,
    )
    blocks = {name.split(".")[3] for name in last_stage(hf.PvtForImageClassification(config)) if ".block." in name}
    assert blocks == {"2"}


class Plain(nn.Module):
    """A classifier without any list of blocks, with the little of a transformers model that is used."""

    def __init__(self):
        super().__init__()
        self.config = hf.PretrainedConfig(num_labels=3)
        self.body, self.classifier = nn.Linear(4, 8), nn.Linear(8, 3)

    @property
    def base_model(self):
        return self


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)


def test_a_model_without_blocks_asks_for_an_expression():
    with pytest.raises(ScopeError, match="none in Plain"):
        last_stage(Plain())


def test_stages_that_stand_in_the_model_itself_are_found():
    model = Plain()
    for i in range(3):
        setattr(model, f"s{i}", Stage())
    assert last_stage(model) == ["classifier.weight", "classifier.bias", "s2.inner.weight", "s2.inner.bias"]


def test_a_last_stage_that_is_everything_is_refused():
    model = Plain()
    model.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3))
    with pytest.raises(ScopeError, match="none in Plain"):
        last_stage(model)


def test_select_sets_requires_grad_both_ways(tiny):
    model = tiny("vit")
    model.requires_grad_(False)
    model.vit.embeddings.requires_grad_(True)
    moving = select_trainable(model, "last_stage")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == moving == last_stage(model)


def test_all_moves_everything(tiny):
    model = tiny("vit").requires_grad_(False)
    assert len(select_trainable(model, "all")) == len(list(model.parameters()))
    assert all(p.requires_grad for p in model.parameters())


def test_an_expression_is_searched_in_names(tiny):
    moving = select_trainable(tiny("vit"), r"layers\.1\..*q_proj")
    assert moving == ["vit.layers.1.attention.q_proj.weight", "vit.layers.1.attention.q_proj.bias"]


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
    assert all(p.requires_grad for p in model.parameters())


def test_a_wrong_head_module_is_refused(tiny):
    with pytest.raises(HeadError):
        select_trainable(tiny("vit"), "all", head_module="vit")


def test_modules_that_do_not_move_stay_in_eval(tiny):
    model = tiny("vit")
    still = modules_in_eval(model, select_trainable(model, "last_stage"))
    assert set(model.vit.embeddings.modules()) | set(model.vit.layers[1].modules()) <= set(still)


def test_modules_that_hold_moving_parts_train(tiny):
    model = tiny("vit")
    still = modules_in_eval(model, select_trainable(model, "last_stage"))
    assert not {model, model.vit, model.vit.layers, model.vit.layers[2], model.classifier} & set(still)


def test_dropout_trains_within_a_moving_block_only():
    config = hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4)
    model = hf.SwinForImageClassification(config)
    still = modules_in_eval(model, select_trainable(model, "last_stage"))
    frozen, moving = model.swin.encoder.layers[0].blocks[0], model.swin.encoder.layers[1].blocks[1]
    assert frozen.dropout in still and model.swin.embeddings.dropout in still
    assert moving.dropout not in still and moving.drop_path not in still


@pytest.mark.parametrize("freeze", [True, False])
def test_batchnorm_of_the_moving_part_is_frozen_on_request(tiny, freeze):
    model = tiny("resnet")
    still = modules_in_eval(model, select_trainable(model, "last_stage"), freeze_batchnorm=freeze)
    norms = {name: module in still for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert all(frozen for name, frozen in norms.items() if "stages.1." not in name)
    assert all(frozen == freeze for name, frozen in norms.items() if "stages.1." in name)


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet"])
def test_dropout_before_the_head_never_drops(tiny, name):
    model = tiny(name)
    assert model.dropout in modules_in_eval(model, select_trainable(model, "all"))


def test_features_in_training_are_those_of_the_released_model(tiny, pixels):
    model = tiny("mobilenet_v2")
    released = penultimate_features(model, pixels)
    train(model, modules_in_eval(model, select_trainable(model, "all")))
    torch.testing.assert_close(penultimate_features(model, pixels), released)


def test_running_statistics_stay(tiny, pixels):
    model = tiny("resnet")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    train(model, modules_in_eval(model, select_trainable(model, "last_stage")))
    model(pixel_values=pixels)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize(
    "name, freeze, expected", [("resnet", True, False), ("resnet", False, True), ("vit", False, False)]
)
def test_batch_statistics_are_told(tiny, name, freeze, expected):
    model = tiny(name)
    still = modules_in_eval(model, select_trainable(model, "last_stage"), freeze_batchnorm=freeze)
    assert has_batch_statistics(model, still) == expected


def test_without_batch_statistics_one_forward_is_two(tiny, pixels):
    model = tiny("resnet")
    still = modules_in_eval(model, select_trainable(model, "last_stage"))
    train(model, still)
    assert not has_batch_statistics(model, still)
    apart = torch.cat([penultimate_features(model, image[None]) for image in pixels])
    torch.testing.assert_close(penultimate_features(model, pixels), apart)


def test_a_batchnorm_without_running_statistics_uses_the_batch():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    assert has_batch_statistics(norm, in_eval=[norm])
