"""What a user of the Trainer types works as it does there."""

import datasets
import pytest
import torch
import transformers as hf
from torch import nn

from hf_immunize.errors import ArgumentError, DataError, NonFiniteError
from hf_immunize.training.arguments import ImmunizationArguments, Method
from hf_immunize.training.trainer import ImmunizationTrainer


EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


# As of transformers 5.2x the second name is to replace the first.
CHECKPOINTING = [
    name
    for name in ("gradient_checkpointing", "activation_checkpointing")
    if name in ImmunizationArguments.__dataclass_fields__
]


def same(model, other):
    expected = other.state_dict()
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def pixels_alone(items):
    return {"pixel_values": torch.stack([torch.as_tensor(item["pixel_values"]) for item in items])}


def finished(run):
    run.train()
    return run


def unlabelled(count, seed, size=8):
    pixels = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return datasets.Dataset.from_dict({"pixel_values": pixels.tolist()})


# ---- subclasses ----


class PlainLoader(ImmunizationTrainer):
    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset.benign, 4, collate_fn=self.data_collator)


class OwnSampler(ImmunizationTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.RandomSampler(self.train_dataset)


class PopsLabels(ImmunizationTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return nn.functional.cross_entropy(model(**inputs).logits, labels)


class UnpacksInputs(ImmunizationTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss


class GoesPast(ImmunizationTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs["benign"]).loss


class OwnStep(ImmunizationTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step < self.args.weight_warmup_steps:
            return super().training_step(model, inputs, num_items_in_batch)
        loss = model(**inputs["benign"]).loss
        self.accelerator.backward(loss)
        return loss.detach()


class Adds(ImmunizationTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return (2 * loss, outputs) if return_outputs else 2 * loss


def of(kind, images, arguments, tiny, **options):
    sets = {"train_dataset": images(16, 1), "harmful_dataset": images(16, 2, labels=False)}
    return kind(tiny(), arguments(**options), **sets, eval_dataset=images(8, 3))


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (PlainLoader, "pixel_values"),
        (OwnSampler, "PairedSampler"),
        (PopsLabels, "PopsLabels.compute_loss"),
        (UnpacksInputs, "UnpacksInputs.compute_loss"),
        (GoesPast, "GoesPast.compute_loss"),
        (OwnStep, "OwnStep.training_step"),
    ],
)
def test_a_subclass_that_would_train_without_the_method_is_refused(kind, found, images, arguments, tiny):
    for steps in (0, 1) if kind is OwnStep else (0,):  # from the first step on, and from a later one
        with pytest.raises((ArgumentError, DataError), match=found):
            of(kind, images, arguments, tiny, weight_warmup_steps=steps).train()


def test_a_subclass_may_add_to_the_loss(images, arguments, tiny):
    losses = []
    for kind in (ImmunizationTrainer, Adds):
        run = of(kind, images, arguments, tiny, max_steps=1, eval_strategy="steps", eval_steps=1)
        run.train()
        losses.append(next(entry["loss"] for entry in run.state.log_history if "loss" in entry))
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-4)


# ---- what is not finite ----


@pytest.mark.parametrize("side", ["train", "harmful", "distillation", "eval", "harmful_eval"])
def test_the_side_that_brings_nan_in_is_named(side, trainer, images):
    rows = images(16, 9)
    for row in rows:
        row["pixel_values"][0, 0, 0] = float("nan")
    sets = {"distillation_dataset": images(16, 5), f"{side}_dataset": rows}
    words = {"train": "benign images", "eval": "benign evaluation", "harmful_eval": "harmful evaluation"}
    with pytest.raises(NonFiniteError) as error:
        trainer(benign_loss="distillation", **sets).train()
    assert words.get(side, f"{side} images") in str(error.value)


def test_what_to_report_to_must_be_installed(trainer, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(ArgumentError, match="report_to='wandb'"):
        trainer(report_to="wandb")


def test_the_defaults_of_the_options_are_those_of_the_method(tmp_path):
    assert Method.of(ImmunizationArguments(str(tmp_path), report_to="none", use_cpu=True)) == Method()


# ---- evaluation ----


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"eval_dataset": unlabelled(8, 3)}, r"In eval_dataset: .*none among 'pixel_values'.*needed for eval_loss"),
        ({"eval_dataset": {"b": unlabelled(8, 3)}}, "In eval_dataset b:"),
        ({"train_dataset": unlabelled(8, 1), "benign_loss": "task"}, r"In train_dataset: .*not by 'distillation'"),
    ],
)
def test_a_set_without_the_labels_that_it_needs_is_refused_with_the_reason(options, found, trainer):
    with pytest.raises(DataError, match=found):
        trainer(**options)


