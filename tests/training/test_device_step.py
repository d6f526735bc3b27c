"""A step on a device reads no value back."""

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_immunize.training.arguments import Method
from hf_immunize.training.step import ImmunizationStep


# "imma" is not among them: it counts the classes of the batch.
@pytest.mark.parametrize("objective", ["concentration", "kappa", "r_ill", "opt_kappa"])
@pytest.mark.parametrize(
    "options", [{}, {"queue_size": 8}, {"benign_budget": None}], ids=["default", "queue", "ratio"]
)
def test_two_steps_run_on_the_meta_device_where_no_value_exists(objective, options):
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        num_labels=3,
    )
    model = ViTForImageClassification(config)
    step = ImmunizationStep(model, Method(objective=objective, **options))
    model.to("meta")

    def side():
        images = torch.empty(4, 3, 32, 32, device="meta")
        return {"pixel_values": images, "labels": torch.empty(4, dtype=torch.long, device="meta")}

    for number in range(2):
        result = step(model, {"benign": side(), "harmful": side()}, step=number)
        result.loss.backward()
    assert result.loss.device.type == "meta"
