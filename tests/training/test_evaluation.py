"""Evaluations report κ of both tasks and RIR, of all images, and of nothing else."""

import copy
import math

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import EvalPrediction

from hf_immunize.errors import ImageDecodeError
from hf_immunize.features.extract import Measurement, load_measurements, save_measurements, spectral_metrics
from hf_immunize.spectra.conditioning import feature_conditioning
from hf_immunize.spectra.ratio import relative_immunization_ratio
from hf_immunize.training.evaluation import accuracy, own_rows
from hf_immunize.vision.head import penultimate_features


@torch.no_grad()
def features(model, rows):
    model.eval()
    batches = torch.stack([row["pixel_values"] for row in rows]).split(4)
    return torch.cat([penultimate_features(model, batch) for batch in batches])


def measured(tensor, pixels=None):
    measurement = Measurement()
    measurement.update(tensor, torch.ones(len(tensor), 3, 2, 2) if pixels is None else pixels)
    return measurement


SIDES = [f"{side}_{what}" for side in ("benign", "harmful") for what in ("log10_kappa", "rank", "effective_rank")]
RATIOS = ["rir", "log10_rir", "harmful_ratio", "benign_ratio", "rir_is_lower_bound", "rir_is_upper_bound"]
PLAIN = ["loss", "accuracy", "benign_loss", "benign_accuracy"]
NAMES = {f"eval_{name}" for name in [*SIDES, *RATIOS, *PLAIN]}


def test_the_names_stand_in_the_metrics_and_in_the_log(trainer):
    run = trainer(eval_strategy="steps", eval_steps=1)
    run.train()
    logged = [entry for entry in run.state.log_history if "eval_loss" in entry]
    assert len(logged) == 2 and all(set(entry) >= NAMES for entry in logged) and set(run.evaluate()) >= NAMES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_measured_trained_and_saved_in_float32(dtype, tiny, trainer, images, tmp_path):
    half = tiny().to(dtype)
    wide = copy.deepcopy(half).float()
    run, other = trainer(half), trainer(wide)
    for training in (False, True):
        if training:
            run.train()
            other.train()
        # Of features with the rounding of half precision, log10 κ would be smaller by orders of magnitude.
        names = [f"eval_{name}" for name in (*SIDES, "loss")]
        found, expected = ({name: metrics[name] for name in names} for metrics in (run.evaluate(), other.evaluate()))
        assert found == pytest.approx(expected, rel=1e-6)
    run.save_model(str(tmp_path / "model"))
    saved = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert saved.dtype == torch.float32
    reloaded = feature_conditioning(features(saved, images(24, 4)))
    assert reloaded.log10_kappa == pytest.approx(found["eval_harmful_log10_kappa"], abs=1e-5)


def test_benign_names_are_other_names_of_the_trainers_own(trainer):
    metrics = trainer().evaluate()
    assert metrics["eval_benign_loss"] == metrics["eval_loss"]
    assert metrics["eval_benign_accuracy"] == metrics["eval_accuracy"]


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_rir_is_that_of_the_starting_and_the_final_features(name, tiny, trainer, images):
    run = trainer(tiny(name), learning_rate=1e-2 if name == "vit" else 2e-3)
    benign, harmful = images(24, 3), images(24, 4)
    before = [features(tiny(name), rows) for rows in (benign, harmful)]
    run.train()
    metrics = run.evaluate()
    after = [features(run.model, rows) for rows in (benign, harmful)]
    expected = relative_immunization_ratio(
        benign=after[0], benign_reference=before[0], harmful=after[1], harmful_reference=before[1]
    )
    assert expected.bound is None and abs(expected.log10_rir) > 1e-3
    assert metrics["eval_log10_rir"] == pytest.approx(expected.log10_rir, abs=1e-4)
    assert metrics["eval_rir"] == pytest.approx(expected.rir, rel=1e-3)
    assert metrics["eval_harmful_ratio"] == pytest.approx(expected.harmful_ratio, rel=1e-3)
    assert metrics["eval_benign_ratio"] == pytest.approx(expected.benign_ratio, rel=1e-3)


def test_kappa_and_rank_are_those_of_the_features(trainer, images):
    run = trainer()
    metrics = run.evaluate()
    for side, seed in (("benign", 3), ("harmful", 4)):
        expected = feature_conditioning(features(run.model, images(24, seed)))
        assert metrics[f"eval_{side}_log10_kappa"] == pytest.approx(expected.log10_kappa, abs=1e-5)
        assert metrics[f"eval_{side}_rank"] == expected.rank


