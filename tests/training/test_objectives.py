"""Objectives are functions of features, logits, labels and what enters inner modules; what they look for, once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_immunize.errors import ArgumentError, DataError, ScopeError
from hf_immunize.hub.record import read_record
from hf_immunize.linear.time import probing_time
from hf_immunize.spectra.conditioning import feature_conditioning
from hf_immunize.spectra.hessian_functions import spectral_concentration
from hf_immunize.spectra.running import FLOOR
from hf_immunize.training import choice
from hf_immunize.training.arguments import Method
from hf_immunize.training.choice import LEAST_IMAGES, MIN_SEPARABILITY, prepare_objective, separability, separable
from hf_immunize.training.distributed import sum_hessian
from hf_immunize.training.objectives import (
    OBJECTIVES,
    DeadReLU,
    Objective,
    Side,
    Terms,
    Time,
    adapted_loss,
    gradient_norm,
    relu_activity,
)
from hf_immunize.training.step import ImmunizationStep
from hf_immunize.vision.head import find_head
from hf_immunize.vision.scope import select_trainable


SPECTRAL = [name for name, kind in OBJECTIVES.items() if not (kind.needs_rows or kind.looks_inside())]
# Descent on a harmful term, what it is to change, and by how much; likewise on a benign one.
DESCENTS = [(name, "harmful", 0.05, 0.5) for name in ("time", *SPECTRAL)]
DESCENTS += [(name, "benign", -0.02, -0.2) for name in ("time", *SPECTRAL) if name != "r_ill"]


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
    sum([*terms.harmful.values(), *terms.inner.values()]).backward()
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

    weight = 0.3

    def __call__(self, benign, harmful):
        return Terms(inner={name: spectral_concentration(harmful.inner[name].flatten(1)) for name in self.reads})


def test_an_objective_of_ones_own_reads_an_inner_layer_and_has_its_weight(tiny):
    model, layer = tiny(), "vit.layers.1"
    step = ImmunizationStep(model, Method(), objective=Watched([layer]))
    entering = []
    model.get_submodule(layer).register_forward_pre_hook(
        lambda module, inputs: entering.append(inputs[0]) if torch.is_grad_enabled() else None
    )
    draw = torch.Generator().manual_seed(0)
    batch = {side: {"pixel_values": torch.randn(4, 3, 8, 8, generator=draw)} for side in ("benign", "harmful")}
    result = step(model, batch, 0)
    (found,) = torch.autograd.grad(result.loss, entering[0])
    values = entering[0].detach()[4:].requires_grad_()
    (expected,) = torch.autograd.grad(0.3 * spectral_concentration(values.flatten(1)), values)
    torch.testing.assert_close(found[4:], expected, rtol=1e-4, atol=1e-6)
    assert not any(module._forward_pre_hooks for name, module in model.named_modules() if name != layer)


# ---- two directions ----


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.01, 100.0), st.floats(-100.0, 100.0), st.sampled_from([1, 2]))
def test_what_is_outside_has_no_scale_no_mean_and_bounds_the_condition_number(seed, scale, mean, kept):
    features = side(seed, rows=30).features.detach() * torch.tensor([9.0, 5.0, 1.0, 0.5, 0.1, 0.02])
    objective = Time(directions=torch.linalg.svd(features - features.mean(0)).Vh[:kept].tolist())
    terms = objective(Side(features), Side(features))
    moved = objective(*2 * [Side(scale * features + mean)])
    for term, again in (
        (terms.harmful["outside"], moved.harmful["outside"]),
        (terms.benign["spread"], moved.benign["spread"]),
    ):
        assert torch.isclose(term, again, rtol=1e-9, atol=1e-9)
    # The directions inside are empty: what a factorization rounds off is compared with the floor there.
    rounding = 10 * torch.finfo(torch.float64).eps / FLOOR
    assert abs(terms.harmful["tail"] - moved.harmful["tail"]) <= rounding
    conditioning = feature_conditioning(features, intercept=True)
    assert conditioning.log_kappa >= math.log((conditioning.rank - kept) / kept) - terms.harmful["outside"]


def test_half_precision_features_are_centred_in_a_wider_one():
    features = (100 + side(0, rows=30).features.detach()).bfloat16()
    found, wanted = (Time()(*2 * [Side(rows)]) for rows in (features, features.double()))
    torch.testing.assert_close(found.benign["spread"].double(), wanted.benign["spread"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_two_large_directions_slow_gradient_descent_on_a_task_that_neither_holds(seed):
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(400, 12, dtype=torch.float64, generator=draw)
    labels = (features[:, 5] > 0).long()
    large = features * torch.tensor([30.0, 30.0, *[1.0] * 10])
    for method in ("line_search", "fixed_step"):
        before, after = (probing_time(rows, labels, method=method).steps[0.9] for rows in (features, large))
        assert after > 20 * before


def test_the_directions_are_those_of_the_sample_whose_images_must_differ():
    features = side(0, rows=40).features.detach() * torch.tensor([1.0, 7.0, 1.0, 5.0, 1.0, 1.0])
    for width, kept in ((6, 2), (300, 2)):
        wide = torch.nn.functional.pad(features, (0, width - 6))
        found = torch.tensor(Time.prepare(wide, wide), dtype=torch.float64)
        assert found.shape == (kept, width) and (found[:, [1, 3]].norm(dim=1) > 0.95).all()
        assert torch.allclose(found @ found.mT, torch.eye(kept).double())
    with pytest.raises(DataError, match="time"):
        Time.prepare(features, features[:1].expand(8, -1))


def test_a_step_goes_on_with_the_running_covariances_to_the_bit_and_leaves_those_of_another_objective(tiny):
    draw = torch.Generator().manual_seed(0)
    batches = [
        {side: {"pixel_values": torch.randn(4, 3, 8, 8, generator=draw)} for side in ("benign", "harmful")}
        for _ in range(4)  # of fewer rows than the features have dimensions
    ]
    whole, resumed = (ImmunizationStep(tiny(), Method()) for _ in range(2))
    for number, batch in enumerate(batches[:3]):
        whole(whole._plain_model, batch, number)
    resumed.load_state_dict(whole.state_dict())
    some, wanted = (step(step._plain_model, batches[3], 3).logged for step in (resumed, whole))
    assert some.keys() == wanted.keys() and all(torch.equal(some[name], wanted[name]) for name in wanted)
    fresh = ImmunizationStep(tiny(), Method())
    alone = fresh(fresh._plain_model, batches[3], 0).logged
    assert not torch.equal(alone["tail"], wanted["tail"])
    ImmunizationStep(tiny(), Method(objective="concentration")).load_state_dict(whole.state_dict())


# ---- dead ReLU ----


def entering(seed, rows=6):
    return torch.randn(rows, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_activity_is_that_of_its_definition_at_any_scale_and_of_widened_rows(scale):
    unit = entering(1).square().mean().sqrt()
    expected = (torch.relu(entering(0) / unit + 0.5).square().mean() + 1e-4).log()
    assert torch.isclose(relu_activity(scale * entering(0), scale * entering(1)), expected, rtol=1e-9)
    assert relu_activity(entering(0).bfloat16(), entering(1).bfloat16()).dtype == torch.float32


@pytest.mark.outcome
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_descent_on_activity_deactivates_every_relu(seed):
    def some_pass(steps):
        features, benign = side(seed + 1).features, side(seed)
        for _ in range(steps):
            (term,) = OBJECTIVES["dead_relu"]()(benign, Side(features, inner={"relu": features})).inner.values()
            (gradient,) = torch.autograd.grad(term, features)
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


def test_the_inner_attacker_learns_whatever_the_scale_and_is_differentiated_through_its_steps():
    features, labels = side(1).features, side(1).labels
    losses = [adapted_loss(features, labels, steps).item() for steps in (0, 1, 5, 50)]
    assert losses == sorted(losses, reverse=True) and losses[0] == pytest.approx(math.log(4))
    assert adapted_loss(1e3 * features, labels, 5).item() == pytest.approx(losses[2])

    def with_fixed_rate(features):
        # A constant of norm one keeps the step size, which is no part of the gradient, where it is.
        return adapted_loss(features / torch.linalg.matrix_norm(features, 2), labels[:5], steps=3)

    assert torch.autograd.gradcheck(with_fixed_rate, (features.detach()[:5, :3].clone().requires_grad_(),))


# ---- what is refused ----


@pytest.mark.parametrize(("name", "kind"), [("dead_relu", ScopeError), ("imma", DataError)])
def test_an_objective_without_what_it_reads_says_so(name, kind):
    with pytest.raises(kind, match=f"objective='{name}'"):
        OBJECTIVES[name]()(Side(side(0).features), Side(side(1).features))


IMPOSSIBLE = {
    "benign_loss": ["none"],
    "objective": ["nope"],
    "benign_budget": [0, 0.2],
    "auto_weight_ratio": [-0.1, "some"],
    "feature_distillation_weight": [-1],
    "benign_weight": [-1.0],
    "harmful_weight": ["much", "nan", float("inf"), None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in IMPOSSIBLE.items() for value in values])
def test_an_impossible_method_is_refused_by_name_and_value(name, value):
    with pytest.raises(ArgumentError, match=rf"Expected {name}=.*{value}"):
        Method(**{name: value})


@pytest.mark.parametrize(("old", "new"), [("silence", "dead_relu"), ("auto", "time"), ("subspace", "time")])
def test_an_old_name_is_refused_with_the_new_one(old, new):
    assert Method().objective == "time"
    with pytest.raises(ArgumentError, match=rf"'{new}'.*'{old}'"):
        Method(objective=old)


# ---- what is looked for before the first step ----


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_each_row_is_predicted_by_all_others():
    benign, harmful = draws(9, 5), draws(9, 5, seed=1) + 0.5
    rows = torch.cat([benign, harmful])
    rows = rows - rows.mean(0)
    # Ridge regression with a constant feature whose square is the rows' mean one.
    size = rows.square().sum(1).mean()
    design = torch.cat([rows / size.sqrt(), torch.ones(18, 1, dtype=torch.float64)], dim=1)
    sides = torch.tensor([1.0] * 9 + [-1.0] * 9, dtype=torch.float64)
    expected = []
    for index in range(18):
        others = [other for other in range(18) if other != index]
        normal = design[others].mT @ design[others] + 1e-2 * torch.eye(6, dtype=torch.float64)
        weight = torch.linalg.solve(normal, design[others].mT @ sides[others])
        expected.append(bool(design[index] @ weight * sides[index] > 0))
    assert separable(benign, harmful).tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_features_of_two_distributions_are_separable_and_of_one_are_not(seed):
    benign, harmful = draws(64, 300, seed=seed), draws(64, 300, seed=100 + seed)
    assert separability(benign, harmful) < 0.75 and separability(benign, harmful + 0.5) > MIN_SEPARABILITY


@pytest.mark.parametrize("benign, harmful", [(draws(40, 3), draws(40, 3) * torch.nan), (torch.ones(40, 3),) * 2])
def test_what_cannot_be_read_is_not_separable_and_few_images_say_nothing(benign, harmful):
    assert separability(benign, harmful) == 0 and separability(benign[: LEAST_IMAGES - 1], harmful) is None


class Backwards(nn.Module):
    """Runs its parts in the reverse of the order in which they are registered."""

    def __init__(self, shortcut=False):
        super().__init__()
        torch.manual_seed(0)
        self.late, self.early = (nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
        self.shortcut = shortcut

    def forward(self, x):
        out = self.late(self.early(x))
        return out + x if self.shortcut else out


@pytest.mark.parametrize("shortcut, frozen, found", [(False, False, ["late.1"]), (True, False, []), (False, True, [])])
def test_the_relu_is_the_last_that_no_shortcut_bypasses_and_gradients_reach(shortcut, frozen, found):
    model = Backwards(shortcut).requires_grad_(not frozen)
    names = [name for name, _ in model.named_parameters()]
    assert DeadReLU.find(model, names, lambda: model(torch.eye(4) + 1)) == found


def sample(shift=0.0, count=LEAST_IMAGES):
    pixels = draws(2 * count, 3, 32, 32).float()
    return pixels[:count], pixels[count:] + shift


def prepared(model, images, objective="time"):
    trainable = select_trainable(model, "last_stage")
    return prepare_objective(Method(objective=objective), model, find_head(model)[1], trainable, lambda: images)


def test_each_objective_finds_what_it_needs_and_hardly_separable_sides_are_said(tiny, monkeypatch):
    said = []
    monkeypatch.setattr(choice.logger, "warning_once", said.append)
    found = {name: prepared(tiny("resnet"), sample(2.0), name) for name in ("time", "dead_relu", "kappa")}
    assert [len(each.directions) for each in found.values()] == [2, 0, 0]
    assert [len(each.reads) for each in found.values()] == [0, 1, 0]
    assert [each.separability is None for each in found.values()] == [False, False, True] and not said
    for count in (4, LEAST_IMAGES):
        prepared(tiny("resnet"), sample(count=count))
    assert len(said) == 1
    with pytest.raises(DataError):
        prepared(tiny("resnet"), [torch.ones(4, 3, 32, 32)] * 2)


def test_a_restored_step_keeps_the_choice_unless_another_was_asked_for(tiny):
    model = tiny("resnet")
    made, other, asked = (ImmunizationStep(model, Method(objective=name)) for name in ("time", "time", "dead_relu"))
    made.prepare(lambda: sample(2.0))
    for step in (other, asked):
        step.load_state_dict(made.state_dict())
    assert other.choice == made.choice and asked.choice is None


def test_a_run_looks_before_its_first_step_whatever_the_batch_and_says_so_in_the_record(trainer, images, tmp_path):
    data = {"train_dataset": images(48, 1), "harmful_dataset": images(48, 2, labels=False)}
    for row in data["harmful_dataset"]:
        row["pixel_values"] += 3.0
    found = []
    for batch in (4, 16):
        run = trainer(**data, objective="time", per_device_train_batch_size=batch, max_steps=1)
        run.train()
        found.append(run._step.choice)
    assert found[0] == found[1]
    run.evaluate()
    run.save_model(str(tmp_path / "model"))
    choices = read_record(tmp_path / "model").method.settings["choices"]
    assert set(choices) == {"objective", "head_module", "trainable", "harmful_batch_size"}
    assert f"{found[0].separability:.0%}" in choices["objective"]
