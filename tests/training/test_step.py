"""A step's loss, weights and gradients are what they are said to be, and the benign side is held where it started."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_immunize.errors import ArgumentError, DataError, NonFiniteError
from hf_immunize.training.arguments import Method
from hf_immunize.training.distillation import StartingModel, feature_error, logit_divergence, total_variation
from hf_immunize.training.objectives import Terms
from hf_immunize.training.step import ImmunizationStep, RunningMeans, forward_both
from hf_immunize.training.weighting import Weighting
from hf_immunize.vision.head import fast_layout, find_head
from hf_immunize.vision.scope import modules_in_eval, select_trainable


FIXED = {"benign_weight": 0.5, "harmful_weight": 2.0}


def train_logs(run):
    run.train()
    return [entry for entry in run.state.log_history if "loss" in entry]


def zero_weights(**options):
    return {"benign_weight": 0.0, "harmful_weight": 0.0, "learning_rate": 0.0, "max_steps": 1} | options


# ---- weights ----


def weigh(own=None, spent=None, scale=1.0, **options):
    """Weights of a benign term of gradient norm 3 and a harmful one of 6."""
    features = {side: torch.ones(4, requires_grad=True) for side in ("benign", "harmful")}
    terms = Terms({"r": features["benign"][0] * 3}, {"q": features["harmful"][0] * 6})
    weighting = Weighting(Method(**options), own)
    spent = None if spent is None else torch.tensor(spent)
    loss, logged = weighting.weigh(torch.zeros(()), terms, features, lambda: torch.tensor(scale), spent)
    found = [logged[f"{side}_weight"] for side in features]
    assert not any(weight.requires_grad for weight in found)
    assert loss.item() == pytest.approx((3 * found[0] + 6 * found[1]).item())
    return [weight.item() for weight in found]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # Inverse to the norms of gradients, unless the objective has a weight of its own or the user gives numbers.
        ({"auto_weight_ratio": 0.6, "scale": 2.0}, (0.6 * 2 / 3, 0.6 * 2 / 6)),
        ({"own": 0.05}, (0.05, 0.05)),
        ({"own": 0.05, "harmful_weight": 2.0}, (0.05, 2.0)),
        ({"benign_weight": 0.5, "auto_weight_ratio": 0.6, "scale": 2.0}, (0.5, 0.2)),
    ],
)
@pytest.mark.parametrize(("spent", "left"), [(None, 1.0), (0.0, 1.0), (0.25, 0.75), (1.0, 0.0), (7.0, 0.0)])
def test_weights_are_those_of_the_rule_times_what_is_left_of_the_budget(given, expected, spent, left):
    assert weigh(spent=spent, **given) == pytest.approx([left * weight for weight in expected])


@pytest.mark.parametrize(("name", "objective"), [("vit", "time"), ("resnet", "dead_relu")])
def test_the_gate_is_of_the_batch_and_objectives_bring_their_own_weight(name, objective, tiny):
    draw = torch.Generator().manual_seed(0)
    batch = {side: {"pixel_values": torch.randn(4, 3, 32, 32, generator=draw)} for side in ("benign", "harmful")}
    batch = batch if name == "resnet" else {side: {"pixel_values": torch.randn(4, 3, 8, 8)} for side in batch}
    for budget, weight in ((None, "auto"), (0.19, "auto"), (0.19, 0.3), (1e-3, "auto")):
        model = tiny(name).eval()
        moving = select_trainable(model, "last_stage")
        method = Method(objective=objective, benign_budget=budget, harmful_weight=weight)
        step = ImmunizationStep(model, method, moving=moving)
        before = model(pixel_values=batch["benign"]["pixel_values"]).logits
        with torch.no_grad():
            find_head(model)[1].weight.mul_(1.5).add_(0.1)
        moved = total_variation(model(pixel_values=batch["benign"]["pixel_values"]).logits, before).item()
        logged = step(model, batch, step=0).logged
        assert 1e-3 < moved < 0.2
        left = 1.0 if budget is None else max(0.0, 1 - moved / budget)
        assert logged["benign_weight"].item() == pytest.approx(0.2 * left, rel=1e-4)
        assert logged["harmful_weight"].item() == pytest.approx((0.2 if weight == "auto" else 0.3) * left, rel=1e-4)


def test_the_benign_scale_is_a_running_mean_that_is_bounded_and_goes_on_alike_when_restored():
    weighting, restored = Weighting(Method()), Weighting(Method())
    found = [weighting.benign_scale(torch.tensor(value)).item() for value in (4.0, 4.0, 8.0)]
    assert found == pytest.approx([4.0, 4.0, (0.081 * 4 + 0.09 * 4 + 0.1 * 8) / 0.271])
    assert weighting.benign_scale(torch.tensor(1e6)).item() == 3 * 4.0
    restored.load_state_dict(weighting.state_dict())
    assert len({each.benign_scale(torch.tensor(0.1)).item() for each in (weighting, restored)}) == 1


def test_a_term_inside_the_network_needs_a_weight():
    terms = Terms(inner={"deep": torch.ones((), requires_grad=True)})
    with pytest.raises(ArgumentError, match="deep"):
        Weighting(Method()).weigh(torch.zeros(()), terms, {}, lambda: torch.ones(()))


# ---- running statistics ----


def test_running_statistics_of_a_run_are_those_of_its_benign_batches(tiny, trainer, images):
    run = trainer(tiny("resnet"), train_dataset=images(8), freeze_batchnorm=False, learning_rate=0.0)
    run.train()
    alone, start = tiny("resnet"), dict(tiny("resnet").named_buffers())
    still = modules_in_eval(alone, select_trainable(alone, "last_stage"), freeze_batchnorm=False)
    alone.train()
    for module in still:
        module.training = False
    for batch in run.get_train_dataloader():
        alone(pixel_values=batch["benign"]["pixel_values"])
    found = dict(run.model.named_buffers())
    torch.testing.assert_close(found, dict(alone.named_buffers()))
    changed = {name for name, buffer in found.items() if not torch.equal(buffer, start[name])}
    assert changed and all("stages.1." in name for name in changed)


@pytest.fixture
def sides():
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(4, 3, 8, 8, generator=draw) for _ in range(2)]


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_one_pass_is_two_without_batch_statistics_and_benign_rows_come_first(name, tiny, sides):
    model = tiny(name).eval()
    head = find_head(model)[1]
    once, twice = (forward_both(model, head, *sides, together=together) for together in (True, False))
    torch.testing.assert_close(once[:2], twice[:2])
    torch.testing.assert_close(head(once[0]), once[1])
    torch.testing.assert_close(once[1][:4], model(pixel_values=sides[0]).logits)
    # Harmful batches never touch the running statistics, and modes come back.
    paired, alone = tiny(name).train(), tiny(name).train()
    forward_both(paired, find_head(paired)[1], *sides, together=False)
    alone(pixel_values=sides[0])
    torch.testing.assert_close(dict(paired.named_buffers()), dict(alone.named_buffers()))
    assert all(module.training for module in paired.modules())


# ---- the log ----


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_logged_loss_is_the_sum_of_its_logged_parts(trainer, accumulation):
    for entry in train_logs(trainer(**FIXED, gradient_accumulation_steps=accumulation)):
        parts = entry["benign_loss"] + 0.5 * entry["r_well"] + 2.0 * entry["r_ill"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-5)
        assert (entry["benign_weight"], entry["harmful_weight"]) == (0.5, 2.0)


def test_a_second_run_logs_nothing_of_the_first(trainer):
    run = trainer(max_steps=3, logging_steps=2, learning_rate=0.0)
    first = train_logs(run)[0]
    run.state.log_history.clear()
    assert train_logs(run)[0]["r_well"] == pytest.approx(first["r_well"], rel=1e-6)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("deferred", [True, False])
def test_a_term_that_is_not_finite_is_named_with_its_step_and_side(value, deferred):
    means = RunningMeans(deferred)
    finite = {"benign": torch.tensor(True), "harmful": torch.tensor(False)}
    with pytest.raises(NonFiniteError, match=r"finite r_ill at step [34], found .* the harmful images"):
        means.update({"r_well": torch.tensor(1.0), "r_ill": torch.tensor(float(value))}, 3, finite)
        means.update({"r_well": torch.tensor(1.0), "r_ill": torch.tensor(2.0)}, 4)
        means.take(4)


def test_means_are_of_the_values_since_the_last_ones_which_are_not_looked_at_on_a_device():
    means = RunningMeans()
    for values in ((1.0, 3.0), (5.0,)):
        for value in values:
            means.update({"r_well": torch.tensor(value)}, 1)
        assert means.take(2) == {"r_well": sum(values) / len(values)}
    assert means.take(3) == {}
    for step in (1, 2):
        means.update({"r_ill": torch.tensor(0.0, device="meta")}, step)  # a look at it would raise


# ---- gradients ----


@pytest.mark.parametrize(
    ("name", "accumulation", "freeze_batchnorm"),
    [("vit", 4, True), ("resnet", 4, True), ("mobilenet_v2", 4, True), ("resnet", 1, False), ("resnet", 2, False)],
)
def test_accumulated_gradients_are_the_mean_of_the_micro_batches(
    name, accumulation, freeze_batchnorm, tiny, trainer, gradients
):
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 1, "max_grad_norm": 0.0, **FIXED}
    run = trainer(tiny(name), **options, freeze_batchnorm=freeze_batchnorm, callbacks=[gradients])
    twin = trainer(tiny(name), **options, freeze_batchnorm=freeze_batchnorm)
    twin.model.train()
    for _, batch in zip(range(accumulation), run.get_train_dataloader(), strict=False):
        twin.compute_loss(twin.model, batch).div(accumulation).backward()
    run.train()
    expected = {name: p.grad for name, p in twin.model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients.steps[0], expected)


@pytest.mark.parametrize("objective", ["time", "dead_relu"])
def test_a_step_without_gradients_leaves_the_objective_as_it_is(objective, tiny):
    draw = torch.Generator().manual_seed(0)
    batch = {side: {"pixel_values": torch.randn(4, 3, 32, 32, generator=draw)} for side in ("benign", "harmful")}
    found = []
    for grad in (True, False):
        model = tiny("resnet")
        moving = select_trainable(model, "last_stage")
        step = ImmunizationStep(model, Method(objective=objective), moving=moving)
        with torch.set_grad_enabled(grad):
            step(model, batch, step=0)
        found.append(step.choice)
    assert found[0] == found[1]
    with pytest.raises(DataError, match="none that are harmful"):
        step(model, {"benign": batch["benign"]}, step=0)


# ---- the task's loss ----


@pytest.mark.parametrize("benign_loss", ["task", "both"])
def test_the_benign_loss_has_smoothed_labels_and_misses_those_that_are_not_there(benign_loss, tiny, trainer, images):
    """Before the first step distillation is zero, so that both losses are the task's."""
    benign, options = images(4), zero_weights(benign_loss=benign_loss)
    run = trainer(tiny(), train_dataset=benign, label_smoothing_factor=0.2, **options)
    pixels = torch.stack([row["pixel_values"] for row in benign])
    labels = torch.tensor([row["labels"] for row in benign])
    logits = tiny().eval()(pixel_values=pixels).logits
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.2).item()
    assert train_logs(run)[0]["benign_loss"] == pytest.approx(expected, rel=1e-5)
    assert run.evaluate(benign)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    collate = lambda items: {"pixel_values": torch.stack([item["pixel_values"] for item in items])}  # noqa: E731
    with pytest.raises(DataError, match="Expected labels of the benign images"):
        trainer(data_collator=collate, **options).train()


