"""Bare backbones with a linear head of their own."""

import json

import pytest
import torch
import transformers as hf
from families import CONVOLUTIONAL, SWIN, TRANSFORMER
from safetensors.torch import load_file

from hf_immunize.errors import ArgumentError, CheckpointError, HeadError
from hf_immunize.vision.bare import LinearHeadForImageClassification, load_with_linear_head, with_linear_head
from hf_immunize.vision.head import find_head, penultimate_features
from hf_immunize.vision.scope import last_stage, select_trainable


BACKBONES = {
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**TRANSFORMER)),
    "deit": lambda: hf.DeiTModel(hf.DeiTConfig(**TRANSFORMER)),
    "beit": lambda: hf.BeitModel(hf.BeitConfig(**TRANSFORMER)),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**TRANSFORMER, mlp_ratio=2)),
    "dinov2_with_registers": lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(**TRANSFORMER, mlp_ratio=2, num_register_tokens=2)
    ),
    "dinov3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**TRANSFORMER, num_register_tokens=2)),
    "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**TRANSFORMER)),
    "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**TRANSFORMER)),
    "swin": lambda: hf.SwinModel(hf.SwinConfig(**SWIN)),
    "resnet": lambda: hf.ResNetModel(hf.ResNetConfig(**CONVOLUTIONAL, layer_type="basic")),
    "convnext": lambda: hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2)),
}
CHOICES = [
    (name, pooling)
    for name in BACKBONES
    for pooling in ("pooler", "cls", "mean")
    if not (pooling == "cls" and name in ("siglip", "swin", "resnet", "convnext"))
]


@pytest.fixture
def bare():
    """Build a seeded tiny backbone, in eval mode."""

    def build(name):
        torch.manual_seed(0)
        return BACKBONES[name]().eval()

    return build


@pytest.mark.parametrize("name, pooling", CHOICES)
def test_the_head_sees_one_row_an_image(bare, pixels, name, pooling):
    model = with_linear_head(bare(name), 3, pooling)
    features = penultimate_features(model, pixels)
    assert features.shape == (2, find_head(model)[1].in_features)
    torch.testing.assert_close(model.classifier(features), model(pixels).logits)


@pytest.mark.parametrize("name, pooling", CHOICES)
def test_what_is_saved_loads_without_this_library_and_with_it(bare, pixels, tmp_path, name, pooling):
    model = with_linear_head(bare(name), 3, pooling)
    model.save_pretrained(tmp_path)
    plain = hf.AutoModel.from_pretrained(tmp_path)
    assert type(plain) is type(model.backbone)
    torch.testing.assert_close(plain(pixels).last_hidden_state, model.backbone(pixels).last_hidden_state)
    torch.testing.assert_close(load_with_linear_head(tmp_path)(pixels).logits, model(pixels).logits)


def test_the_backbone_keeps_its_weights(bare):
    backbone = bare("vit")
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    after = with_linear_head(backbone, 3, "cls").backbone.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_head_and_its_pooling_are_plain_files(bare, tmp_path):
    model = with_linear_head(bare("vit"), 3, "mean")
    model.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "head_config.json").read_text())
    assert about == {"pooling": "mean", "num_labels": 3, "feature_dim": 16}
    torch.testing.assert_close(load_file(tmp_path / "head.safetensors")["weight"], model.classifier.weight.detach())


def test_given_weights_are_saved_in_place_of_the_models(bare, tmp_path):
    model = with_linear_head(bare("vit"), 3, "cls")
    model.save_pretrained(tmp_path, state_dict={name: tensor + 1 for name, tensor in model.state_dict().items()})
    loaded = load_with_linear_head(tmp_path).state_dict()
    assert all(torch.allclose(loaded[name], tensor + 1) for name, tensor in model.state_dict().items())


def test_pooler_cls_and_mean_are_what_they_say(bare, pixels):
    backbone = bare("vit")
    outputs = backbone(pixels)
    tokens = outputs.last_hidden_state
    expected = {"pooler": outputs.pooler_output, "cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}
    for pooling, features in expected.items():
        torch.testing.assert_close(penultimate_features(with_linear_head(backbone, 3, pooling), pixels), features)


@pytest.mark.parametrize("name, leading", [("deit", 2), ("dinov2_with_registers", 3), ("dinov3", 3), ("siglip", 0)])
def test_the_mean_is_over_patches_alone(bare, pixels, name, leading):
    backbone = bare(name)
    patches = backbone(pixels).last_hidden_state[:, leading:]
    assert patches.shape[1] == 4
    torch.testing.assert_close(penultimate_features(with_linear_head(backbone, 3, "mean"), pixels), patches.mean(1))


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "dinov3"])
def test_head_input_is_the_familys_own_classifier(bare, pixels, tmp_path, name):
    backbone = bare(name)
    model = with_linear_head(backbone, 3, "head_input")
    assert type(model).__name__.endswith("ForImageClassification") and type(model).__module__.startswith(
        "transformers"
    )
    inner = model.vision_model if name in ("clip", "siglip") else model.base_model
    torch.testing.assert_close(inner(pixels).last_hidden_state, backbone(pixels).last_hidden_state)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again(pixels).logits, model(pixels).logits)


