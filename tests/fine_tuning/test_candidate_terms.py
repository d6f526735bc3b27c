"""What the candidates add to the loss."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ResNetConfig, ResNetForImageClassification

from examples.fine_tuning import terms


def rows(seed, count=16, dim=6):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.01, 100.0))
def test_ridge_reads_between_nothing_and_all_whatever_the_scale(seed, scale):
    labels = torch.arange(16) % 3
    assert 0 <= terms.ridge_resistance(scale * rows(seed), labels).item() <= 1


def test_ridge_reads_nothing_of_constant_features():
    assert terms.ridge_resistance(torch.ones(16, 4), torch.arange(16) % 2).item() < 1e-6


def test_gradient_of_the_inner_ridge_lowers_what_it_reads():
    labels = torch.arange(16) % 2
    features = (rows(0) + 2 * labels[:, None]).requires_grad_()
    before = terms.ridge_resistance(features, labels)
    (gradient,) = torch.autograd.grad(before, features)
    after = terms.ridge_resistance(features.detach() - 0.01 * gradient / gradient.norm(), labels)
    assert after < before


def test_flatness_is_differentiable_in_the_parameters():
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    inputs, labels, head = rows(1).double(), torch.arange(16) % 3, rows(2, 3, 5).double()
    assert torch.autograd.gradcheck(lambda w: terms.flatness((inputs @ w.mT).tanh(), labels, [w], head), (weight,))


def tiny_model():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config).eval()


def tuned(model, **changes):
    labels = torch.arange(16) % 2
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)) + 2.0 * labels.view(-1, 1, 1, 1)
    moving = [name for name, _ in model.named_parameters() if "stages.1" in name]
    options = {"steps": 2, "learning_rate": 1e-2, "seed": 0} | changes
    return terms.after_tuning(model, moving, images, labels, **options)


def test_unrolled_attacker_leaves_the_model_as_it_is():
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_unrolled_attacker_gives_gradients_of_what_moves_alone():
    assert all("stages.1" in name for name in tuned(tiny_model()))


def test_without_inner_steps_the_gradient_is_that_of_the_loss_itself():
    model = tiny_model()
    found = tuned(model, steps=0)
    from hf_immunize.attacks.finetune import prepare

    copy = prepare(model, "whole_network", 2, 0)
    labels = torch.arange(16) % 2
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)) + 2.0 * labels.view(-1, 1, 1, 1)
    losses = torch.nn.functional.cross_entropy(copy(pixel_values=images[8:]).logits, labels[8:], reduction="none")
    total = -losses.clamp(max=math.log(2)).mean()
    named = {name: value for name, value in copy.named_parameters() if name in found}
    expected = torch.autograd.grad(total, list(named.values()))
    assert all(torch.allclose(found[name], one) for name, one in zip(named, expected, strict=True))