def test_a_collator_of_ones_own_may_leave_the_labels_out(trainer):
    def collate(items):
        return pixels_alone(items) | (
            {"labels": torch.tensor([item["labels"] for item in items])} if "labels" in items[0] else {}
        )

    metrics = trainer(eval_dataset=unlabelled(24, 3), data_collator=collate).evaluate()
    assert "eval_rir" in metrics and "eval_loss" not in metrics and "eval_accuracy" not in metrics


def test_a_best_model_by_no_metric_is_refused(arguments):
    # eval_loss, which the Trainer takes, is least before anything is immunized.
    with pytest.raises(ArgumentError, match="metric_for_best_model="):
        arguments(load_best_model_at_end=True, **EVERY_STEP)


@pytest.mark.parametrize("metric", ["eval_log10_rir", "rir", "eval_harmful_log10_kappa"])
def test_a_best_model_by_a_metric_that_is_not_measured_is_refused(metric, trainer):
    with pytest.raises(DataError, match=f"harmful_eval_dataset= with metric_for_best_model='{metric}'"):
        trainer(harmful_eval_dataset=None, metric_for_best_model=metric)


def test_the_best_model_is_chosen_by_rir_of_one_of_several_sets(trainer, images):
    sets = {"a": images(24, 3), "b": images(20, 5)}
    options = {"max_steps": 3, "learning_rate": 0.05, "load_best_model_at_end": True, **EVERY_STEP}
    run = finished(trainer(eval_dataset=sets, metric_for_best_model="eval_b_log10_rir", **options))
    seen = [entry["eval_b_log10_rir"] for entry in run.state.log_history if "eval_b_log10_rir" in entry]
    assert len(seen) == 3 and run.state.best_metric == max(seen)
    assert run.evaluate()["eval_b_log10_rir"] == pytest.approx(max(seen), abs=1e-6)


@pytest.mark.parametrize("metric", ["benign_log10_kappa", "eval_a_benign_ratio", "harmful_effective_rank", "rir"])
def test_of_some_metrics_less_is_better(metric, arguments):
    assert arguments(metric_for_best_model=metric).greater_is_better is (metric == "rir")
    assert arguments(metric_for_best_model=metric, greater_is_better=True).greater_is_better is True