@pytest.mark.parametrize("count", [3, 7, 9])
def test_an_evaluation_is_of_all_images(count, trainer, images):
    rows = images(count, 3)
    run = trainer(eval_dataset=rows, harmful_eval_dataset=images(count, 4))
    metrics = run.evaluate()
    expected = feature_conditioning(features(run.model, rows))
    assert metrics["eval_benign_log10_kappa"] == pytest.approx(expected.log10_kappa, abs=1e-5)
    logits = run.model(pixel_values=torch.stack([row["pixel_values"] for row in rows])).logits
    hits = [int(row.argmax()) == label["labels"] for row, label in zip(logits, rows, strict=True)]
    assert metrics["eval_accuracy"] == pytest.approx(sum(hits) / count)


def test_rir_is_one_before_training(trainer):
    metrics = trainer().evaluate()
    assert metrics["eval_rir"] == 1.0 and metrics["eval_log10_rir"] == 0.0


def test_rir_is_one_after_training_that_moves_nothing(trainer):
    run = trainer(learning_rate=0.0)
    run.train()
    assert run.evaluate()["eval_rir"] == 1.0


def test_other_data_have_kappa_without_rir(trainer, images):
    run = trainer()
    run.train()
    metrics = run.evaluate(images(24, 9))
    assert "eval_benign_log10_kappa" in metrics and "eval_rir" not in metrics


def test_other_data_seen_before_training_take_nothing_from_rir(trainer, images):
    run = trainer()
    run.evaluate(images(24, 9))
    run.train()
    assert "eval_rir" in run.evaluate()


def test_another_prefix_has_the_same_rir(trainer):
    run = trainer()
    run.train()
    metrics, final = run.evaluate(), run.evaluate(metric_key_prefix="final")
    assert final["final_rir"] == metrics["eval_rir"] != 1.0


def test_another_prefix_has_the_rir_of_each_of_several_sets(trainer, images):
    run = trainer(eval_dataset={"a": images(24, 3), "b": images(20, 5)})
    run.train()
    metrics, final = run.evaluate(), run.evaluate(metric_key_prefix="final")
    assert [final[f"final_{name}_rir"] for name in "ab"] == [metrics[f"eval_{name}_rir"] for name in "ab"]


def test_one_of_several_sets_evaluated_by_name_has_its_rir(trainer, images):
    run = trainer(eval_dataset={"a": images(24, 3), "b": images(20, 5)})
    run.train()
    assert run.evaluate("b")["eval_rir"] == run.evaluate()["eval_b_rir"]


def test_without_harmful_data_there_is_kappa_of_the_benign(trainer):
    run = trainer(harmful_eval_dataset=None)
    run.train()
    metrics = run.evaluate()
    assert "eval_benign_log10_kappa" in metrics
    assert not [name for name in metrics if "harmful" in name or "rir" in name]


def test_several_benign_sets_have_a_rir_each(trainer, images):
    run = trainer(eval_dataset={"a": images(24, 3), "b": images(20, 5)})
    run.train()
    metrics = run.evaluate()
    assert {"eval_a_rir", "eval_b_rir", "eval_a_benign_accuracy", "eval_b_accuracy"} <= set(metrics)
    assert metrics["eval_a_harmful_log10_kappa"] == metrics["eval_b_harmful_log10_kappa"]


@pytest.mark.parametrize("sets", [lambda rows: rows, lambda rows: {"a": rows}])
def test_persistent_workers_do_not_swap_the_data(sets, trainer, images):
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_pin_memory": False}
    options = {"eval_dataset": sets(images(24, 3)), "max_steps": 1}
    plain, persistent = trainer(**options), trainer(**options, **workers)
    for run in (plain, persistent):
        run.train()
    expected, found = plain.evaluate(), persistent.evaluate()
    names = [name for name in expected if "kappa" in name or "rir" in name]
    assert {name: found.get(name) for name in names} == pytest.approx({name: expected[name] for name in names})


def test_rir_chooses_the_best_model(trainer):
    run = trainer(
        max_steps=3,
        learning_rate=0.05,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_log10_rir",
        greater_is_better=True,
    )
    run.train()
    seen = [entry["eval_log10_rir"] for entry in run.state.log_history if "eval_log10_rir" in entry]
    assert run.state.best_metric == max(seen)
    assert run.evaluate()["eval_log10_rir"] == pytest.approx(max(seen), abs=1e-6)


