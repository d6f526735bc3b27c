"""What a user of the Trainer types works as it does there."""

import datasets
import pytest
import torch

from hf_immunize.errors import ArgumentError, DataError, NonFiniteError
from hf_immunize.training.trainer import ImmunizationTrainer


EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


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


class GoesPast(ImmunizationTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs["benign"]).loss


class OwnStep(ImmunizationTrainer):
    first = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step < self.first:
            return super().training_step(model, inputs, num_items_in_batch)
        loss = model(**inputs["benign"]).loss
        self.accelerator.backward(loss)
        return loss.detach()


class OwnLaterStep(OwnStep):
    first = 1


class Adds(ImmunizationTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return (2 * loss, outputs) if return_outputs else 2 * loss


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (PlainLoader, "pixel_values"),
        (OwnSampler, "PairedSampler"),
        (GoesPast, "GoesPast"),
        (OwnStep, "OwnStep"),
        (OwnLaterStep, "OwnLaterStep"),
    ],
)
def test_a_subclass_that_would_train_without_the_method_is_refused(kind, found, trainer):
    with pytest.raises((ArgumentError, DataError), match=found):
        trainer(kind=kind).train()


def test_a_subclass_may_add_to_the_loss(trainer):
    options = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    runs = [finished(trainer(kind=kind, **options)) for kind in (ImmunizationTrainer, Adds)]
    losses = [next(entry["loss"] for entry in run.state.log_history if "loss" in entry) for run in runs]
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


# ---- evaluation ----


def test_a_collator_of_ones_own_may_leave_the_labels_out(trainer):
    def collate(items):
        return pixels_alone(items) | (
            {"labels": torch.tensor([item["labels"] for item in items])} if "labels" in items[0] else {}
        )

    metrics = trainer(eval_dataset=unlabelled(24, 3), data_collator=collate).evaluate()
    assert "eval_rir" in metrics and "eval_loss" not in metrics and "eval_accuracy" not in metrics


def test_the_best_model_is_chosen_by_rir_of_one_of_several_sets(trainer, images):
    sets = {"a": images(24, 3), "b": images(20, 5)}
    options = {"max_steps": 3, "learning_rate": 0.05, "load_best_model_at_end": True, **EVERY_STEP}
    run = finished(trainer(eval_dataset=sets, metric_for_best_model="eval_b_log10_rir", **options))
    seen = [entry["eval_b_log10_rir"] for entry in run.state.log_history if "eval_b_log10_rir" in entry]
    assert len(seen) == 3 and run.state.best_metric == max(seen)
    assert run.evaluate()["eval_b_log10_rir"] == pytest.approx(max(seen), abs=1e-6)


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


def test_rows_come_in_their_order_if_asked_for(trainer):
    sampler = trainer(train_sampling_strategy="sequential")._get_train_sampler()
    assert [draw[0] for draw in sampler] == list(range(16))


# ---- streamed data ----


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_run_on_a_streamed_harmful_set_is_resumed_bit_for_bit(shuffled, trainer, tmp_path):
    """Four steps are an epoch, in which the stream of ten rows is read once and a half."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    streams = [unlabelled(10, 2).to_iterable_dataset() for _ in range(2)]
    first, second = (each.shuffle(seed=0, buffer_size=4) if shuffled else each for each in streams)
    whole = finished(trainer(harmful_dataset=first, **options))
    resumed = trainer(harmful_dataset=second, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def named(count, seed):
    """Images with classes in another order than the model's outputs."""
    columns = {"label": datasets.ClassLabel(names=["b", "other", "a"])}
    rows = unlabelled(count, seed).add_column("label", [0, 2] * (count // 2))
    return rows.cast(datasets.Features({**rows.features, **columns}))


def streamed(sets):
    return {name: data.to_iterable_dataset() for name, data in sets.items()}


@pytest.mark.parametrize("own_collator", [False, True])
def test_with_all_sets_streamed_a_run_is_that_on_stored_ones_and_is_resumed(own_collator, tiny, trainer, tmp_path):
    sets = {"train_dataset": named(48, 1), "harmful_dataset": named(20, 2)}
    measured = {"eval_dataset": named(20, 3), "harmful_eval_dataset": named(24, 4)}
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    options |= {"benign_loss": "distillation"} if own_collator else {"benign_loss": "both"}
    options |= {"data_collator": pixels_alone} if own_collator else {}

    def run(given):
        named_model = tiny(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
        return trainer(named_model, **given, **options)

    stored = finished(run({**sets, **measured, "train_sampling_strategy": "sequential"}))
    whole = finished(run(streamed(sets | measured)))
    resumed = run(streamed(sets | measured))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for other in (stored, resumed):
        torch.testing.assert_close(other.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    found, expected = whole.evaluate(), stored.evaluate()
    shared = [name for name in found if name.endswith(("loss", "accuracy", "kappa", "rir"))]
    assert "eval_rir" in shared and ("eval_accuracy" in shared) != own_collator
    assert {name: found[name] for name in shared} == pytest.approx({name: expected[name] for name in shared}, rel=1e-6)
    assert resumed.evaluate()["eval_rir"] == found["eval_rir"]


def test_of_a_streamed_set_a_class_without_an_output_is_named_when_it_comes(tiny, trainer):
    rows = named(8, 1).map(lambda row, number: {"label": 1 if number == 5 else 0}, with_indices=True)
    model = tiny(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(DataError, match=r"label 1 .*position 5 of the stream"):
        trainer(model, eval_dataset=rows.to_iterable_dataset()).evaluate()