def test_tensorboard_and_callbacks_of_the_user_receive_rir_and_the_terms(trainer, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Seen(hf.TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.append(metrics["eval_rir"])

    seen = []
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run = finished(trainer(report_to="tensorboard", callbacks=[Seen()], **EVERY_STEP))
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert {"eval/rir", "eval/log10_rir", "eval/accuracy", "train/loss", "train/r_ill"} <= set(board.Tags()["scalars"])
    logged = [entry["eval_rir"] for entry in run.state.log_history if "eval_rir" in entry]
    assert seen == logged and [event.value for event in board.Scalars("eval/rir")] == pytest.approx(logged)


# ---- training ----


def test_an_optimizer_and_a_schedule_of_ones_own_are_used(tiny, trainer):
    model, start = tiny(), tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    run = finished(trainer(model, max_steps=3, optimizers=(optimizer, schedule)))
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.02, 0.01, 0.005])
    before = dict(start.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad


def test_rows_come_in_their_order_if_asked_for_but_not_by_their_length(trainer, arguments):
    sampler = trainer(train_sampling_strategy="sequential")._get_train_sampler()
    assert [draw[0] for draw in sampler] == list(range(16))
    with pytest.raises(ArgumentError, match=r"train_sampling_strategy=.*found 'group_by_length'"):
        arguments(train_sampling_strategy="group_by_length")


@pytest.mark.parametrize("benign_loss", ["task", "both"])
def test_the_benign_loss_has_smoothed_labels_and_misses_those_that_are_not_there(benign_loss, tiny, trainer, images):
    """Before the first step distillation is zero, so that both losses are the task's."""
    benign = images(4)
    options = {"label_smoothing_factor": 0.2, "benign_loss": benign_loss, "learning_rate": 0.0, "max_steps": 1}
    run = finished(trainer(tiny(), train_dataset=benign, **options))
    logits = tiny().eval()(pixel_values=torch.stack([row["pixel_values"] for row in benign])).logits
    labels = torch.tensor([row["labels"] for row in benign])
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.2).item()
    assert run.state.log_history[0]["benign_loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(DataError, match="Expected labels of the benign images"):
        trainer(benign_loss=benign_loss, data_collator=pixels_alone).train()


def test_each_training_of_a_model_from_a_function_starts_anew(tiny, trainer):
    run = trainer(model_init=lambda: tiny(), benign_loss="distillation", objective="concentration", benign_budget=0.05)
    weights = []
    for _ in range(2):
        run.train()
        weights.append(run.model)
    assert weights[0] is not weights[1] and same(*weights)


@pytest.mark.parametrize("name", CHECKPOINTING)
def test_checkpointing_of_activations_changes_nothing_and_the_reentrant_kind_is_refused(name, tiny, trainer):
    plain, checkpointed = (finished(trainer(tiny(), **{name: asked})) for asked in (False, True))
    assert any(getattr(module, "gradient_checkpointing", False) for module in checkpointed.model.modules())
    for one, other in zip(plain.model.parameters(), checkpointed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    with pytest.raises(ArgumentError, match="use_reentrant=False"):
        trainer(**{name: True, f"{name}_kwargs": {"use_reentrant": True}})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 needs a CUDA GPU")
def test_a_run_in_fp16_stays_finite(trainer):
    run = finished(trainer(fp16=True, use_cpu=False))
    assert all(torch.isfinite(parameter).all() for parameter in run.model.parameters())
    assert "eval_rir" in run.evaluate()


def test_it_is_said_that_fp16_does_nothing_on_a_cpu(trainer, caplog):
    trainer(fp16=True)
    assert "full precision" in " ".join(record.getMessage() for record in caplog.records)


# ---- streamed data ----


def streamed(seed=None):
    stream = unlabelled(10, 2).to_iterable_dataset()
    return stream if seed is None else stream.shuffle(seed=seed, buffer_size=4)


@pytest.mark.parametrize("shuffled", [None, 0])
def test_a_run_on_a_streamed_harmful_set_is_resumed_bit_for_bit(shuffled, trainer, tmp_path):
    """Four steps are an epoch, in which the stream of ten rows is read once and a half."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = finished(trainer(harmful_dataset=streamed(shuffled), **options))
    resumed = trainer(harmful_dataset=streamed(shuffled), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.state.global_step == 6 and same(resumed.model, whole.model)


def test_a_streamed_set_is_collated_in_its_order_by_a_collator_of_ones_own(trainer):
    """A collator of one's own gets the rows of the stream, in turn."""
    seen = []

    def spy(items):
        seen.append([float(torch.as_tensor(item["pixel_values"]).sum()) for item in items])
        return pixels_alone(items)

    sets = {"train_dataset": unlabelled(4, 1), "eval_dataset": None, "harmful_eval_dataset": None}
    finished(trainer(harmful_dataset=streamed(), data_collator=spy, benign_loss="distillation", max_steps=3, **sets))
    harmful = [value for batch in seen[1::2] for value in batch]
    expected = [float(torch.as_tensor(row["pixel_values"]).sum()) for row in unlabelled(10, 2)]
    assert harmful[:10] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset", "harmful_eval_dataset"])
def test_a_stream_where_rows_are_looked_up_is_refused_by_name(name, trainer):
    with pytest.raises(DataError, match=f"In {name}: .*without streaming"):
        trainer(**{name: streamed()})
