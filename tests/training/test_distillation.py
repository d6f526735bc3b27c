"""Distillation holds the model where it started."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_immunize.errors import ArgumentError, ShapeError
from hf_immunize.training.distillation import StartingModel, feature_error, logit_divergence, total_variation
from hf_immunize.training.step import FeatureQueue
from hf_immunize.vision.head import find_head
from hf_immunize.vision.scope import select_trainable


def test_divergence_is_that_of_the_definition():
    draw = torch.Generator().manual_seed(0)
    now, start = (torch.randn(5, 4, generator=draw) for _ in range(2))
    p, q = start.softmax(1), now.softmax(1)
    assert logit_divergence(now, start).item() == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-5)


@given(st.integers(0, 2**31), st.floats(1, 30))
def test_total_variation_bounds_changes_of_probabilities_and_what_one_image_adds(seed, size):
    generator = torch.Generator().manual_seed(seed)
    start, now = size * torch.randn(2, 50, 4, generator=generator)
    change = (now.softmax(1) - start.softmax(1)).mean(0).abs().max()
    assert change <= total_variation(now, start) + 1e-6
    others = total_variation(now[1:], start[1:])
    assert abs(total_variation(now, start) - 49 / 50 * others) <= 1 / 50 + 1e-6


def test_feature_error_does_not_depend_on_scale_and_is_finite_where_an_image_has_no_features():
    draw = torch.Generator().manual_seed(0)
    now, start = (torch.randn(5, 4, generator=draw) for _ in range(2))
    assert feature_error(1e4 * now, 1e4 * start).item() == pytest.approx(feature_error(now, start).item(), rel=1e-5)
    start[0] = 0
    assert torch.isfinite(feature_error(now, start))


@pytest.fixture(params=["vit", "resnet", "mobilenet_v2"])
def moved(request, tiny):
    """A model whose last stage was changed after its starting model was kept, and what it computed before."""
    model = tiny(request.param)
    size = 32 if request.param == "mobilenet_v2" else 8
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    select_trainable(model, "last_stage")
    with torch.no_grad():
        before = model.eval()(pixel_values=images).logits
        start = StartingModel(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5).add_(0.1)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.mul_(2)
    return model, start, images, before


def test_the_starting_model_predicts_what_the_model_did_and_leaves_it_as_it_is(moved):
    model, start, images, before = moved
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.train().modules()]
    assert torch.allclose(start(model, find_head(model)[1], images)[1], before, atol=1e-6)
    with start.in_place(model):
        assert torch.allclose(model.eval()(pixel_values=images).logits, before, atol=1e-6)
    assert all(torch.equal(value, state[name]) for name, value in model.train().state_dict().items())
    assert [module.training for module in model.modules()] == modes


def test_starting_tensors_of_another_scope_are_refused(tiny):
    narrow, wide = tiny("vit"), tiny("vit")
    select_trainable(narrow, "last_stage")
    state = StartingModel(narrow).state_dict()
    select_trainable(wide, "all")
    with pytest.raises(ArgumentError, match=r"found none\. Resume with the model, trainable="):
        StartingModel(wide).load_state_dict(state)


def test_distillation_on_unlabelled_images_enters_the_loss(trainer, images):
    settings = {"benign_loss": "distillation", "benign_budget": 0.1, "learning_rate": 0.1, "max_steps": 3}
    logs = []
    for extra in (None, images(8, 7, labels=False)):
        data = {"train_dataset": images(8, 1, labels=False), "eval_dataset": None, "distillation_dataset": extra}
        run = trainer(**data, **settings)
        run.train()
        logs.append([entry["kl"] for entry in run.state.log_history if "kl" in entry])
    assert "feature_error" in run.state.log_history[0]
    assert logs[0][0] == logs[1][0] == 0 and logs[0][-1] != logs[1][-1]


def test_a_budget_in_benign_loss_is_measured_against_the_starting_model(trainer):
    run = trainer(benign_budget=0.1, budget_measure="loss")
    run.train()
    assert run.state.log_history[0]["task_loss_rise"] == pytest.approx(0, abs=1e-6)


@pytest.mark.outcome
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("measure, large", [("kl", 1.0), ("total_variation", 0.19)])
def test_a_small_budget_holds_predictions_closer_than_a_large_one(trainer, measure, large, seed):
    found, control = [], []
    options = {"objective": "concentration", "benign_loss": "distillation", "max_steps": 300, "seed": seed}
    for budget in (1e-3, large):
        run = trainer(**options, benign_budget=budget, budget_measure=measure)
        run.train()
        found.append(sum(entry["kl"] for entry in run.state.log_history[200:300]) / 100)
        control.append(run.state.log_history[0]["kl"])
    assert found[0] < 0.2 * found[1]
    assert not control[0] < 0.2 * control[1]  # before the first update both are where they started


def test_a_queue_of_another_dimension_is_named():
    queue = FeatureQueue(4)
    queue.push(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="dimension 3, which the queue holds, found 5"):
        queue.join(torch.zeros(2, 5))


def test_gradient_flows_to_the_batch_alone():
    queue, batch = FeatureQueue(4), torch.randn(2, 3, requires_grad=True)
    old = torch.randn(2, 3, requires_grad=True)
    queue.push(old)
    queue.join(batch).square().sum().backward()
    assert torch.equal(batch.grad, 2 * batch.detach()) and old.grad is None


def test_kappa_of_the_queue_approaches_that_of_the_population():
    """Where a batch holds fewer samples than dimensions, its own κ says little about the task's."""
    from hf_immunize.spectra.hessian_functions import hessian_log_kappa

    draw = torch.Generator().manual_seed(0)
    population = torch.randn(4096, 16, generator=draw, dtype=torch.float64) * torch.logspace(0, 2, 16)
    truth = hessian_log_kappa(population).item()
    queue = FeatureQueue(1024)
    for start in range(0, 1024, 8):
        queue.push(population[start : start + 8])
    batch = population[1024:1032]
    alone, joined = hessian_log_kappa(batch).item(), hessian_log_kappa(queue.join(batch)).item()
    assert abs(joined - truth) < 0.2 < abs(alone - truth)


def test_a_run_with_a_queue_logs_terms_of_all_its_rows(trainer):
    alone, queued = trainer(max_steps=3), trainer(max_steps=3, queue_size=8)
    for run in (alone, queued):
        run.train()
    first, last = ([run.state.log_history[step]["r_well"] for run in (alone, queued)] for step in (0, 2))
    assert first[0] == first[1] and last[0] != last[1]
