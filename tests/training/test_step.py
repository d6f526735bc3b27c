"""A step's loss, weights and gradients are what they are said to be."""

import pytest
import torch
import transformers as hf
from torch import nn

from hf_immunize.errors import DataError, NonFiniteError
from hf_immunize.spectra.regularizers import hessian_r_ill, hessian_r_well
from hf_immunize.training.arguments import Method
from hf_immunize.training.objectives import Terms, gradient_norm
from hf_immunize.training.step import ImmunizationStep, RunningMeans, forward_both
from hf_immunize.training.weighting import Weighting, WeightRule
from hf_immunize.vision.head import find_head
from hf_immunize.vision.scope import modules_in_eval, select_trainable


FIXED = {"benign_weight": 0.5, "harmful_weight": 2.0}


def test_running_statistics_of_a_run_are_those_of_its_benign_batches(tiny, trainer, images):
    benign = images(8)
    run = trainer(tiny("resnet"), train_dataset=benign, freeze_batchnorm=False, learning_rate=0.0)
    run.train()
    alone = tiny("resnet")
    still = modules_in_eval(alone, select_trainable(alone, "last_stage"), freeze_batchnorm=False)
    alone.train()
    for module in still:
        module.training = False
    for batch in run.get_train_dataloader():
        alone(pixel_values=batch["benign"]["pixel_values"])
    torch.testing.assert_close(dict(run.model.named_buffers()), dict(alone.named_buffers()))


def test_a_run_with_moving_statistics_moves_them(tiny, trainer):
    model = tiny("resnet")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trainer(model, freeze_batchnorm=False).train()
    changed = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed and all("stages.1." in name for name in changed)


def weighed(weights, ratio=0.3):
    """Weigh R_well and R_ill of random features beside the cross-entropy of a random head."""
    features = torch.randn(8, 4, requires_grad=True)
    loss = nn.functional.cross_entropy(features[:4] @ torch.randn(4, 2), torch.tensor([0, 1, 1, 0]))
    sides = {"benign": features[:4], "harmful": features[4:]}
    terms = Terms({"r_well": hessian_r_well(sides["benign"])}, {"r_ill": hessian_r_ill(sides["harmful"])})
    weighting = Weighting(WeightRule(**weights, ratio=ratio))
    norm = gradient_norm(loss, features)
    return features, loss, terms, *weighting.weigh(loss, terms, sides, lambda: weighting.benign_scale(norm), step=0)


@pytest.mark.parametrize("ratio", [0.1, 1.0])
@pytest.mark.parametrize("side, name", [("benign", "r_well"), ("harmful", "r_ill")])
def test_auto_weights_give_the_gradients_the_ratio_asked(side, name, ratio):
    features, loss, terms, _, logged = weighed({"benign": "auto", "harmful": "auto"}, ratio)
    term = getattr(terms, side)[name]
    proportion = logged[f"{side}_weight"] * gradient_norm(term, features) / gradient_norm(loss, features)
    torch.testing.assert_close(proportion, torch.tensor(ratio))


def test_auto_weights_are_constants_of_the_step():
    _, _, _, _, logged = weighed({"benign": "auto", "harmful": "auto"})
    assert not logged["benign_weight"].requires_grad


def test_fixed_weights_are_used_as_given():
    _, loss, terms, total, logged = weighed({"benign": 0.5, "harmful": 2.0})
    torch.testing.assert_close(total, loss + 0.5 * terms.benign["r_well"] + 2.0 * terms.harmful["r_ill"])
    assert (logged["benign_weight"].item(), logged["harmful_weight"].item()) == (0.5, 2.0)


def test_one_side_may_be_fixed_and_the_other_balanced():
    _, _, _, _, logged = weighed({"benign": 0.5, "harmful": "auto"})
    assert logged["benign_weight"].item() == 0.5 and logged["harmful_weight"].item() not in (0.5, 0.0)


def test_means_are_of_what_came_since_the_last_time():
    means = RunningMeans()
    means.update({"a": torch.tensor(1.0)}, step=1)
    means.update({"a": torch.tensor(2.0)}, step=1)
    assert means.take(1) == {"a": 1.5} and means.take(1) == {}
    means.update({"a": torch.tensor(7.0)}, step=2)
    assert means.take(2) == {"a": 7.0}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_term_that_is_not_finite_is_named_with_its_step(value):
    with pytest.raises(NonFiniteError, match=r"finite r_ill at step 7, found"):
        RunningMeans().update({"r_ill": torch.tensor(float(value))}, step=7)


def train_logs(run):
    run.train()
    return [entry for entry in run.state.log_history if "loss" in entry]


