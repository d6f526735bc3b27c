"""Bare backbones with a linear head of their own."""

import json
from functools import partial

import pytest
import torch
import transformers as hf
from families import BUILDERS, CONVOLUTIONAL, TRANSFORMER, backbone
from safetensors.torch import load_file

from hf_immunize.errors import ArgumentError, CheckpointError, HeadError
from hf_immunize.vision.bare import (
    LinearHeadForImageClassification,
    load_with_linear_head,
    with_linear_head,
    write_head,
)
from hf_immunize.vision.head import find_head, penultimate_features
from hf_immunize.vision.scope import last_stage, select_trainable


NAMES = ("vit", "deit", "beit", "dinov2", "dinov2_with_registers", "clip", "siglip", "swin", "resnet", "convnext")
BACKBONES = {name: partial(backbone, name) for name in NAMES}
BACKBONES["dinov3"] = lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**TRANSFORMER, num_register_tokens=2))
NO_CLASS_TOKEN = ("siglip", "swin", "resnet", "convnext")
CHOICES = [(name, pooling) for name in BACKBONES for pooling in ("pooler", "mean")]
CHOICES += [(name, "cls") for name in BACKBONES if name not in NO_CLASS_TOKEN]


@pytest.fixture
def bare():
    """Build a seeded tiny backbone, in eval mode."""

    def build(name):
        torch.manual_seed(0)
        return BACKBONES[name]().eval()

    return build


@pytest.fixture
def vit(bare):
    return with_linear_head(bare("vit"), 3, "cls")


@pytest.mark.parametrize("name, pooling", CHOICES)
def test_the_head_reads_one_row_per_image_and_is_saved_with_its_backbone(bare, pixels, tmp_path, name, pooling):
    inner = bare(name)
    before = {name: tensor.clone() for name, tensor in inner.state_dict().items()}
    model = with_linear_head(inner, 3, pooling)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())
    features = penultimate_features(model, pixels)
    assert features.shape == (2, find_head(model)[1].in_features)
    torch.testing.assert_close(model.classifier(features), model(pixels).logits)
    model.save_pretrained(tmp_path)
    plain = hf.AutoModel.from_pretrained(tmp_path)
    assert type(plain) is type(model.backbone)
    torch.testing.assert_close(plain(pixels).last_hidden_state, model.backbone(pixels).last_hidden_state)
    torch.testing.assert_close(load_with_linear_head(tmp_path)(pixels).logits, model(pixels).logits)
    about = json.loads((tmp_path / "head_config.json").read_text())
    assert about == {"pooling": pooling, "num_labels": 3, "feature_dim": features.shape[1]}
    assert torch.equal(load_file(tmp_path / "head.safetensors")["weight"], model.classifier.weight)


@pytest.mark.parametrize("name, pooling", CHOICES)
def test_the_last_stage_is_what_the_features_depend_on(bare, pixels, name, pooling):
    model = with_linear_head(bare(name), 3, pooling)
    trainable = select_trainable(model, "last_stage")
    names = [name for name, _ in model.named_parameters()]
    assert {"classifier.weight", "classifier.bias"} < set(trainable) < set(names) and trainable == last_stage(model)
    model(pixels).logits.square().sum().backward()
    assert trainable == [name for name, p in model.named_parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "name, leading", [("vit", 1), ("deit", 2), ("dinov2_with_registers", 3), ("dinov3", 3), ("siglip", 0)]
)
def test_pooler_cls_and_mean_over_patches_are_what_they_say(bare, pixels, name, leading):
    inner = bare(name)
    outputs = inner(pixels)
    tokens = outputs.last_hidden_state
    assert tokens[:, leading:].shape[1] == 4
    expected = {"pooler": outputs.pooler_output, "mean": tokens[:, leading:].mean(1)}
    expected |= {"cls": tokens[:, 0]} if leading else {}
    for pooling, features in expected.items():
        torch.testing.assert_close(penultimate_features(with_linear_head(inner, 3, pooling), pixels), features)


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "dinov3"])
def test_head_input_is_the_familys_own_classifier(bare, pixels, tmp_path, name):
    inner = bare(name)
    model = with_linear_head(inner, 3, "head_input")
    kind = type(model)
    assert kind.__name__.endswith("ForImageClassification") and kind.__module__.startswith("transformers")
    tower = model.vision_model if name in ("clip", "siglip") else model.base_model
    torch.testing.assert_close(tower(pixels).last_hidden_state, inner(pixels).last_hidden_state)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again(pixels).logits, model(pixels).logits)


def test_outputs_are_those_of_a_classifier_in_the_backbones_dtype(bare, vit, pixels):
    labels = torch.tensor([0, 2])
    outputs = vit(pixels, labels=labels)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, labels))
    torch.testing.assert_close(vit(pixels, return_dict=False)[0], outputs.logits)
    inner = bare("vit").double()
    inner.config.num_labels = 5
    found = with_linear_head(inner, pooling="cls")(pixels.double()).logits
    assert found.shape == (2, 5) and found.dtype == torch.float64


def test_modes_and_statistics_stay_and_a_backbone_without_its_pooler_comes_back_without(bare, tmp_path):
    inner = bare("resnet").train()
    before = [buffer.clone() for buffer in inner.buffers()]
    LinearHeadForImageClassification(inner, 3, "mean")
    assert all(module.training for module in inner.modules())
    assert all(map(torch.equal, before, inner.buffers()))
    model = with_linear_head(backbone("vit", add_pooling_layer=False), 3, "cls")
    model.save_pretrained(tmp_path)
    loaded, info = load_with_linear_head(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and set(loaded.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize(
    ("build", "pooling", "found"),
    [
        (partial(backbone, "vit"), "max", "max"),
        (BACKBONES["dinov3"], "head_input", "DINOv3ViTModel"),
        (partial(backbone, "siglip"), "cls", "SiglipVisionModel"),
        (partial(backbone, "resnet"), "cls", "ResNetModel"),
        (partial(backbone, "vit", add_pooling_layer=False), "pooler", "ViTModel"),
        (BUILDERS["vit"], "cls", "ViTForImageClassification"),
        (lambda: hf.ResNetBackbone(hf.ResNetConfig(**CONVOLUTIONAL)), "mean", "ResNetBackbone"),
    ],
)
def test_what_gets_no_head_is_named(build, pooling, found):
    with pytest.raises(ArgumentError if found == "max" else HeadError, match=found):
        with_linear_head(build(), 3, pooling)


@pytest.mark.parametrize("about", [None, "{", '{"pooling": "cls", "num_labels": 4, "feature_dim": 16}'])
def test_a_head_that_cannot_be_loaded_is_named(vit, tmp_path, about):
    vit.save_pretrained(tmp_path)
    file = tmp_path / "head_config.json"
    file.write_text(about) if about is not None else file.unlink()
    with pytest.raises(CheckpointError, match=r"head_config\.json"):
        load_with_linear_head(tmp_path)


def test_the_head_of_another_backbone_and_a_push_past_the_allow_list_are_refused(vit, tmp_path):
    with pytest.raises(ArgumentError, match="push_to_hub"):
        vit.save_pretrained(tmp_path, push_to_hub=True)
    vit.save_pretrained(tmp_path)
    about = {"pooling": "cls", "num_labels": 3, "feature_dim": 8}
    write_head(tmp_path, about, {"weight": torch.ones(3, 8), "bias": torch.ones(3)})
    with pytest.raises(CheckpointError, match="8"):
        load_with_linear_head(tmp_path)
