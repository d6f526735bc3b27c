"""The classifier is found, its input is recorded, and it is measured in float32 at least."""

import copy

import pytest
import torch
import transformers as hf
from families import TRANSFORMER
from torch import nn

from hf_immunize.errors import ArgumentError, HeadError, ImmunizationError
from hf_immunize.features.extract import extract
from hf_immunize.training.arguments import Method
from hf_immunize.training.step import ImmunizationStep
from hf_immunize.vision.head import (
    HeadInput,
    fast_layout,
    find_head,
    half_tensors,
    penultimate_features,
    to_full_precision,
)


TINY_VIT = TRANSFORMER | {"num_hidden_layers": 1}


def vit(num_labels):
    return hf.ViTForImageClassification(hf.ViTConfig(**TINY_VIT, num_labels=num_labels))


def test_the_head_is_found_by_its_outputs_outside_the_backbone(tiny):
    heads = {"vit": "classifier", "resnet": "classifier.1", "clip": "classifier", "mobilenet_v2": "classifier"}
    assert {name: find_head(tiny(name))[0] for name in heads} == heads
    assert find_head(vit(num_labels=16))[0] == "classifier"  # its blocks are as wide as the labels


@pytest.mark.parametrize(
    ("head", "single"),
    [
        (lambda: nn.Sequential(nn.Dropout(), nn.Linear(16, 5)), True),
        (lambda: nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 5)), True),
        (lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5)), False),
        (lambda: nn.Sequential(nn.Sequential(nn.Linear(16, 5), nn.Tanh()), nn.Linear(5, 5)), False),
    ],
)
def test_a_head_of_several_layers_is_refused_unless_it_is_named(head, single, pixels):
    model = vit(num_labels=5)
    model.classifier = head()
    last = f"classifier.{len(model.classifier) - 1}"
    if single:
        assert find_head(model)[0] == last
    else:
        with pytest.raises(HeadError):
            find_head(model)
    assert penultimate_features(model, pixels, last).shape == (2, model.classifier[-1].in_features)


def test_a_recorder_records_one_pass_at_a_time(tiny, pixels):
    model = tiny("vit")
    captured = HeadInput(model.classifier)
    for _ in range(2):
        with captured:
            model(pixel_values=pixels)
    torch.testing.assert_close(captured.features, penultimate_features(model, pixels))
    with captured:
        model.base_model(pixel_values=pixels)
    with pytest.raises(HeadError, match="did not"):
        _ = captured.features
    square = nn.Linear(2, 2)
    with pytest.raises(HeadError, match="second time"), HeadInput(square):
        square(square(torch.ones(1, 2)))
    with pytest.raises(ZeroDivisionError), captured:
        raise ZeroDivisionError
    assert not model.classifier._forward_pre_hooks and not square._forward_pre_hooks


TWO_HEADS = hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**TINY_VIT, num_labels=3))


@pytest.mark.parametrize(
    ("model", "head_module", "named"),
    [
        (hf.ViTModel(hf.ViTConfig(**TINY_VIT, num_labels=3)), None, "AutoModelForImageClassification"),
        (vit(num_labels=0), None, "num_labels >= 1"),
        (TWO_HEADS, None, r"'cls_classifier', 'distillation_classifier'.*head_module="),
        (vit(num_labels=3), "nowhere", "no module of that name.*'classifier'"),
        (vit(num_labels=3), "vit.layernorm", "a LayerNorm.*'classifier'"),
        *((model, None, "found") for model in (None, "name", object(), nn.Linear(2, 2))),
    ],
)
def test_what_has_no_head_or_several_is_named(model, head_module, named):
    with pytest.raises(HeadError, match=named):
        find_head(model, head_module)


def test_of_two_heads_one_can_be_named_and_tokens_are_no_features(tiny, pixels):
    assert find_head(TWO_HEADS, "cls_classifier") == ("cls_classifier", TWO_HEADS.cls_classifier)
    with pytest.raises(HeadError, match=r"\(2, 5, 16\)"):
        penultimate_features(tiny("vit"), pixels, head_module="vit.layers.0.attention.q_proj")


@pytest.mark.parametrize(
    "images",
    [
        *(None, "abc", [], [[1.0]], torch.ones(3, 8, 8), torch.ones(0, 3, 32, 32), torch.ones(1, 5, 32, 32)),
        *(torch.ones(1, 3, 7, 9), torch.full((1, 3, 32, 32), torch.nan), torch.ones(1, 3, 32, 32, dtype=torch.long)),
        *(torch.ones(1, 3, 32, 32, dtype=torch.complex64), torch.ones(1, 3, 32, 32, device="meta")),
    ],
    ids=str,
)
def test_what_are_no_images_is_a_named_error(images):
    with pytest.raises(ImmunizationError):
        penultimate_features(vit(num_labels=2), images)


# ---- precision


HALVES = [torch.bfloat16, torch.float16]


def extracted(model, pixels):
    return next(extract(model, [{"pixel_values": image} for image in pixels], progress=False)).features


@pytest.mark.parametrize("dtype", HALVES)
def test_features_of_half_precision_weights_are_those_of_the_same_weights_in_float32(dtype, family, tiny, pixels):
    half = tiny(family).to(dtype)
    wide = copy.deepcopy(half).float()
    for measure in (penultimate_features, extracted):
        found = measure(half, pixels)
        assert found.dtype == torch.float32 and torch.equal(found, measure(wide, pixels))
    assert half.dtype == dtype, "the caller's model stays as it is"


def test_gradients_reach_weights_of_half_precision_and_widened_they_stay_the_objects_they_are(tiny, pixels):
    half = tiny("vit").bfloat16()
    wide = copy.deepcopy(half).float()
    for model in (half, wide):
        penultimate_features(model, pixels).square().sum().backward()
    for (name, found), expected in zip(half.named_parameters(), wide.parameters(), strict=True):
        if expected.grad is not None:
            assert torch.equal(found.grad, expected.grad.bfloat16()), name
    before = list(half.parameters())  # which an optimizer holds
    assert all(one is other for one, other in zip(before, to_full_precision(half).parameters(), strict=True))
    assert not half_tensors(half)


def test_a_quantized_model_and_a_step_in_half_precision_are_refused(tiny):
    for dtype in HALVES:
        with pytest.raises(ArgumentError, match=str(dtype).removeprefix("torch.")):
            ImmunizationStep(tiny("vit").to(dtype), Method(objective="kappa"))
    model = tiny("vit")
    model.is_quantized = True
    with pytest.raises(ArgumentError, match="quantized"):
        to_full_precision(model)


def test_the_fast_layout_has_the_same_values_in_another_order():
    images, depthwise = torch.randn(2, 3, 4, 5), torch.nn.Conv2d(3, 3, 1, groups=3)
    found = fast_layout(depthwise, images)
    assert torch.equal(found, images) and found.stride() == (60, 1, 15, 3)
    others = (torch.randn(2, 3), torch.empty(2, 3, 4, 5, device="meta"))
    assert all(fast_layout(depthwise, other) is other for other in others)
    assert fast_layout(torch.nn.Conv2d(3, 3, 1), images) is images
