"""Every stage is read, in one pass, pooled and flattened, within the memory there is."""

import pytest
import torch
from attacked import pictures, tiny_resnet, tiny_vit

from hf_immunize.features.extract import choose_views, dual_coordinates, extract_views, find_layers
from hf_immunize.vision.head import penultimate_features


def test_a_network_of_stages_is_read_where_the_resolution_changes():
    layers = find_layers(tiny_resnet(), torch.zeros(1, 3, 32, 32), 8)
    assert [layer.shape for layer in layers if not layer.before] == [(8, 8, 8), (16, 4, 4)]


def test_what_enters_the_last_relu_of_a_stage_is_read_before_it():
    model, (pixels, _) = tiny_resnet(), pictures(4, 0)
    views, _ = choose_views(find_layers(model, pixels, 8), 4, 10_000, 2**30, True)
    found = extract_views(model, [pixels], views).views
    entering = [name for name in found if name.startswith("input of") and name.endswith("(flattened)")]
    before = found[entering[-1]]
    after = list(found.values())[-1]
    assert (before < 0).any() and torch.equal(before.relu(), after)


def test_what_enters_the_first_relus_is_read_too():
    names = [layer.name for layer in find_layers(tiny_resnet(), torch.zeros(1, 3, 32, 32), 8) if layer.before]
    assert names[0] == "resnet.embedder.embedder.activation" and "stages.0" in names[1]


def test_a_relu_in_place_does_not_write_over_what_is_read():
    model, (pixels, _) = tiny_resnet(), pictures(4, 0)
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = True
    views, _ = choose_views(find_layers(model, pixels, 8), 4, 10_000, 2**30, True)
    found = extract_views(model, [pixels], views).views
    assert any((value < 0).any() for name, value in found.items() if "activation" in name)


def test_what_enters_the_blocks_is_read_too():
    assert find_layers(tiny_vit(), torch.zeros(1, 3, 8, 8), 8)[0].before


def test_fewer_layers_keep_the_last():
    assert find_layers(tiny_vit(), torch.zeros(1, 3, 8, 8), 2)[-1].name == "vit.layers.1"


@pytest.mark.parametrize("build", [tiny_vit, tiny_resnet])
def test_all_views_come_from_one_pass(build):
    model, (pixels, _) = build(), pictures(10, 0)
    views, _ = choose_views(find_layers(model, pixels, 8), 10, 10_000, 2**30, True)
    found = extract_views(model, pixels.split(4), views)
    assert {len(value) for value in found.views.values()} == {10}
    with torch.no_grad():
        assert torch.allclose(found.features, penultimate_features(model, pixels), atol=1e-6)


def test_hooks_are_gone_afterwards():
    model, (pixels, _) = tiny_vit(), pictures(2, 0)
    views, _ = choose_views(find_layers(model, pixels, 8), 2, 10_000, 2**30, True)
    extract_views(model, [pixels], views)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_in_half_precision_is_read():
    model, (pixels, _) = tiny_vit().to(torch.bfloat16), pictures(4, 0)
    assert extract_views(model, [pixels], []).features.dtype == torch.float32


@pytest.mark.parametrize(("limit", "memory", "reason"), [(10, 2**30, "larger preset"), (10_000, 2000, "GiB")])
def test_what_is_too_large_is_left_out_with_a_reason(limit, memory, reason):
    layers = find_layers(tiny_vit(), torch.zeros(1, 3, 8, 8), 8)
    views, left_out = choose_views(layers, 100, limit, memory, True)
    assert all(view == "pooled" for _, view in views)
    assert all(reason in sentence for sentence in left_out.values()) and left_out


def test_dual_coordinates_keep_all_inner_products():
    generator = torch.Generator().manual_seed(0)
    Z, Z_test = torch.randn(12, 300, generator=generator), torch.randn(5, 300, generator=generator)
    short, short_test = dual_coordinates(Z, Z_test, chunk=64)
    assert torch.allclose(short_test @ short.T, (Z_test.double() @ Z.double().T), rtol=1e-8)
