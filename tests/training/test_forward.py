"""One pass over all sides is two, and what is harmful leaves no trace in running statistics."""

import pytest
import torch

from hf_immunize.training.step import forward_both
from hf_immunize.vision.head import find_head


@pytest.fixture
def sides():
    def make(size=8):
        draw = torch.Generator().manual_seed(5)
        benign, harmful = (torch.randn(4, 3, size, size, generator=draw) for _ in range(2))
        return {"pixel_values": benign, "labels": torch.tensor([0, 1, 0, 1])}, {"pixel_values": harmful}

    return make


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_one_pass_is_two_without_batch_statistics(name, tiny, sides):
    model = tiny(name).eval()
    head = find_head(model)[1]
    once, twice = (forward_both(model, head, *sides(), together=together) for together in (True, False))
    torch.testing.assert_close(once[:2], twice[:2])


@pytest.mark.parametrize("together", [True, False])
def test_benign_rows_come_first_and_the_head_maps_features_to_logits(together, tiny, sides):
    model = tiny().eval()
    head = find_head(model)[1]
    benign, harmful = sides()
    features, logits, _ = forward_both(model, head, benign, harmful, together=together)
    torch.testing.assert_close(head(features), logits)
    torch.testing.assert_close(logits[:4], model(pixel_values=benign["pixel_values"]).logits)


def test_harmful_batches_never_touch_the_running_statistics(tiny, sides):
    paired, alone = tiny("resnet").train(), tiny("resnet").train()
    benign, harmful = sides()
    forward_both(paired, find_head(paired)[1], benign, harmful, together=False)
    alone(pixel_values=benign["pixel_values"])
    torch.testing.assert_close(dict(paired.named_buffers()), dict(alone.named_buffers()))


def test_batchnorm_trains_again_after_the_harmful_pass(tiny, sides):
    model = tiny("resnet").train()
    forward_both(model, find_head(model)[1], *sides(), together=False)
    assert all(module.training for module in model.modules())
