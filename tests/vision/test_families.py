"""Every family of the table: its head, its features and its last stage, by a tiny model of tests/families.py."""

import torch
from families import TINY
from torch import nn

from hf_immunize.vision.families import FAMILIES
from hf_immunize.vision.head import find_head, penultimate_features
from hf_immunize.vision.relu import choke_points, find_relus
from hf_immunize.vision.scope import last_stage, modules_in_eval, select_trainable


def test_every_family_is_tried():
    assert set(TINY) == set(FAMILIES)


def test_features_are_what_the_classifier_reads(family, tiny, pixels):
    model = tiny(family)
    for module in model.modules():  # a norm of ones and zeros would look the same when left out or doubled
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    features, (_, head) = penultimate_features(model, pixels), find_head(model)
    assert features.shape == (2, head.in_features)
    torch.testing.assert_close(head(features), model(pixel_values=pixels).logits)
    hidden = getattr(model, "vision_model", model.base_model)(pixels).last_hidden_state
    torch.testing.assert_close(features, TINY[family].head_input(model, hidden))


def test_the_last_stage_is_what_the_features_depend_on(family, tiny, pixels):
    model, head = tiny(family), ("classifier.",)
    prefixes = tuple(f"{part}." for part in TINY[family].last_stage)
    expected = [name for name, _ in model.named_parameters() if name.startswith(prefixes + head)]
    assert all(any(name.startswith(prefix) for name in expected) for prefix in prefixes)
    assert select_trainable(model, "last_stage") == last_stage(model) == expected
    penultimate_features(model, pixels).square().sum().backward()
    with_gradient = [name for name, p in model.named_parameters() if p.grad is not None]
    assert with_gradient == [name for name in expected if not name.startswith(head)]
    in_eval = modules_in_eval(model, expected)
    assert len(in_eval) == len(set(in_eval))


def test_choke_points_are_found_where_the_family_has_some(family, tiny, pixels):
    model = tiny(family)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 1.0  # without the images' statistics, features of an untrained network vanish
    model.train()(pixel_values=pixels)
    model.eval()
    found = choke_points(
        model, find_relus(model, last_stage(model)), lambda: penultimate_features(model, pixels).detach()
    )
    assert bool(found) == TINY[family].choke_points
