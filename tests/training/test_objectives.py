"""Objectives are functions of features, logits and labels."""

import math

import pytest
import torch

from hf_immunize.errors import ArgumentError, DataError, ScopeError
from hf_immunize.spectra.conditioning import feature_conditioning
from hf_immunize.training.arguments import Method
from hf_immunize.training.objectives import OBJECTIVES, Side, adapted_loss


def side(seed, labels=True, rows=12, dim=6):
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, dim, dtype=torch.float64, generator=draw).requires_grad_()
    return Side(features, features[:, :3], torch.arange(rows) % 4 if labels else None, {"rectifier": features})


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_step_down_the_harmful_term_moves_harmful_features_alone(name):
    benign, harmful = side(0), side(1)
    terms = OBJECTIVES[name](benign, harmful, False)
    sum([*terms.harmful.values(), *(term.value for term in terms.inner.values())]).backward()
    assert benign.features.grad is None and harmful.features.grad.norm() > 0


@pytest.mark.outcome
@pytest.mark.parametrize("name", ["concentration", "kappa", "r_ill", "opt_kappa"])
def test_descent_on_the_harmful_term_raises_kappa(name):
    features = side(1).features
    before = feature_conditioning(features.detach()).log_kappa
    for _ in range(20):
        term = sum(OBJECTIVES[name](side(0), Side(features), True).harmful.values())
        (gradient,) = torch.autograd.grad(term, features)
        features = (features - 0.05 * gradient / gradient.norm() * features.norm()).detach().requires_grad_()
    assert feature_conditioning(features.detach()).log_kappa > before + 0.5


@pytest.mark.outcome
@pytest.mark.parametrize("name", ["concentration", "kappa", "opt_kappa"])
def test_descent_on_the_benign_term_lowers_kappa(name):
    features = side(0).features
    before = feature_conditioning(features.detach()).log_kappa
    for _ in range(20):
        term = sum(OBJECTIVES[name](Side(features), side(1), True).benign.values())
        (gradient,) = torch.autograd.grad(term, features)
        features = (features - 0.02 * gradient / gradient.norm() * features.norm()).detach().requires_grad_()
    assert feature_conditioning(features.detach()).log_kappa < before - 0.2


@pytest.mark.outcome
def test_descent_on_silence_switches_every_rectifier_off():
    harmful, benign = side(1), side(0)
    for _ in range(200):
        (term,) = OBJECTIVES["silence"](benign, harmful, False).inner.values()
        (gradient,) = torch.autograd.grad(term.value, harmful.features)
        features = (harmful.features - 0.1 * gradient / gradient.norm().clamp_min(1e-12)).detach().requires_grad_()
        harmful = Side(features, rectified={"rectifier": features})
    assert not torch.relu(harmful.features).any()


def test_silence_without_rectifiers_names_the_remedy():
    with pytest.raises(ScopeError, match="objective='concentration'"):
        OBJECTIVES["silence"](Side(side(0).features), Side(side(1).features), False)


def test_auto_is_silence_where_there_are_rectifiers():
    harmful, benign = side(1), side(0)
    found, wanted = (OBJECTIVES[name](benign, harmful, False) for name in ("auto", "silence"))
    assert {name: term.value for name, term in found.inner.items()} == {
        name: term.value for name, term in wanted.inner.items()
    }


def test_auto_is_concentration_where_there_are_none():
    sides = Side(side(0).features), Side(side(1).features)
    assert OBJECTIVES["auto"](*sides, False) == OBJECTIVES["concentration"](*sides, False)


def test_descent_on_imma_makes_a_fitted_head_worse():
    features, labels = side(1).features, side(1).labels
    before = adapted_loss(features, labels).item()
    for _ in range(20):
        term = OBJECTIVES["imma"](side(0), Side(features, labels=labels), False).harmful["negative_adapted_loss"]
        (gradient,) = torch.autograd.grad(term, features)
        features = (features - 0.05 * gradient / gradient.norm() * features.norm()).detach().requires_grad_()
    assert adapted_loss(features, labels).item() > before + 0.1


def test_imma_without_labels_says_what_to_do():
    with pytest.raises(DataError, match="Give the harmful dataset a label column"):
        OBJECTIVES["imma"](side(0), side(1, labels=False), False)


def test_the_inner_attacker_is_differentiated_through_its_steps():
    labels = torch.tensor([0, 1, 2, 0, 1])
    features = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def with_fixed_rate(scale_free_features):
        # A constant of norm one keeps the step size, which is no part of the gradient, where it is.
        return adapted_loss(scale_free_features / torch.linalg.matrix_norm(scale_free_features, 2), labels, steps=3)

    assert torch.autograd.gradcheck(with_fixed_rate, (features.requires_grad_(),))


def test_the_inner_attacker_learns():
    losses = [adapted_loss(side(1).features, side(1).labels, steps).item() for steps in (0, 1, 5, 50)]
    assert losses == sorted(losses, reverse=True) and losses[0] == pytest.approx(math.log(4))


def test_the_inner_attacker_sees_no_scale():
    features, labels = side(1).features, side(1).labels
    assert adapted_loss(1e3 * features, labels).item() == pytest.approx(adapted_loss(features, labels).item())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"benign_loss": "none"}, "benign_loss= out of distillation, task, both, found 'none'"),
        ({"budget_measure": "accuracy"}, "budget_measure= out of total_variation, kl, loss"),
        ({"benign_budget": 0}, "benign_budget= above 0 or None, found 0"),
        ({"benign_budget": 0.2}, r"benign_budget= below 0\.2 with budget_measure='total_variation', found 0\.2"),
        ({"auto_weight_averaging": 1.0}, "auto_weight_averaging= between 0 and 1"),
        ({"auto_weight_bound": 0.5}, "auto_weight_bound= of at least 1"),
        ({"feature_distillation_weight": -1}, "feature_distillation_weight= of at least 0"),
        ({"queue_size": -1}, "of at least 0, found 0 and -1"),
        ({"queue_size": 8, "objective": "imma"}, "queue_size=0 with objective='imma'"),
    ],
)
def test_an_impossible_method_is_refused(settings, message):
    with pytest.raises(ArgumentError, match=message):
        Method(**settings)
