"""Whatever a checkpoint was stored in, it is measured in float32 at least."""

import copy

import pytest
import torch

from hf_immunize.errors import ArgumentError
from hf_immunize.features.extract import extract
from hf_immunize.training.arguments import Method
from hf_immunize.training.step import ImmunizationStep
from hf_immunize.vision.head import half_tensors, penultimate_features, to_full_precision


HALVES = [torch.bfloat16, torch.float16]


def extracted(model, pixels):
    rows = [{"pixel_values": image} for image in pixels]
    return next(extract(model, rows, progress=False)).features


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("measure", [penultimate_features, extracted])
def test_features_of_half_precision_weights_are_those_of_the_same_weights_in_float32(
    measure, dtype, family, tiny, pixels
):
    half = tiny(family).to(dtype)
    wide = copy.deepcopy(half).float()
    found = measure(half, pixels)
    assert found.dtype == torch.float32 and torch.equal(found, measure(wide, pixels))
    assert half.dtype == dtype, "the caller's model stays as it is"


def test_gradients_reach_weights_of_half_precision(tiny, pixels):
    half = tiny("vit").bfloat16()
    wide = copy.deepcopy(half).float()
    for model in (half, wide):
        penultimate_features(model, pixels).square().sum().backward()
    for (name, found), expected in zip(half.named_parameters(), wide.parameters(), strict=True):
        if expected.grad is not None:
            assert torch.equal(found.grad, expected.grad.bfloat16()), name


def test_parameters_stay_the_objects_they_are_so_that_an_optimizer_holds_them(tiny):
    model = tiny("vit").half()
    before = list(model.parameters())
    assert all(one is other for one, other in zip(before, to_full_precision(model).parameters(), strict=True))
    assert not half_tensors(model)


def test_a_quantized_model_is_refused(tiny):
    model = tiny("vit")
    model.is_quantized = True
    with pytest.raises(ArgumentError, match="quantized"):
        to_full_precision(model)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_step_of_ones_own_is_refused_in_half_precision(dtype, tiny):
    with pytest.raises(ArgumentError, match=str(dtype).removeprefix("torch.")):
        ImmunizationStep(tiny("vit").to(dtype), Method(objective="kappa"))
