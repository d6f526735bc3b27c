"""One pass over images gives features, earlier layers and their spectrum, known again by the images."""

import math

import families
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from attacked import pictures, tiny_resnet, tiny_vit

from hf_immunize.features.extract import (
    Measurement,
    choose_views,
    dual_coordinates,
    extract,
    extract_views,
    find_layers,
    load_measurements,
    save_measurements,
    spectral_metrics,
)
from hf_immunize.vision.head import penultimate_features
from hf_immunize.vision.scope import block_modules


# ---- the loop


def rows(count):
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": i % 3} for i in range(count)]


def test_features_are_those_of_one_forward_pass_with_labels_in_the_order_of_the_rows(tiny):
    vit, data = tiny("vit").train(), rows(7)
    batches = list(extract(vit, data, batch_size=3, progress=False))
    unfinished = extract(vit, data, batch_size=3, progress=False)
    next(unfinished)
    unfinished.close()
    assert vit.training
    with torch.no_grad():
        expected = penultimate_features(vit.eval(), torch.stack([row["pixel_values"] for row in data]))
    assert torch.allclose(torch.cat([batch.features for batch in batches]), expected, atol=1e-5)
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_a_model_prepared_for_bf16_is_measured_in_full_precision(tiny):
    vit, data = tiny("vit"), rows(4)
    expected = next(extract(vit, data, progress=False)).features
    AcceleratorState._reset_state(reset_partial_state=True)  # of a Trainer that an earlier test made
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(vit)
    with torch.no_grad():
        assert prepared(pixel_values=data[0]["pixel_values"][None]).logits.dtype == torch.float32  # converted back
    assert torch.equal(next(extract(prepared, data, progress=False)).features, expected)
    AcceleratorState._reset_state(reset_partial_state=True)


# ---- earlier layers


def views_of(model, pixels, limit=10_000, memory=2**30):
    return choose_views(find_layers(model, pixels, 8), len(pixels), limit, memory, True)


def test_a_network_of_stages_is_read_where_the_resolution_changes_and_before_its_relus():
    layers = find_layers(tiny_resnet(), torch.zeros(1, 3, 32, 32), 8)
    assert [layer.shape for layer in layers if not layer.before] == [(8, 8, 8), (16, 4, 4)]
    names = [layer.name for layer in layers if layer.before]
    assert names[0] == "resnet.embedder.embedder.activation" and "stages.0" in names[1]
    vit = [find_layers(tiny_vit(), torch.zeros(1, 3, 8, 8), most) for most in (8, 2)]
    assert vit[0][0].before and vit[1][-1].name == "vit.layers.1"  # what enters the blocks, and the last of fewer


@pytest.mark.parametrize("inplace", [False, True])
def test_what_enters_the_last_relu_of_a_stage_is_read_before_it(inplace):
    model, (pixels, _) = tiny_resnet(), pictures(4, 0)
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = inplace
    found = extract_views(model, [pixels], views_of(model, pixels)[0]).views
    before = [value for name, value in found.items() if name.startswith("input of") and "(flattened)" in name][-1]
    assert (before < 0).any() and torch.equal(before.relu(), list(found.values())[-1])


@pytest.mark.parametrize("name", families.BUILDERS)
def test_every_view_of_every_family_has_a_row_for_each_image(name):
    model, pixels = families.BUILDERS[name](), torch.randn(5, 3, 32, 32)
    views, _ = choose_views(find_layers(model, pixels, 8), 5, 10**6, 2**30, True)
    found = extract_views(model, [pixels], views).views
    assert {len(value) for value in found.values()} == {5}
    linear = any(
        isinstance(part, torch.nn.Linear) for block in block_modules(model).values() for part in block.modules()
    )
    assert any(layer.inner for layer, _ in views) == linear
    assert all(view == "pooled" for layer, view in views if layer.inner)


@pytest.mark.parametrize("build", [tiny_vit, tiny_resnet])
def test_all_views_come_from_one_pass(build):
    model, (pixels, _) = build(), pictures(10, 0)
    found = extract_views(model, pixels.split(4), views_of(model, pixels)[0])
    assert {len(value) for value in found.views.values()} == {10}
    with torch.no_grad():
        assert torch.allclose(found.features, penultimate_features(model, pixels), atol=1e-6)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert extract_views(model.to(torch.bfloat16), [pixels], []).features.dtype == torch.float32