@pytest.mark.parametrize("read", [lambda outputs: outputs["logits"], lambda outputs: outputs.logits])
def test_a_loss_function_of_the_user_is_honoured(read, trainer):
    def loss_function(outputs, labels, num_items_in_batch=None):
        return read(outputs).square().mean() + 100

    run = trainer(**zero_weights(), compute_loss_func=loss_function)
    assert 100 < train_logs(run)[0]["benign_loss"] < 110 and 100 < run.evaluate()["eval_loss"] < 110


# ---- precision, and what is not finite ----


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"bf16": True, **FIXED},
        pytest.param(
            {"fp16": True, "use_cpu": False},
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 needs a CUDA GPU"),
        ),
    ],
)
def test_a_run_in_half_precision_stays_finite(options, trainer):
    run = trainer(max_steps=4, **options)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in train_logs(run))
    assert all(torch.isfinite(parameter).all() for parameter in run.model.parameters())
    assert "eval_rir" in run.evaluate()


@pytest.mark.parametrize("benign_loss", ["task", "distillation"])
def test_a_model_in_float64_trains_as_one_in_float32(benign_loss, tiny, trainer, images):
    def run(model, dtype):
        rows = [{**row, "pixel_values": row["pixel_values"].to(dtype)} for row in images(8)]
        data = {"train_dataset": rows, "harmful_dataset": rows, "eval_dataset": None, "harmful_eval_dataset": None}
        return train_logs(trainer(model, benign_loss=benign_loss, **data))[0]

    double, single = run(tiny().double(), torch.float64), run(tiny(), torch.float32)
    assert double["loss"] == pytest.approx(single["loss"], rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_and_losses_that_are_not_finite_stop_the_run_and_are_named(value, trainer, at):
    def poke(state, control, model):
        if state.global_step == 1:
            model.vit.layers[1].layernorm_after.weight.data[0] = value

    with pytest.raises(NonFiniteError, match=r"(?s)r_ill.* step 2"):
        trainer(objective="r_ill", max_steps=4, callbacks=[at("on_step_begin", poke)]).train()

    def broken(outputs, labels, num_items_in_batch=None):
        return outputs["logits"].sum() * value

    with pytest.raises(NonFiniteError, match="finite benign_loss at step 1, found"):
        trainer(compute_loss_func=broken, benign_weight=0, harmful_weight=0).train()


# ---- staying close to the starting model ----


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
    assert change <= total_variation(now, start, most=1.0) + 1e-6
    others = total_variation(now[1:], start[1:])
    assert abs(total_variation(now, start) - 49 / 50 * others) <= 0.2 / 50 + 1e-6


def test_feature_error_does_not_depend_on_scale_and_is_finite_where_an_image_has_no_features():
    draw = torch.Generator().manual_seed(0)
    now, start = (torch.randn(5, 4, generator=draw) for _ in range(2))
    assert feature_error(1e4 * now, 1e4 * start).item() == pytest.approx(feature_error(now, start).item(), rel=1e-5)
    start[0] = 0
    assert torch.isfinite(feature_error(now, start))


@pytest.mark.parametrize("name", ["vit", "resnet", "mobilenet_v2"])
def test_the_starting_model_predicts_what_the_model_did_and_leaves_it_as_it_is(name, tiny):
    model = tiny(name)
    size = 32 if name == "mobilenet_v2" else 8
    images = fast_layout(model, torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1)))
    moving = select_trainable(model, "last_stage")
    with torch.no_grad():
        before = model.eval()(pixel_values=images).logits
        start = StartingModel(model)
        for key, value in (dict(model.named_parameters()) | dict(model.named_buffers())).items():
            if key in moving or "running" in key:
                value.mul_(1.5).add_(0.1)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.train().modules()]
    assert torch.allclose(start(model, find_head(model)[1], images)[1], before, atol=1e-6)
    with start.in_place(model, model):
        assert torch.allclose(model.eval()(pixel_values=images).logits, before, atol=1e-6)
    assert all(torch.equal(value, state[key]) for key, value in model.train().state_dict().items())
    assert [module.training for module in model.modules()] == modes


