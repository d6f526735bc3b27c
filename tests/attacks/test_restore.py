"""Putting the public weights back gives the public model."""

from dataclasses import replace

import pytest
import torch
from attacked import pictures, rows_of, tiny_resnet, tiny_vit

from hf_immunize import audit
from hf_immunize.attacks.presets import RESTORING, find_preset
from hf_immunize.attacks.restore import interpolate, moved_parameters
from hf_immunize.errors import DataError


def restored(attacker, seed=0):
    """What an attacker who has the public weights reads from a model whose features were all but put out."""
    model = tiny_vit()
    with torch.no_grad():
        model.vit.layernorm.weight.zero_()
        model.vit.layernorm.weight[0] = 1e-3
    harmful = rows_of(*pictures(80, seed)), rows_of(*pictures(40, seed + 1))
    preset = replace(find_preset("quick").only([attacker]), layer_seeds=1)
    options = {"harmful": harmful, "reference": tiny_vit(), "preset": preset, "progress": False}
    return {one.subject: replace(one, seconds=0.0) for one in audit(model, **options).data.outcomes}


@pytest.mark.parametrize("attacker", RESTORING)
def test_beats_chance_by_thirty_points_on_both_models(attacker):
    found = restored(attacker)
    assert {subject: one.accuracy > 0.25 + 0.3 for subject, one in found.items()} == {
        "immunized": True,
        "reference": True,
    }


@pytest.mark.parametrize("attacker", RESTORING)
def test_the_same_audit_gives_the_same_outcomes(attacker):
    assert restored(attacker) == restored(attacker)


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
