import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from hf_immunize.features.extract import extract
from hf_immunize.vision.head import penultimate_features


def rows(count):
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": i % 3} for i in range(count)]


def test_features_are_those_of_one_forward_pass(tiny):
    vit = tiny("vit")
    data = rows(7)
    batches = list(extract(vit, data, batch_size=3, progress=False))
    with torch.no_grad():
        expected = penultimate_features(vit, torch.stack([row["pixel_values"] for row in data]))
    assert torch.allclose(torch.cat([batch.features for batch in batches]), expected, atol=1e-5)


def test_the_mode_of_the_model_is_restored_after_an_unfinished_run(tiny):
    vit = tiny("vit").train()
    batches = extract(vit, rows(7), batch_size=3, progress=False)
    next(batches)
    batches.close()
    assert vit.training


def test_labels_come_in_the_order_of_the_rows(tiny):
    vit = tiny("vit")
    labels = [batch.labels for batch in extract(vit, rows(7), batch_size=3, progress=False)]
    assert torch.cat(labels).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_a_model_prepared_for_bf16_is_measured_in_full_precision(tiny):
    vit, data = tiny("vit"), rows(4)
    expected = next(extract(vit, data, progress=False)).features
    AcceleratorState._reset_state(reset_partial_state=True)  # of a Trainer that an earlier test made
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(vit)
    with torch.no_grad():
        assert prepared(pixel_values=data[0]["pixel_values"][None]).logits.dtype == torch.float32  # converted back
    assert torch.equal(next(extract(prepared, data, progress=False)).features, expected)
    AcceleratorState._reset_state(reset_partial_state=True)
