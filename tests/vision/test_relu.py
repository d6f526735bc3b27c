"""Rectifiers that everything the classifier sees must pass."""

import pytest
import torch
from torch import nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_immunize.errors import DataError
from hf_immunize.vision.head import HeadInput, find_head
from hf_immunize.vision.relu import ReluInputs, choke_points, find_relus
from hf_immunize.vision.scope import select_trainable


PARTS = ("expand_1x1", "conv_3x3")


def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config).eval()


def mobilenet():
    torch.manual_seed(0)
    return MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.35, num_labels=3)).eval()


def chokes(model):
    moving = select_trainable(model, "last_stage")
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def features():
        with HeadInput(find_head(model)[1]) as captured:
            model(pixel_values=pixels)
        return captured.features

    return choke_points(model, find_relus(model, moving), features)


def test_of_a_resnet_they_are_those_behind_the_shortcuts():
    stage = "resnet.encoder.stages.1.layers"
    assert chokes(resnet()) == [f"{stage}.0.activation", f"{stage}.1.activation"]


def test_of_a_mobilenet_blocks_with_a_shortcut_have_none():
    blocks = [f"mobilenet_v2.layer.{block}.{part}.activation" for block in (12, 15) for part in PARTS]
    expected = [*blocks, "mobilenet_v2.conv_1x1.activation"]
    assert chokes(mobilenet()) == expected


def test_frozen_rectifiers_are_left_alone():
    model = resnet()
    assert all(".stages.1." in name for name in find_relus(model, select_trainable(model, "last_stage")))


def test_smooth_activations_are_no_rectifiers():
    assert find_relus(nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.LeakyReLU()), ["0.weight"]) == []


def test_a_rectifier_that_runs_twice_is_left_alone():
    torch.manual_seed(0)
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 8), shared, nn.Linear(8, 8), shared)
    assert choke_points(model, ["1"], lambda: model(torch.eye(2) * 3)) == []


def test_images_that_look_the_same_tell_nothing_and_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(DataError, match="same features"):
        choke_points(model, ["1"], lambda: model(torch.ones(2, 2)))


def test_what_cannot_be_moved_is_not_recorded():
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.ReLU(), nn.Linear(2, 2))
    with ReluInputs(model, ["1"]) as inside:
        model(torch.ones(2, 2))
    assert inside.values == {}


def test_hooks_are_gone_after_the_search():
    model = resnet()
    chokes(model)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("inplace", [False, True])
def test_what_enters_is_recorded_before_it_is_rectified(inplace):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=inplace))
    images = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    with ReluInputs(model, ["1"]) as inside:
        model(images)
    torch.testing.assert_close(inside.values["1"], model[0](images))


def test_gradients_pass_through_what_is_recorded():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
    with ReluInputs(model, ["1"]) as inside:
        model(torch.ones(4, 2))
    inside.values["1"].sum().backward()
    assert model[0].weight.grad.eq(4).all()


def test_passes_without_gradients_are_left_out():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with ReluInputs(model, ["1"]) as inside, torch.no_grad():
        model(torch.ones(4, 2))
    assert inside.values == {}