def test_starting_tensors_of_another_scope_are_refused(tiny):
    narrow, wide = tiny("vit"), tiny("vit")
    select_trainable(narrow, "last_stage")
    state = StartingModel(narrow).state_dict()
    select_trainable(wide, "all")
    with pytest.raises(ArgumentError, match=r"found none\. Resume with the model, trainable="):
        StartingModel(wide).load_state_dict(state)


def test_distillation_on_unlabelled_images_enters_the_loss(trainer, images):
    settings = {"benign_loss": "distillation", "learning_rate": 0.1, "max_steps": 3}
    logs = []
    for extra in (None, images(8, 7, labels=False)):
        data = {"train_dataset": images(8, 1, labels=False), "eval_dataset": None, "distillation_dataset": extra}
        logs.append(train_logs(trainer(**data, **settings)))
    assert "feature_error" in logs[0][0]
    assert logs[0][0]["kl"] == logs[1][0]["kl"] == 0 and logs[0][-1]["kl"] != logs[1][-1]["kl"]


@pytest.mark.outcome
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_small_budget_holds_predictions_closer_than_a_large_one(trainer, seed):
    found, control = [], []
    options = {"objective": "concentration", "benign_loss": "distillation", "max_steps": 300, "seed": seed}
    options["feature_distillation_weight"] = 5.0  # or it is that which holds them
    for budget in (1e-3, 0.19):
        logs = train_logs(trainer(**options, benign_budget=budget))
        found.append(sum(entry["kl"] for entry in logs[200:300]) / 100)
        control.append(logs[0]["kl"])
    assert found[0] < 0.2 * found[1]
    assert not control[0] < 0.2 * control[1]  # before the first update both are where they started