@pytest.mark.parametrize(("limit", "memory", "reason"), [(10, 2**30, "larger preset"), (10_000, 2000, "GiB")])
def test_what_is_too_large_is_left_out_with_a_reason(limit, memory, reason):
    views, left_out = views_of(tiny_vit(), torch.zeros(100, 3, 8, 8), limit, memory)
    assert all(view == "pooled" for _, view in views)
    assert all(reason in sentence for sentence in left_out.values()) and left_out


def test_dual_coordinates_keep_all_inner_products():
    generator = torch.Generator().manual_seed(0)
    Z, Z_test = torch.randn(12, 300, generator=generator), torch.randn(5, 300, generator=generator)
    short, short_test = dual_coordinates(Z, Z_test, chunk=64)
    assert torch.allclose(short_test @ short.T, (Z_test.double() @ Z.double().T), rtol=1e-8)


# ---- the spectrum of a data set


def measured(tensor, pixels=None):
    measurement = Measurement()
    measurement.update(tensor, torch.ones(len(tensor), 3, 2, 2) if pixels is None else pixels)
    return measurement


def test_lost_harmful_rank_is_flagged_and_rank_lost_on_both_sides_makes_no_statement():
    start = torch.randn(20, 4, dtype=torch.float64)
    lost = start * torch.tensor([0.0, 1, 1, 1], dtype=torch.float64)
    metrics = spectral_metrics(measured(start), measured(start), measured(lost), measured(start))
    assert (metrics["rir_is_lower_bound"], metrics["rir_is_upper_bound"]) == (1.0, 0.0)
    assert metrics["harmful_rank"] == 3.0 and metrics["rir"] > 1e10
    metrics = spectral_metrics(measured(lost), measured(start), measured(lost), measured(start))
    assert math.isnan(metrics["rir"])
    assert (metrics["rir_is_lower_bound"], metrics["rir_is_upper_bound"]) == (1.0, 1.0)
    others = measured(start, torch.rand(20, 3, 2, 2))  # a reference of other images is left aside
    assert "rir" not in spectral_metrics(measured(start), others, measured(start), measured(start))


def test_a_constant_is_in_the_metrics_of_the_papers_probe_and_not_in_those_with_an_intercept():
    start = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    metrics = spectral_metrics(measured(start), measured(start), measured(start + 100), measured(start))
    assert metrics["log10_rir"] > 2 and metrics["intercept_log10_rir"] == pytest.approx(0.0, abs=1e-6)
    assert {name.removeprefix("intercept_") for name in metrics} == {n for n in metrics if not n.startswith("inter")}
    alike = spectral_metrics(measured(torch.ones(40, 4)), None, measured(start), None)
    assert "benign_rank" in alike and "intercept_benign_rank" not in alike


@pytest.mark.parametrize("change", ["one image", "one twice", "mirrored", "channels", "brightness"])
def test_other_images_are_known(change):
    pixels = torch.rand(1000, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    others = pixels.clone()
    if change == "one image":
        others[7] = pixels[7].flip(0) + 0.1
    elif change == "one twice":
        others[7] = pixels[8]
    elif change == "brightness":  # shifted from one image to another
        others[:2] *= torch.tensor([1.1, 0.9]).sqrt()[:, None, None, None]
    else:
        others = pixels.flip(3 if change == "mirrored" else 1)
    z = torch.randn(1000, 4)
    assert not measured(z, pixels).same_data(measured(z, others))


def test_neither_order_nor_processes_nor_batches_nor_a_file_matter(tmp_path):
    z, pixels = torch.randn(60, 4), torch.randn(60, 3, 2, 2)
    whole, dealt, batches = measured(z, pixels), Measurement(), Measurement()
    for part in (slice(1, None, 2), slice(0, None, 2)):
        dealt.merge(measured(z[part], pixels[part]))
    for part in (slice(0, 40), slice(40, 60)):
        batches.update(z[part], pixels[part])
    expected = whole.factor.conditioning()
    for found in (dealt, batches):
        assert found.same_data(whole)
        assert found.factor.conditioning().log_kappa == pytest.approx(expected.log_kappa, rel=1e-12)
        assert found.factor.conditioning().rank == expected.rank
    save_measurements(tmp_path / "state", {"eval": whole, "eval_a/b": batches})
    after = load_measurements(tmp_path / "state")
    assert set(after) == {"eval", "eval_a/b"} and after["eval"].same_data(whole)
    assert after["eval"].factor.conditioning() == expected
