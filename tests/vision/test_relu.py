"""ReLUs that everything the classifier reads must pass."""

import pytest
import torch
import transformers as hf
from torch import nn

from hf_immunize.errors import DataError
from hf_immunize.vision.head import HeadInput, find_head
from hf_immunize.vision.relu import ReluInputs, choke_points, find_relus
from hf_immunize.vision.scope import select_trainable


def resnet():
    config = hf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic", num_labels=3)
    return hf.ResNetForImageClassification(config).eval()


def mobilenet():
    return hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(depth_multiplier=0.35, num_labels=3)).eval()


STAGE = "resnet.encoder.stages.1.layers"
BLOCKS = [f"mobilenet_v2.layer.{block}.{part}.activation" for block in (12, 15) for part in ("expand_1x1", "conv_3x3")]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (resnet, [f"{STAGE}.0.activation", f"{STAGE}.1.activation"]),  # those after the shortcuts
        (mobilenet, [*BLOCKS, "mobilenet_v2.conv_1x1.activation"]),  # blocks with a shortcut have none
    ],
)
def test_choke_points_are_the_trainable_relus_that_no_shortcut_bypasses(build, expected):
    model = build()
    relus = find_relus(model, select_trainable(model, "last_stage"))
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def features():
        with HeadInput(find_head(model)[1]) as captured:
            model(pixel_values=pixels)
        return captured.features

    assert choke_points(model, relus, features) == expected
    assert not any(module._forward_hooks for module in model.modules())
    assert build is mobilenet or all(".stages.1." in name for name in relus)


def test_smooth_activations_are_no_relus_and_one_that_runs_twice_is_left_alone():
    assert find_relus(nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.LeakyReLU()), ["0.weight"]) == []
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 8), shared, nn.Linear(8, 8), shared)
    assert choke_points(model, ["1"], lambda: model(torch.eye(2) * 3)) == []


def test_images_that_look_the_same_say_nothing_and_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(DataError, match="same features"):
        choke_points(model, ["1"], lambda: model(torch.ones(2, 2)))


@pytest.mark.parametrize("inplace", [False, True])
def test_what_enters_is_recorded_before_it_is_rectified_in_the_graph(inplace):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=inplace))
    images = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    with ReluInputs(model, ["1"]) as inside:
        model(images)
    torch.testing.assert_close(inside.values["1"], model[0](images))
    inside.values["1"].sum().backward()
    torch.testing.assert_close(model[0].weight.grad, images.sum(0).expand(3, 2))


@pytest.mark.parametrize(("frozen", "gradients"), [(True, True), (False, False)])
def test_what_cannot_be_trained_and_passes_without_gradients_are_not_recorded(frozen, gradients):
    model = nn.Sequential(nn.Linear(2, 3).requires_grad_(not frozen), nn.ReLU(), nn.Linear(3, 2))
    with ReluInputs(model, ["1"]) as inside, torch.set_grad_enabled(gradients):
        model(torch.ones(4, 2))
    assert inside.values == {}