def test_lost_harmful_rank_is_flagged():
    start = torch.randn(20, 4, dtype=torch.float64)
    lost = start.clone()
    lost[:, 0] = 0
    metrics = spectral_metrics(measured(start), measured(start), measured(lost), measured(start))
    assert (metrics["rir_is_lower_bound"], metrics["rir_is_upper_bound"]) == (1.0, 0.0)
    assert metrics["harmful_rank"] == 3.0 and metrics["rir"] > 1e10


def test_rank_lost_on_both_sides_makes_no_statement():
    start = torch.randn(20, 4, dtype=torch.float64)
    lost = start * torch.tensor([0.0, 1, 1, 1], dtype=torch.float64)
    metrics = spectral_metrics(measured(lost), measured(start), measured(lost), measured(start))
    assert math.isnan(metrics["rir"])
    assert (metrics["rir_is_lower_bound"], metrics["rir_is_upper_bound"]) == (1.0, 1.0)


def test_a_reference_of_other_images_is_left_aside():
    z, others = torch.randn(20, 4), torch.rand(20, 3, 2, 2)
    assert "rir" not in spectral_metrics(measured(z), measured(z, others), measured(z), measured(z))


@pytest.mark.parametrize("change", ["one image", "one twice", "mirrored", "channels", "brightness"])
def test_other_images_are_known(change):
    pixels = torch.rand(1000, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    others = pixels.clone()
    if change == "one image":
        others[7] = pixels[7].flip(0) + 0.1
    elif change == "one twice":
        others[7] = pixels[8]
    elif change == "brightness":  # shifted from one image to another
        others[:2] *= torch.tensor([1.1, 0.9]).sqrt()[:, None, None, None]
    else:
        others = pixels.flip(3 if change == "mirrored" else 1)
    z = torch.randn(1000, 4)
    assert not measured(z, pixels).same_data(measured(z, others))


def test_neither_order_nor_processes_of_the_images_matter():
    z, pixels = torch.randn(60, 4), torch.randn(60, 3, 2, 2)
    whole, dealt = measured(z, pixels), Measurement()
    for part in (slice(1, None, 2), slice(0, None, 2)):
        dealt.merge(measured(z[part], pixels[part]))
    assert dealt.same_data(whole)
    found, expected = dealt.factor.conditioning(), whole.factor.conditioning()
    assert found.log_kappa == pytest.approx(expected.log_kappa, rel=1e-12) and found.rank == expected.rank


def test_the_size_of_the_batches_does_not_matter():
    z, pixels = torch.randn(6, 4), torch.randn(6, 3, 2, 2)
    parts = Measurement()
    for rows in (slice(0, 4), slice(4, 6)):
        parts.update(z[rows], pixels[rows])
    assert parts.same_data(measured(z, pixels))


def test_measurements_survive_a_file(tmp_path):
    before = {"eval": measured(torch.randn(20, 4)), "eval_a/b": measured(torch.randn(3, 4))}
    save_measurements(tmp_path / "state", before)
    after = load_measurements(tmp_path / "state")
    assert set(after) == set(before)
    for name, measurement in before.items():
        assert measurement.same_data(after[name])
        assert measurement.factor.conditioning() == after[name].factor.conditioning()


@pytest.mark.parametrize("labelled", [True, False])
def test_predict_works_and_measures_nothing(labelled, trainer, images):
    output = trainer().predict(images(7, labels=labelled))
    assert output.predictions.shape == (7, 2)
    assert ("test_loss" in output.metrics) == labelled
    assert not [name for name in output.metrics if "kappa" in name or "rir" in name]


def test_spectra_are_measured_outside_autocast(tiny, trainer):
    expected, found = trainer(tiny()).evaluate(), trainer(tiny(), bf16=True).evaluate()
    for side in ("benign", "harmful"):
        assert found[f"eval_{side}_log10_kappa"] == pytest.approx(expected[f"eval_{side}_log10_kappa"], abs=1e-5)
        assert found[f"eval_{side}_rank"] == expected[f"eval_{side}_rank"]


def test_spectra_are_measured_outside_autocast_after_training(tiny, trainer):
    run = trainer(tiny(), bf16=True)
    run.train()
    twin = tiny()
    twin.load_state_dict(run.model.state_dict())
    expected, found = trainer(twin).evaluate(), run.evaluate()
    for side in ("benign", "harmful"):
        assert found[f"eval_{side}_log10_kappa"] == pytest.approx(expected[f"eval_{side}_log10_kappa"], abs=1e-5)
    assert "eval_rir" in found


def test_an_undecodable_image_in_evaluation_names_its_row(trainer):
    stored = [{"bytes": b"no image", "path": None}]
    data = datasets.Dataset.from_dict(
        {"image": stored, "label": [0]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    processor = hf.ViTImageProcessor(size={"height": 8, "width": 8})
    with pytest.raises(ImageDecodeError, match="row 0 of eval_dataset"):
        trainer(eval_dataset=data, processing_class=processor).evaluate()


def test_metrics_of_the_user_replace_the_accuracy(trainer):
    metrics = trainer(compute_metrics=lambda prediction: {"mine": 3.0}).evaluate()
    assert metrics["eval_mine"] == 3.0 and "eval_accuracy" not in metrics and "eval_rir" in metrics


@pytest.mark.parametrize("extra", [False, True])
def test_accuracy_is_of_the_logits(extra):
    logits, labels = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]]), np.array([0, 1, 1])
    predictions = (logits, np.zeros((3, 9))) if extra else logits
    assert accuracy(EvalPrediction(predictions, labels)) == {"accuracy": pytest.approx(2 / 3)}


