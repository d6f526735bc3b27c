"""The Trainer with a candidate's terms."""

import pytest
import torch
from transformers import AutoModelForImageClassification

from examples.fine_tuning.candidates import CANDIDATES
from examples.fine_tuning.training import CandidateStep, Passing
from hf_immunize.training.arguments import Method
from hf_immunize.vision.scope import select_trainable


LAYERS, RECTIFIERS = ["resnet.encoder.stages.1"], ["resnet.encoder.stages.1.layers.0.activation"]


def batch(seed=0):
    draw = torch.Generator().manual_seed(seed)
    sides = {side: {"pixel_values": torch.randn(8, 3, 32, 32, generator=draw)} for side in ("benign", "harmful")}
    sides["benign"]["labels"] = torch.arange(8) % 3
    sides["harmful"]["labels"] = torch.arange(8) % 2
    return sides


def step_of(name, model):
    moving = select_trainable(model, r"stages\.1|classifier")
    method = Method(objective="concentration", benign_budget=0.03)
    return CandidateStep(model, CANDIDATES[name], LAYERS, RECTIFIERS, 0, method=method, moving=moving)


@pytest.fixture
def model(start):
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_pretrained(start)


@pytest.mark.parametrize("name", [name for name in CANDIDATES if CANDIDATES[name].scope == "deep"])
def test_every_candidate_moves_features(name, model):
    step_of(name, model)(model, batch(), 0).loss.backward()
    moved = [value.grad.abs().sum() for key, value in model.named_parameters() if "stages.1" in key]
    assert sum(moved) > 0


def test_without_the_head_the_default_objective_is_not_there(model):
    logged = step_of("silence", model)(model, batch(), 0).logged
    assert "concentration" not in logged


def test_terms_have_the_norm_that_the_multiplier_says(model):
    step = step_of("silence", model)
    inside = {}
    model.get_submodule(RECTIFIERS[0]).register_forward_pre_hook(
        lambda module, inputs: inside.setdefault("z", inputs[0]) if torch.is_grad_enabled() else None
    )
    result = step(model, batch(), 0)
    (gradient,) = torch.autograd.grad(result.loss, inside["z"])
    expected = step.weighting.factor / torch.linalg.vector_norm(inside["z"][:8].detach())
    assert torch.isclose(torch.linalg.vector_norm(gradient[8:]), expected, rtol=1e-4)


def test_features_that_are_all_zero_end_the_objective_and_not_the_training(model):
    torch.nn.init.constant_(model.resnet.encoder.stages[1].layers[0].layer[1].normalization.bias, -1e3)
    torch.nn.init.constant_(model.resnet.encoder.stages[1].layers[0].shortcut.normalization.bias, -1e3)
    assert "concentration" not in step_of("silence_depths", model)(model, batch(), 0).logged


def test_hooks_are_gone_after_a_step(model):
    step_of("depths", model)(model, batch(), 0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_passes_without_gradients_are_not_looked_at(model):
    with Passing(model, LAYERS) as passing, torch.no_grad():
        model(pixel_values=batch()["benign"]["pixel_values"])
    assert not passing.values