def test_every_term_and_weight_is_logged(trainer):
    (first, second) = train_logs(trainer())
    names = {"loss", "benign_loss", "r_well", "r_ill", "benign_weight", "harmful_weight"}
    assert names <= set(first) and names <= set(second)


def test_the_baseline_logs_no_benign_term(trainer):
    entry = train_logs(trainer(objective="r_ill", max_steps=1))[0]
    assert "r_ill" in entry and "r_well" not in entry and "benign_weight" not in entry


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_logged_loss_is_the_sum_of_its_logged_parts(trainer, accumulation):
    for entry in train_logs(trainer(**FIXED, gradient_accumulation_steps=accumulation)):
        parts = entry["benign_loss"] + 0.5 * entry["r_well"] + 2.0 * entry["r_ill"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-5)


def test_a_second_run_logs_nothing_of_the_first(trainer):
    run = trainer(max_steps=3, logging_steps=2, learning_rate=0.0)
    first = train_logs(run)[0]
    run.state.log_history.clear()
    assert train_logs(run)[0]["r_well"] == pytest.approx(first["r_well"], rel=1e-6)


@pytest.mark.parametrize("name", ["vit", "resnet", "mobilenet_v2"])
def test_accumulated_gradients_are_the_mean_of_the_micro_batches(name, tiny, trainer, gradients):
    options = {"gradient_accumulation_steps": 4, "max_steps": 1, "max_grad_norm": 0.0, "callbacks": [gradients]}
    run = trainer(tiny(name), **options, **FIXED)
    micro_batches = list(run.get_train_dataloader())
    run.model.train()
    expected = {}
    for batch in micro_batches:
        run.model.zero_grad()
        run.compute_loss(run.model, batch).backward()
        for parameter_name, parameter in run.model.named_parameters():
            if parameter.grad is not None:
                expected[parameter_name] = expected.get(parameter_name, 0) + parameter.grad / 4
    run.model.zero_grad()
    run.train()
    assert len(micro_batches) == 4
    torch.testing.assert_close(gradients.steps[0], expected)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_with_moving_batch_statistics_accumulate_too(accumulation, tiny, trainer, gradients):
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 1, "max_grad_norm": 0.0}
    run = trainer(tiny("resnet"), **options, **FIXED, freeze_batchnorm=False, callbacks=[gradients])
    loader = iter(run.get_train_dataloader())
    micro_batches = [next(loader) for _ in range(accumulation)]
    twin = trainer(tiny("resnet"), **options, **FIXED, freeze_batchnorm=False)
    twin.model.train()
    for batch in micro_batches:
        twin.compute_loss(twin.model, batch).div(accumulation).backward()
    run.train()
    expected = {name: p.grad for name, p in twin.model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients.steps[0], expected)


def zero_weights(**options):
    return {"benign_weight": 0.0, "harmful_weight": 0.0, "learning_rate": 0.0, "max_steps": 1} | options


def test_the_logged_loss_does_not_depend_on_accumulation(trainer):
    whole = train_logs(trainer(**zero_weights(per_device_train_batch_size=16)))[0]
    parts = train_logs(trainer(**zero_weights(per_device_train_batch_size=4, gradient_accumulation_steps=4)))[0]
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_a_batch_without_harmful_images_is_named(tiny):
    model = tiny()
    with pytest.raises(DataError, match="none that are harmful"):
        ImmunizationStep(model)(model, {"benign": {"pixel_values": torch.zeros(2, 3, 8, 8)}}, step=0)


def test_beside_the_task_loss_alone_auto_is_concentration(trainer):
    run = trainer("resnet", objective="auto", benign_loss="task", benign_budget=None)
    run.train()
    assert run.objective == "concentration"


def test_a_loss_without_gradients_does_not_change_the_objective(tiny):
    model = tiny("resnet")
    moving = select_trainable(model, "last_stage")
    step = ImmunizationStep(model, Method(benign_weight=0.1, harmful_weight=0.1), moving=moving)
    draw = torch.Generator().manual_seed(0)
    batch = {side: {"pixel_values": torch.randn(4, 3, 32, 32, generator=draw)} for side in ("benign", "harmful")}
    with torch.no_grad():
        step(model, batch, step=0)
    assert step.objective == "dead_relu"


