"""Fine-tuning attackers learn, move only what they say, and record divergence."""

from dataclasses import replace

import pytest
import torch
from attacked import CLASSES, pictures, tiny_resnet, tiny_vit

from hf_immunize.attacks.finetune import fine_tune, prepare
from hf_immunize.attacks.presets import FINE_TUNING
from hf_immunize.errors import ArgumentError


pytest_plugins = ["attack_fixtures"]


ATTACKERS = ["last_stage", "whole_network", "bias_only", "lora_r2"]


@pytest.mark.outcome
@pytest.mark.parametrize("attacker", FINE_TUNING)
def test_beats_chance_by_thirty_points(attacker, tuning_budget):
    found = fine_tune(tiny_vit(), attacker, pictures(80, 0), pictures(40, 1), CLASSES, 0, tuning_budget)
    assert found.accuracy > 0.25 + 0.3


@pytest.mark.parametrize("attacker", FINE_TUNING)
def test_same_seed_gives_the_same_finding(attacker, tuning_budget):
    short = replace(tuning_budget, steps=4, trial_steps=2)
    found = [fine_tune(tiny_vit(), attacker, pictures(16, 0), pictures(8, 1), CLASSES, 3, short) for _ in range(2)]
    assert found[0] == found[1]


@pytest.mark.parametrize("attacker", FINE_TUNING)
def test_no_setting_is_chosen_by_the_test_images(attacker, tuning_budget):
    grid = replace(tuning_budget, steps=2, trial_steps=4, optimizers={"adamw": (1e-4, 3e-3), "sgd": (1e-1,)})
    settings = [
        fine_tune(tiny_vit(), attacker, pictures(40, 0), (pictures(8, 1)[0], labels), CLASSES, 0, grid).settings
        for labels in (torch.zeros(8, dtype=torch.long), torch.arange(8) % CLASSES)
    ]
    assert settings[0] == settings[1]


@pytest.mark.parametrize("build", [tiny_vit, tiny_resnet])
@pytest.mark.parametrize("attacker", ATTACKERS)
def test_the_attacked_model_stays_as_it_was(attacker, build, tuning_budget):
    model, before = build(), build().state_dict()
    short = replace(tuning_budget, steps=2, trial_steps=1)
    fine_tune(model, attacker, pictures(16, 0), pictures(8, 1), CLASSES, 0, short)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.outcome
@pytest.mark.parametrize("build", [tiny_vit, tiny_resnet])
def test_what_is_frozen_is_computed_once_and_changes_no_curve(build, tuning_budget, monkeypatch):
    passes = []
    model = build()
    first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    hook = torch.nn.Conv2d.forward

    def counted(module, pixels):
        # Copies of the model hold copies of the module.
        if module.weight.shape == first.weight.shape and torch.equal(module.weight, first.weight):
            passes.append(len(pixels))
        return hook(module, pixels)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", counted)
    settings = {"optimizer": "adamw", "learning_rate": 3e-3, "batch_statistics": False}
    data = (model, "last_stage", pictures(80, 0), pictures(40, 1), CLASSES, 0, tuning_budget)
    fast = fine_tune(*data, chosen=settings)
    assert sum(passes) < 200  # 120 images, and a few to find where the frozen part ends
    monkeypatch.setattr("hf_immunize.attacks.finetune.frozen_part", lambda *_: None)
    assert fast.curve == pytest.approx(fine_tune(*data, chosen=settings).curve, abs=0.026)


def test_adapters_leave_the_weights_alone():
    attacked = prepare(tiny_vit(), "lora_r2", CLASSES, 0)
    moving = [name for name, p in attacked.named_parameters() if p.requires_grad and "lora_" not in name]
    assert moving == ["classifier.weight", "classifier.bias"]


def test_biases_alone_move():
    attacked = prepare(tiny_vit(), "bias_only", CLASSES, 0)
    moving = [name for name, p in attacked.named_parameters() if p.requires_grad]
    assert all(name.endswith("bias") or name == "classifier.weight" for name in moving)


@pytest.mark.parametrize("attacker", ATTACKERS)
def test_the_head_is_the_same_for_immunized_and_reference(attacker):
    heads = [prepare(tiny_vit(seed), attacker, CLASSES, 7).classifier.weight for seed in (0, 1)]
    assert torch.equal(*heads)


def test_divergence_is_recorded_and_has_no_accuracy(tuning_budget):
    wild = replace(tuning_budget, optimizers={"sgd": (1e30,)})
    found = fine_tune(tiny_vit(), "whole_network", pictures(16, 0), pictures(8, 1), CLASSES, 0, wild)
    assert (found.status, found.accuracy) == ("diverged", None)


@pytest.mark.outcome
def test_one_diverging_rate_does_not_hide_a_sound_one(tuning_budget):
    mixed = replace(tuning_budget, optimizers={"sgd": (1e30, 1e-2)})
    found = fine_tune(tiny_vit(), "whole_network", pictures(16, 0), pictures(8, 1), CLASSES, 0, mixed)
    assert found.settings["learning_rate"] == 1e-2


def test_settings_of_an_earlier_seed_are_used_untried(tuning_budget):
    chosen = {"optimizer": "sgd", "learning_rate": 0.5, "batch_statistics": False}
    short = replace(tuning_budget, steps=2)
    found = fine_tune(tiny_vit(), "bias_only", pictures(16, 0), pictures(8, 1), CLASSES, 0, short, chosen=chosen)
    assert (found.trials, found.settings["learning_rate"]) == (1, 0.5)


def test_unknown_attacker_is_named(tuning_budget):
    with pytest.raises(ArgumentError, match="magic"):
        prepare(tiny_vit(), "magic", CLASSES, 0)
