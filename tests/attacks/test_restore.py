"""Putting the public weights back gives the public model."""

import pytest
import torch
from attacked import tiny_resnet, tiny_vit

from hf_immunize.attacks.restore import interpolate, moved_parameters
from hf_immunize.errors import DataError


def test_only_tensors_that_differ_have_moved():
    model, reference = tiny_vit(), tiny_vit()
    with torch.no_grad():
        model.vit.layernorm.bias += 1
    assert moved_parameters(model, reference) == ["vit.layernorm.bias"]


def test_swap_is_the_reference():
    restored = interpolate(tiny_vit(1), tiny_vit(2), 1.0)
    pixels = torch.randn(2, 3, 8, 8)
    assert torch.equal(restored(pixels).logits, tiny_vit(2)(pixels).logits)


def test_interpolation_leaves_the_model_as_it_was():
    model = tiny_vit(1)
    interpolate(model, tiny_vit(2), 0.5)
    assert moved_parameters(model, tiny_vit(1)) == []


def test_another_architecture_is_one_sentence():
    with pytest.raises(DataError, match="same architecture"):
        moved_parameters(tiny_vit(), tiny_resnet())