def test_spectra_are_measured_outside_autocast_when_evaluated_before_training(tiny, trainer):
    run = trainer(tiny(), bf16=True, learning_rate=0.0)
    run.evaluate()
    run.train()
    metrics = run.evaluate()
    assert metrics["eval_rir"] == 1.0
    expected = trainer(tiny()).evaluate()
    assert metrics["eval_benign_log10_kappa"] == pytest.approx(expected["eval_benign_log10_kappa"], abs=1e-5)


def test_the_accuracy_may_be_taken_batch_by_batch(trainer):
    whole, batches, lists = (
        trainer(**options).evaluate()["eval_accuracy"]
        for options in ({}, {"batch_eval_metrics": True}, {"eval_do_concat_batches": False})
    )
    assert whole == pytest.approx(batches) == pytest.approx(lists)


def test_the_accuracy_is_of_classes_where_logits_were_made_such(trainer):
    run = trainer()
    expected = run.evaluate()["eval_accuracy"]
    run.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
    assert run.evaluate()["eval_accuracy"] == expected > 0


def test_a_second_evaluation_batch_by_batch_begins_anew(trainer):
    run = trainer(batch_eval_metrics=True)
    assert run.evaluate()["eval_accuracy"] == run.evaluate()["eval_accuracy"]


def other_images_on_resuming(trainer, images, tmp_path, **options):
    """A run of three steps, evaluated after two on one set and after the third on another; both runs."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, **options}
    whole = trainer(eval_dataset=images(20, 7), **settings)
    whole.train()
    trainer(**settings).train()
    resumed = trainer(eval_dataset=images(20, 7), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    return whole, resumed


def test_a_reference_of_other_images_is_measured_again(trainer, images, tmp_path, tiny):
    """The checkpoint holds the starting weights, and the weights of the run are not touched."""
    whole, resumed = other_images_on_resuming(trainer, images, tmp_path, benign_loss="distillation")
    state = {name: value.clone() for name, value in resumed.model.state_dict().items()}
    assert resumed.evaluate()["eval_log10_rir"] == pytest.approx(whole.evaluate()["eval_log10_rir"], abs=1e-6)
    assert all(torch.equal(value, state[name]) for name, value in resumed.model.state_dict().items())


def test_it_is_said_where_a_reference_of_other_images_cannot_be_measured_again(trainer, images, tmp_path, caplog):
    hf.utils.logging.warning_once.cache_clear()  # another test may have had it said
    _, resumed = other_images_on_resuming(trainer, images, tmp_path)
    assert "eval_rir" not in resumed.evaluate()
    assert "images of eval_dataset are not those on which" in " ".join(r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 7, 11, 12, 13, 24])
def test_processes_keep_each_image_once(count, batch, processes):
    kept = []
    for rank in range(processes):
        whole = BatchSampler(SequentialSampler(range(count)), batch, drop_last=False)
        dealt = list(BatchSamplerShard(whole, processes, rank))
        last = own_rows(len(dealt[-1]), rank, remainder=count % (batch * processes))
        kept += [row for rows in [*dealt[:-1], dealt[-1][:last]] for row in rows]
    assert sorted(kept) == list(range(count))