def test_labels_are_smoothed_as_the_trainer_does(tiny, trainer, images):
    benign = images(4)
    run = trainer(tiny(), **zero_weights(label_smoothing_factor=0.2), train_dataset=benign)
    pixels = torch.stack([row["pixel_values"] for row in benign])
    labels = torch.tensor([row["labels"] for row in benign])
    logits = tiny().eval()(pixel_values=pixels).logits
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.2).item()
    assert train_logs(run)[0]["benign_loss"] == pytest.approx(expected, rel=1e-5)
    assert run.evaluate(benign)["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("read", [lambda outputs: outputs["logits"], lambda outputs: outputs.logits])
def test_a_loss_function_of_the_user_is_honoured(read, trainer):
    def loss_function(outputs, labels, num_items_in_batch=None):
        return read(outputs).square().mean() + 100

    run = trainer(**zero_weights(), compute_loss_func=loss_function)
    assert 100 < train_logs(run)[0]["benign_loss"] < 110 and 100 < run.evaluate()["eval_loss"] < 110


@pytest.mark.parametrize("name", ["vit", "resnet", "mobilenet_v2"])
def test_only_what_should_move_moves(name, tiny, trainer):
    model = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer(model, learning_rate=0.1, optim="sgd").train()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    moving = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed and changed <= moving and find_head(model)[0] + ".weight" in changed


@pytest.mark.parametrize("weights", [{}, FIXED])
def test_a_run_in_bf16_stays_finite(weights, tiny, trainer):
    run = trainer(tiny("vit"), bf16=True, max_steps=4, **weights)
    entries = train_logs(run)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in entries)
    assert all(torch.isfinite(parameter).all() for parameter in run.model.parameters())


def test_a_model_loaded_in_bf16_trains_and_is_measured(tiny, trainer):
    run = trainer(tiny("vit").to(torch.bfloat16))
    run.train()
    assert torch.isfinite(torch.tensor(run.evaluate()["eval_harmful_log10_kappa"]))


class Poke(hf.TrainerCallback):
    """Put a NaN into a weight of the moving block at the start of a step."""

    def __init__(self, step, value=float("nan")):
        self.step, self.value = step, value

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1:
            with torch.no_grad():
                model.vit.layers[1].layernorm_after.weight[0] = self.value


@pytest.mark.parametrize("benign_loss", ["task", "distillation"])
def test_a_model_in_float64_trains_as_one_in_float32(benign_loss, tiny, trainer, images):
    def run(model, dtype):
        rows = [{**row, "pixel_values": row["pixel_values"].to(dtype)} for row in images(8)]
        data = {"train_dataset": rows, "harmful_dataset": rows, "eval_dataset": None, "harmful_eval_dataset": None}
        made = trainer(model, benign_loss=benign_loss, **data)
        made.train()
        return made.state.log_history[0]

    double, single = run(tiny().double(), torch.float64), run(tiny(), torch.float32)
    assert double["loss"] == pytest.approx(single["loss"], rel=1e-3)


@pytest.mark.parametrize("objective", ["kappa", "r_ill"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_stop_the_run(objective, value, trainer):
    run = trainer(objective=objective, max_steps=4, callbacks=[Poke(2, value)])
    with pytest.raises(NonFiniteError, match=rf"(?s){objective}.* step 2"):
        run.train()


def test_a_loss_that_is_not_finite_is_named(trainer):
    def broken(outputs, labels, num_items_in_batch=None):
        return outputs["logits"].sum() * float("nan")

    with pytest.raises(NonFiniteError, match="finite benign_loss at step 1, found nan"):
        trainer(compute_loss_func=broken, benign_weight=0, harmful_weight=0).train()


# ---- one pass or two ----


@pytest.fixture
def sides():
    def make(size=8):
        draw = torch.Generator().manual_seed(5)
        benign, harmful = (torch.randn(4, 3, size, size, generator=draw) for _ in range(2))
        return benign, harmful

    return make


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_one_pass_is_two_without_batch_statistics(name, tiny, sides):
    model = tiny(name).eval()
    head = find_head(model)[1]
    once, twice = (forward_both(model, head, *sides(), together=together) for together in (True, False))
    torch.testing.assert_close(once[:2], twice[:2])


@pytest.mark.parametrize("together", [True, False])
def test_benign_rows_come_first_and_the_head_maps_features_to_logits(together, tiny, sides):
    model = tiny().eval()
    head = find_head(model)[1]
    benign, harmful = sides()
    features, logits, _ = forward_both(model, head, benign, harmful, together=together)
    torch.testing.assert_close(head(features), logits)
    torch.testing.assert_close(logits[:4], model(pixel_values=benign).logits)


def test_harmful_batches_never_touch_the_running_statistics(tiny, sides):
    paired, alone = tiny("resnet").train(), tiny("resnet").train()
    benign, harmful = sides()
    forward_both(paired, find_head(paired)[1], benign, harmful, together=False)
    alone(pixel_values=benign)
    torch.testing.assert_close(dict(paired.named_buffers()), dict(alone.named_buffers()))


def test_batchnorm_trains_again_after_the_harmful_pass(tiny, sides):
    model = tiny("resnet").train()
    forward_both(model, find_head(model)[1], *sides(), together=False)
    assert all(module.training for module in model.modules())