def test_a_family_without_classifier_has_no_head_input(bare):
    with pytest.raises(
        HeadError, match=r"DINOv3ViTModel has no image classifier.*choose one out of pooler, cls, mean"
    ):
        with_linear_head(bare("dinov3"), 3, "head_input")


@pytest.mark.parametrize("name, pooling", CHOICES)
def test_the_last_stage_is_what_the_features_depend_on(bare, pixels, name, pooling):
    model = with_linear_head(bare(name), 3, pooling)
    moving = select_trainable(model, "last_stage")
    model(pixels).logits.square().sum().backward()
    assert moving == [name for name, p in model.named_parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["vit", "resnet", "clip", "dinov3"])
def test_the_last_stage_is_found(bare, name):
    model = with_linear_head(bare(name), 3, "mean")
    names = last_stage(model)
    assert {"classifier.weight", "classifier.bias"} < set(names) < {name for name, _ in model.named_parameters()}
    assert select_trainable(model, "last_stage") == names


def test_the_configs_labels_are_the_default(bare, pixels):
    backbone = bare("vit")
    backbone.config.num_labels = 5
    assert with_linear_head(backbone, pooling="cls")(pixels).logits.shape == (2, 5)


def test_the_loss_is_the_cross_entropy(bare, pixels):
    model, labels = with_linear_head(bare("vit"), 3, "cls"), torch.tensor([0, 2])
    outputs = model(pixels, labels=labels)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, labels))


def test_a_look_at_the_features_leaves_modes_and_statistics(bare):
    backbone = bare("resnet").train()
    before = [buffer.clone() for buffer in backbone.buffers()]
    LinearHeadForImageClassification(backbone, 3, "mean")
    assert all(module.training for module in backbone.modules())
    assert all(map(torch.equal, before, backbone.buffers()))


def test_the_dtype_is_the_backbones(bare):
    assert with_linear_head(bare("vit").double(), 3, "cls").classifier.weight.dtype == torch.float64


@pytest.mark.parametrize("pooling", ["", "max"])
def test_another_pooling_is_refused(bare, pooling):
    with pytest.raises(ArgumentError, match=r"pooling= out of head_input, pooler, cls, mean"):
        with_linear_head(bare("vit"), 3, pooling)


@pytest.mark.parametrize("name, why", [("siglip", "no class token"), ("swin", "no class token"), ("resnet", "convol")])
def test_a_class_token_that_is_not_there_is_refused(bare, name, why):
    with pytest.raises(HeadError, match=f'{why}.*"mean"'):
        with_linear_head(bare(name), 3, "cls")


def test_a_missing_pooler_is_refused():
    backbone = hf.ViTModel(hf.ViTConfig(**TRANSFORMER), add_pooling_layer=False)
    with pytest.raises(HeadError, match=r"no pooler_output"):
        with_linear_head(backbone, 3, "pooler")


def test_a_backbone_without_its_pooler_comes_back_without(tmp_path):
    model = with_linear_head(hf.ViTModel(hf.ViTConfig(**TRANSFORMER), add_pooling_layer=False), 3, "cls")
    model.save_pretrained(tmp_path)
    loaded, info = load_with_linear_head(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and set(loaded.state_dict()) == set(model.state_dict())


def test_a_classifier_needs_no_head(tiny):
    with pytest.raises(HeadError, match=r"has a classifier already"):
        with_linear_head(tiny("vit"), 3, "cls")


def test_another_class_than_automodels_is_refused():
    backbone = hf.ResNetBackbone(hf.ResNetConfig(**CONVOLUTIONAL))
    with pytest.raises(HeadError, match=r"as AutoModel loads it, ResNetModel, found ResNetBackbone"):
        with_linear_head(backbone, 3, "mean")


def test_a_model_of_images_and_text_is_refused(tiny):
    with pytest.raises(HeadError, match=r"give its vision model"):
        with_linear_head(hf.CLIPModel(tiny("clip").config), 3, "pooler")


def test_a_folder_without_head_says_so(bare, tmp_path):
    bare("vit").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"Expected head.safetensors and head_config.json.*AutoModel"):
        load_with_linear_head(tmp_path)


def test_a_head_of_another_shape_says_so(bare, tmp_path):
    with_linear_head(bare("vit"), 3, "cls").save_pretrained(tmp_path)
    (tmp_path / "head_config.json").write_text('{"pooling": "cls", "num_labels": 4, "feature_dim": 16}')
    with pytest.raises(CheckpointError, match=r"shape \(3, 16\)"):
        load_with_linear_head(tmp_path)


def test_pushing_while_saving_would_leave_the_head_behind(bare, tmp_path):
    with pytest.raises(ArgumentError, match=r"model.push_to_hub"):
        with_linear_head(bare("vit"), 3, "cls").save_pretrained(tmp_path, push_to_hub=True)
