"""Fine-tuning attackers train what they say, on a copy, and restoring gives the public model."""

import pytest
import torch
from attacked import CLASSES, pictures, tiny_resnet, tiny_vit

from hf_immunize.attacks.attacker import Part, TuningBudget
from hf_immunize.attacks.finetune import changed_parameters, fine_tune, prepare
from hf_immunize.attacks.presets import ATTACKERS
from hf_immunize.errors import DataError


NAMES = ["last_stage", "whole_network", "bias_only", "lora_r2"]
SMALL = Part(*pictures(16, 0), *pictures(8, 1), CLASSES)


def budget(trial_steps=1, optimizers=None):
    return TuningBudget(steps=2, trial_steps=trial_steps, optimizers=optimizers or {"adamw": (3e-3,)}, evaluations=3)


@pytest.mark.parametrize("build", [tiny_vit, tiny_resnet])
@pytest.mark.parametrize("name", NAMES)
def test_the_attacked_model_stays_as_it_was(name, build):
    model, before = build(), build().state_dict()
    ATTACKERS[name].run(model, SMALL, budget(), 0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained_is_what_the_name_says_and_the_head_is_that_of_the_seed(name):
    attacked = [prepare(tiny_vit(seed), name, CLASSES, 7) for seed in (0, 1)]
    assert torch.equal(attacked[0].classifier.weight, attacked[1].classifier.weight)
    trained = {key for key, p in attacked[0].named_parameters() if p.requires_grad}
    body, every = trained - {"classifier.weight", "classifier.bias"}, dict(attacked[0].named_parameters())
    assert body and trained - body == {"classifier.weight", "classifier.bias"}
    assert {
        "last_stage": all("layers.1" in key or "vit.layernorm" in key for key in body),
        "whole_network": trained == set(every),
        "bias_only": all(key.endswith("bias") for key in body),
        "lora_r2": all("lora_" in key for key in body),
    }[name]


def test_one_diverging_rate_does_not_hide_a_sound_one_and_settings_of_an_earlier_seed_are_used_untried():
    found = fine_tune("whole_network", tiny_vit(), SMALL, budget(2, {"sgd": (1e30, 1e-2)}), 0)
    assert (found.trials, found.settings["learning_rate"]) == (2, 1e-2)
    chosen = {"optimizer": "sgd", "learning_rate": 0.5, "batch_statistics": False}
    found = fine_tune("bias_only", tiny_vit(), SMALL, budget(), 0, chosen=chosen)
    assert (found.trials, found.settings["learning_rate"]) == (1, 0.5)


# ---- public weights


def test_tensors_that_differ_are_named_and_another_architecture_is_refused():
    model = tiny_vit()
    model.vit.layernorm.bias.data += 1
    assert changed_parameters(model, tiny_vit()) == ["vit.layernorm.bias"]
    assert changed_parameters(tiny_vit(1), tiny_vit(1)) == []
    with pytest.raises(DataError):
        changed_parameters(tiny_vit(), tiny_resnet())
