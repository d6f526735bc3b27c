"""A step's loss, weights and gradients are what they are said to be."""

import pytest
import torch
import transformers as hf
from torch import nn

from hf_immunize.errors import DataError, NonFiniteError
from hf_immunize.training.arguments import Method
from hf_immunize.training.step import ImmunizationStep, forward_both
from hf_immunize.vision.head import find_head
from hf_immunize.vision.scope import modules_in_eval, select_trainable


FIXED = {"benign_weight": 0.5, "harmful_weight": 2.0}


def train_logs(run):
    run.train()
    return [entry for entry in run.state.log_history if "loss" in entry]


def zero_weights(**options):
    return {"benign_weight": 0.0, "harmful_weight": 0.0, "learning_rate": 0.0, "max_steps": 1} | options


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


def test_harmful_batches_never_touch_the_running_statistics_and_modes_come_back(tiny, sides):
    paired, alone = tiny("resnet").train(), tiny("resnet").train()
    forward_both(paired, find_head(paired)[1], *sides, together=False)
    alone(pixel_values=sides[0])
    torch.testing.assert_close(dict(paired.named_buffers()), dict(alone.named_buffers()))
    assert all(module.training for module in paired.modules())


# ---- the log ----


@pytest.mark.parametrize(
    ("objective", "there", "absent"),
    [("kappa", {"r_well", "r_ill", "benign_weight"}, set()), ("r_ill", {"r_ill"}, {"r_well", "benign_weight"})],
)
def test_every_term_and_weight_is_logged(objective, there, absent, trainer):
    for entry in train_logs(trainer(objective=objective)):
        assert there | {"loss", "benign_loss", "harmful_weight"} <= set(entry) and not absent & set(entry)


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


def test_the_logged_loss_does_not_depend_on_accumulation(trainer):
    whole = train_logs(trainer(**zero_weights(per_device_train_batch_size=16)))[0]
    parts = train_logs(trainer(**zero_weights(per_device_train_batch_size=4, gradient_accumulation_steps=4)))[0]
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)


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


def test_a_batch_without_harmful_images_is_named(tiny):
    model = tiny()
    with pytest.raises(DataError, match="none that are harmful"):
        ImmunizationStep(model)(model, {"benign": {"pixel_values": torch.zeros(2, 3, 8, 8)}}, step=0)


def test_a_loss_without_gradients_does_not_change_the_objective(tiny):
    model = tiny("resnet")
    moving = select_trainable(model, "last_stage")
    step = ImmunizationStep(model, Method(benign_weight=0.1, harmful_weight=0.1), moving=moving)
    draw = torch.Generator().manual_seed(0)
    batch = {side: {"pixel_values": torch.randn(4, 3, 32, 32, generator=draw)} for side in ("benign", "harmful")}
    with torch.no_grad():
        step(model, batch, step=0)
    assert step.objective == "dead_relu"


# ---- the task's loss ----


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


# ---- precision, and what is not finite ----


@pytest.mark.parametrize("weights", [{}, FIXED])
def test_a_run_in_bf16_stays_finite(weights, trainer):
    run = trainer(bf16=True, max_steps=4, **weights)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in train_logs(run))
    assert all(torch.isfinite(parameter).all() for parameter in run.model.parameters())


@pytest.mark.parametrize("benign_loss", ["task", "distillation"])
def test_a_model_in_float64_trains_as_one_in_float32(benign_loss, tiny, trainer, images):
    def run(model, dtype):
        rows = [{**row, "pixel_values": row["pixel_values"].to(dtype)} for row in images(8)]
        data = {"train_dataset": rows, "harmful_dataset": rows, "eval_dataset": None, "harmful_eval_dataset": None}
        return train_logs(trainer(model, benign_loss=benign_loss, **data))[0]

    double, single = run(tiny().double(), torch.float64), run(tiny(), torch.float32)
    assert double["loss"] == pytest.approx(single["loss"], rel=1e-3)


class Poke(hf.TrainerCallback):
    """Put a value into a weight of the trainable block at the start of the second step."""

    def __init__(self, value):
        self.value = value

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.vit.layers[1].layernorm_after.weight.data[0] = self.value


@pytest.mark.parametrize("objective", ["kappa", "r_ill"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_stop_the_run(objective, value, trainer):
    with pytest.raises(NonFiniteError, match=rf"(?s){objective}.* step 2"):
        trainer(objective=objective, max_steps=4, callbacks=[Poke(value)]).train()


def test_a_loss_that_is_not_finite_is_named(trainer):
    def broken(outputs, labels, num_items_in_batch=None):
        return outputs["logits"].sum() * float("nan")

    with pytest.raises(NonFiniteError, match="finite benign_loss at step 1, found nan"):
        trainer(compute_loss_func=broken, benign_weight=0, harmful_weight=0).train()
