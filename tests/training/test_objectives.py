"""Objectives are functions of features, logits, labels and what enters inner modules."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_immunize.errors import ArgumentError, DataError, ScopeError
from hf_immunize.linear.time import probing_time
from hf_immunize.spectra.conditioning import feature_conditioning
from hf_immunize.spectra.hessian_functions import spectral_concentration
from hf_immunize.training.arguments import Method
from hf_immunize.training.distributed import sum_hessian
from hf_immunize.training.objectives import (
    OBJECTIVES,
    InnerTerm,
    Objective,
    Side,
    Subspace,
    Terms,
    adapted_loss,
    gradient_norm,
    relu_activity,
)
from hf_immunize.training.step import ImmunizationStep


SPECTRAL = [name for name, kind in OBJECTIVES.items() if not (kind.needs_rows or kind.looks_inside())]
# Descent on a harmful term, what it is to change, and by how much; likewise on a benign one.
DESCENTS = [(name, "harmful", 0.05, 0.5) for name in SPECTRAL]
DESCENTS += [(name, "benign", -0.02, -0.2) for name in SPECTRAL if name != "r_ill"]


def side(seed, labels=True, rows=12, dim=6):
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, dim, dtype=torch.float64, generator=draw).requires_grad_()
    return Side(features, features[:, :3], torch.arange(rows) % 4 if labels else None, {"relu": features})


def descended(features, term_of, steps=20, rate=0.05):
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(term_of(features), features)
        features = (features - rate * gradient / gradient.norm() * features.norm()).detach().requires_grad_()
    return features.detach()


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_step_down_the_harmful_term_moves_harmful_features_alone(name):
    benign, harmful = side(0), side(1)
    terms = OBJECTIVES[name]()(benign, harmful)
    sum([*terms.harmful.values(), *(term.value for term in terms.inner.values())]).backward()
    assert benign.features.grad is None and harmful.features.grad.norm() > 0


@pytest.mark.outcome
@pytest.mark.parametrize("seed", [0, 10, 20])
@pytest.mark.parametrize(("name", "where", "rate", "change"), DESCENTS)
def test_descent_on_a_term_moves_kappa(name, where, rate, change, seed):
    """Up on harmful features, down on benign ones."""
    start = side(seed + (where == "harmful")).features
    objective = OBJECTIVES[name](scale_free=True)

    def term(features):
        sides = (side(seed), Side(features)) if where == "harmful" else (Side(features), side(seed + 1))
        return sum(getattr(objective(*sides), where).values())

    def enough(steps):
        after = feature_conditioning(descended(start, term, steps, abs(rate))).log_kappa
        return (after - feature_conditioning(start.detach()).log_kappa) / change > 1

    assert enough(20) and not enough(0)


@pytest.mark.parametrize("scale_free", [False, True])
@pytest.mark.parametrize("name", SPECTRAL)
def test_by_the_hessian_values_gradients_and_their_norms_are_those_by_the_features(name, scale_free):
    found = []
    for given_as in (lambda rows: rows, sum_hessian):
        draw = torch.Generator().manual_seed(0)
        rows = [torch.randn(60, 5, generator=draw).requires_grad_() for _ in range(2)]
        sides = [given_as(each) for each in rows]
        terms = OBJECTIVES[name](scale_free=scale_free)(*map(Side, sides))
        values = {**terms.benign, **terms.harmful}
        of = [sides[0]] * len(terms.benign) + [sides[1]] * len(terms.harmful)
        norms = [gradient_norm(value, each) for value, each in zip(values.values(), of, strict=True)]
        sum(values.values()).backward()
        found.append((values, norms, [each.grad for each in rows]))
    (values, norms, gradients), (by_sum, norms_by_sum, gradients_by_sum) = found
    torch.testing.assert_close(by_sum, values, rtol=1e-6, atol=0)
    torch.testing.assert_close(norms_by_sum, norms, rtol=1e-5, atol=0)
    for some, wanted in zip(gradients_by_sum, gradients, strict=True):
        assert (some is None) == (wanted is None)
        assert wanted is None or (some - wanted).norm() <= 2e-6 * wanted.norm()


def test_by_the_hessian_half_precision_features_get_gradients_of_their_type():
    rows = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    some, wanted = (rows.clone().requires_grad_() for _ in range(2))
    spectral_concentration(sum_hessian(some)).backward()
    spectral_concentration(wanted).backward()
    assert some.grad.dtype == torch.bfloat16 and (some.grad - wanted.grad).norm() <= 1e-2 * wanted.grad.norm()


# ---- an objective on an inner layer ----


class Watched(Objective):
    """Concentration of what enters a layer."""

    def __call__(self, benign, harmful):
        (name,) = self.reads
        values = harmful.inner[name].flatten(1)
        value = spectral_concentration(values)
        scale = 1 / torch.linalg.vector_norm(benign.inner[name].detach())
        return Terms(inner={"deep": InnerTerm(value, gradient_norm(value, values), scale)})


def test_an_objective_of_ones_own_reads_an_inner_layer(tiny):
    """Its gradient on what enters the layer has the norm that the rule says."""
    model = tiny()
    layer = "vit.layers.1"
    step = ImmunizationStep(model, Method(benign_budget=None), objective=Watched([layer]))
    entering = []
    model.get_submodule(layer).register_forward_pre_hook(
        lambda module, inputs: entering.append(inputs[0]) if torch.is_grad_enabled() else None
    )
    draw = torch.Generator().manual_seed(0)
    batch = {side: {"pixel_values": torch.randn(4, 3, 8, 8, generator=draw)} for side in ("benign", "harmful")}
    result = step(model, batch, 0)
    (gradient,) = torch.autograd.grad(result.loss, entering[0])
    expected = 0.3 / torch.linalg.vector_norm(entering[0][:4].detach())
    torch.testing.assert_close(torch.linalg.vector_norm(gradient[4:]), expected, rtol=1e-4, atol=0)
    assert not any(module._forward_pre_hooks for name, module in model.named_modules() if name != layer)


# ---- two directions ----


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.01, 100.0), st.floats(-100.0, 100.0))
def test_what_is_outside_has_no_scale_no_mean_and_bounds_the_condition_number(seed, scale, mean):
    features = side(seed, rows=30).features.detach() * torch.tensor([9.0, 5.0, 1.0, 0.5, 0.1, 0.02])
    objective = OBJECTIVES["subspace"](directions=Subspace.prepare(features, features))
    terms = objective(Side(features), Side(features))
    moved = objective(*2 * [Side(scale * features + mean)])
    for term, again in (
        (terms.harmful["outside"], moved.harmful["outside"]),
        (terms.benign["spread"], moved.benign["spread"]),
    ):
        assert torch.isclose(term, again, rtol=1e-9, atol=1e-9)
    conditioning = feature_conditioning(features, intercept=True)
    assert conditioning.log_kappa >= math.log((conditioning.rank - 2) / 2) - terms.harmful["outside"]


def test_its_weights_are_its_own_unless_numbers_are_given():
    """No multiplier: what the first steps of an optimizer do to a benign side would drive it to nothing."""
    method = Method(objective="subspace")
    assert (method.benign_weight, method.harmful_weight, method.benign_budget) == (0.05, 0.05, None)
    assert Method(objective="subspace", harmful_weight=0.1).benign_budget == Method().benign_budget
    assert Method(objective="concentration").harmful_weight == "auto"


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_two_large_directions_slow_gradient_descent_on_a_task_that_neither_holds(seed):
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(400, 12, dtype=torch.float64, generator=draw)
    labels = (features[:, 5] > 0).long()
    large = features * torch.tensor([30.0, 30.0, *[1.0] * 10])
    for method in ("line_search", "fixed_step"):
        before, after = (probing_time(rows, labels, method=method).steps[0.9] for rows in (features, large))
        assert after > 20 * before


def test_the_directions_are_those_of_the_sample_and_what_is_left_fades():
    features = side(0, rows=40).features.detach() * torch.tensor([1.0, 7.0, 1.0, 5.0, 1.0, 1.0])
    found = torch.tensor(Subspace.prepare(features.flip(1), features), dtype=torch.float64)
    assert (found[2:][:, [4, 2]].norm(dim=1) > 0.95).all()
    found = found[:2]
    assert (found[:, [1, 3]].norm(dim=1) > 0.95).all() and torch.allclose(found @ found.mT, torch.eye(2).double())
    objective = OBJECTIVES["subspace"](directions=2 * torch.eye(6, dtype=torch.float64)[:2].tolist())
    for factor, left in ((1.0, 1.0), (0.0, 0.0)):
        only = features * torch.tensor([1.0, 1.0, factor, factor, factor, factor])
        assert float(objective(Side(only), Side(only)).left) == pytest.approx(left, abs=1e-9)
    with pytest.raises(DataError, match="subspace"):
        Subspace.prepare(features, features[:1].expand(8, -1))


# ---- dead ReLU ----


def entering(seed, rows=6):
    return torch.randn(rows, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.01, 100.0))
def test_activity_has_no_scale_and_its_norm_in_closed_form_is_that_of_autograd(seed, scale):
    harmful = (scale * entering(seed)).requires_grad_()
    term = relu_activity(harmful, scale * entering(seed + 1))
    (gradient,) = torch.autograd.grad(term.value, harmful)
    assert torch.isclose(term.gradient_norm, gradient.norm(), rtol=1e-8)
    assert torch.isclose(term.value, relu_activity(entering(seed), entering(seed + 1)).value, rtol=1e-9)


def test_half_precision_is_widened_first():
    assert relu_activity(entering(0).bfloat16(), entering(1).bfloat16()).value.dtype == torch.float32


@pytest.mark.parametrize(("enters", "left"), [(1.0, 1.0), (-0.495, 0.25), (-0.6, 0.0)])
def test_activity_says_how_much_is_left_and_has_no_gradient_where_nothing_is(enters, left):
    # Ones of benign images are the unit; a margin of 0.5 leaves 0.005² = 0.25e-4 at -0.495.
    term = relu_activity(torch.full((4, 3), enters, dtype=torch.float64), torch.ones(4, 3))
    assert term.left.item() == pytest.approx(left, rel=1e-6) and bool(term.gradient_norm) == (left > 0)


@pytest.mark.outcome
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_descent_on_activity_deactivates_every_relu(seed):
    def some_pass(steps):
        features, benign = side(seed + 1).features, side(seed)
        for _ in range(steps):
            (term,) = OBJECTIVES["dead_relu"]()(benign, Side(features, inner={"relu": features})).inner.values()
            (gradient,) = torch.autograd.grad(term.value, features)
            features = (features - 0.1 * gradient / gradient.norm().clamp_min(1e-12)).detach().requires_grad_()
        return bool(torch.relu(features).any())

    assert some_pass(0) and not some_pass(200)


# ---- IMMA ----


@pytest.mark.outcome
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_descent_on_imma_makes_a_fitted_head_worse(seed):
    start = side(seed + 1)

    def term(features):
        return OBJECTIVES["imma"]()(side(seed), Side(features, labels=start.labels)).harmful["negative_adapted_loss"]

    def worse(steps):
        after = adapted_loss(descended(start.features, term, steps), start.labels)
        return after > adapted_loss(start.features, start.labels) + 0.1

    assert worse(20) and not worse(0)


def test_the_inner_attacker_is_differentiated_through_its_steps():
    labels = torch.tensor([0, 1, 2, 0, 1])
    features = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def with_fixed_rate(scale_free_features):
        # A constant of norm one keeps the step size, which is no part of the gradient, where it is.
        return adapted_loss(scale_free_features / torch.linalg.matrix_norm(scale_free_features, 2), labels, steps=3)

    assert torch.autograd.gradcheck(with_fixed_rate, (features.requires_grad_(),))


def test_the_inner_attacker_learns_whatever_the_scale():
    features, labels = side(1).features, side(1).labels
    losses = [adapted_loss(features, labels, steps).item() for steps in (0, 1, 5, 50)]
    assert losses == sorted(losses, reverse=True) and losses[0] == pytest.approx(math.log(4))
    assert adapted_loss(1e3 * features, labels, 5).item() == pytest.approx(losses[2])


# ---- what is refused ----


@pytest.mark.parametrize(
    ("name", "kind"),
    [("dead_relu", ScopeError), ("imma", DataError)],
)
def test_an_objective_without_what_it_reads_says_so(name, kind):
    with pytest.raises(kind, match=f"objective='{name}'"):
        OBJECTIVES[name]()(Side(side(0).features), Side(side(1).features))


IMPOSSIBLE = {
    "benign_loss": ["none"],
    "budget_measure": ["accuracy"],
    "objective": ["nope"],
    "benign_budget": [0, 0.2],
    "budget_holdout": [0.7],
    "auto_weight_averaging": [1.0],
    "auto_weight_bound": [0.5],
    "auto_weight_ratio": [-0.1, "some"],
    "feature_distillation_weight": [-1],
    "benign_weight": [-1.0],
    "harmful_weight": ["much", "nan", float("inf"), None],
    "weight_warmup_steps": ["some"],
    "queue_size": [-1, 2.5],
}
TOGETHER = [{"queue_size": 8, "objective": "imma"}, {"benign_loss": "task", "objective": "dead_relu"}]


@pytest.mark.parametrize(
    "given", [{name: value} for name, values in IMPOSSIBLE.items() for value in values] + TOGETHER, ids=str
)
def test_an_impossible_method_is_refused_by_name_and_value(given):
    (name, value), *_ = given.items()
    with pytest.raises(ArgumentError, match=rf"Expected {name}=.*{value}"):
        Method(**given)


def test_an_old_name_is_refused_with_the_new_one():
    with pytest.raises(ArgumentError, match=r"'dead_relu'.*'silence'"):
        Method(objective="silence")
