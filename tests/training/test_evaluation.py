"""Evaluations report κ of both tasks and RIR, of all images, and of nothing else."""

import copy

import pytest
import torch
import transformers as hf

from hf_immunize.hub.record import read_record
from hf_immunize.linear.time import probing_time
from hf_immunize.spectra.conditioning import feature_conditioning
from hf_immunize.spectra.ratio import relative_immunization_ratio
from hf_immunize.vision.head import penultimate_features


SIDES = [f"{side}_{what}" for side in ("benign", "harmful") for what in ("log10_kappa", "rank", "effective_rank")]
RATIOS = ["rir", "log10_rir", "harmful_ratio", "benign_ratio", "rir_is_lower_bound", "rir_is_upper_bound"]
PLAIN = ["loss", "accuracy", "benign_loss", "benign_accuracy"]
NAMES = {f"eval_{name}" for name in [*SIDES, *RATIOS, *PLAIN]}


@torch.no_grad()
def features(model, rows):
    model.eval()
    batches = torch.stack([row["pixel_values"] for row in rows]).split(4)
    return torch.cat([penultimate_features(model, batch) for batch in batches])


def spectral(metrics):
    return {name: value for name, value in metrics.items() if name.removeprefix("eval_") in SIDES}


# ---- the metrics ----


def test_the_names_stand_in_the_metrics_in_the_log_and_where_it_is_reported_to(trainer, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run = trainer(eval_strategy="steps", eval_steps=1, report_to="tensorboard")
    run.train()
    logged = [entry for entry in run.state.log_history if "eval_loss" in entry]
    for metrics in (*logged, run.evaluate()):
        assert set(metrics) >= NAMES and metrics["eval_benign_loss"] == metrics["eval_loss"]
        assert metrics["eval_benign_accuracy"] == metrics["eval_accuracy"]
    assert all(isinstance(value, int | float) for entry in run.state.log_history for value in entry.values())
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert {"eval/rir", "train/r_ill"} <= set(board.Tags()["scalars"])
    assert [event.value for event in board.Scalars("eval/rir")][:2] == pytest.approx([m["eval_rir"] for m in logged])


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
    for name in ("rir", "harmful_ratio", "benign_ratio"):
        assert metrics[f"eval_{name}"] == pytest.approx(getattr(expected, name), rel=1e-3)
    assert run.evaluate(metric_key_prefix="final")["final_rir"] == metrics["eval_rir"] != 1.0


@pytest.mark.parametrize("count", [3, 7, 9, 24])
def test_an_evaluation_is_of_all_images(count, trainer, images):
    rows, harmful = images(count, 3), images(count, 4)
    run = trainer(eval_dataset=rows, harmful_eval_dataset=harmful)
    metrics = run.evaluate()
    for side, of in (("benign", rows), ("harmful", harmful)):
        expected = feature_conditioning(features(run.model, of))
        assert metrics[f"eval_{side}_log10_kappa"] == pytest.approx(expected.log10_kappa, abs=1e-5)
        assert metrics[f"eval_{side}_rank"] == expected.rank
        if count > 3:
            time = probing_time(features(run.model, of), torch.tensor([row["labels"] for row in of]), fractions=(0.8,))
            assert metrics[f"eval_{side}_probing_steps"] == time.steps[0.8]
    logits = run.model(pixel_values=torch.stack([row["pixel_values"] for row in rows])).logits
    hits = [int(row.argmax()) == label["labels"] for row, label in zip(logits, rows, strict=True)]
    assert metrics["eval_accuracy"] == pytest.approx(sum(hits) / count)


def test_rir_is_one_before_training_and_after_training_at_a_rate_of_zero(trainer):
    run = trainer(learning_rate=0.0, bf16=True)
    metrics = run.evaluate()
    assert metrics["eval_rir"] == 1.0 and metrics["eval_log10_rir"] == 0.0
    run.train()
    assert run.evaluate()["eval_rir"] == 1.0


def test_other_data_have_kappa_without_rir_and_take_nothing_from_it(trainer, images):
    run = trainer()
    run.evaluate(images(24, 9))
    run.train()
    metrics = run.evaluate(images(24, 9))
    assert "eval_benign_log10_kappa" in metrics and "eval_rir" not in metrics
    assert "eval_rir" in run.evaluate()
    metrics = trainer(harmful_eval_dataset=None).evaluate()
    assert "eval_benign_log10_kappa" in metrics
    assert not [name for name in metrics if "harmful" in name or "rir" in name]


def test_several_benign_sets_have_a_rir_each_by_any_prefix_and_by_name(trainer, images):
    run = trainer(eval_dataset={"a": images(24, 3), "b": images(20, 5)})
    run.train()
    metrics = run.evaluate()
    assert {"eval_a_rir", "eval_b_rir", "eval_a_benign_accuracy", "eval_b_accuracy"} <= set(metrics)
    assert metrics["eval_a_harmful_log10_kappa"] == metrics["eval_b_harmful_log10_kappa"]
    final = run.evaluate(metric_key_prefix="final")
    assert [final[f"final_{name}_rir"] for name in "ab"] == [metrics[f"eval_{name}_rir"] for name in "ab"]
    assert run.evaluate("b")["eval_rir"] == metrics["eval_b_rir"]


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


def test_predict_works_and_measures_nothing(trainer, images):
    for labelled in (True, False):
        output = trainer().predict(images(7, labels=labelled))
        assert output.predictions.shape == (7, 2) and ("test_loss" in output.metrics) == labelled
        assert not [name for name in output.metrics if "kappa" in name or "rir" in name]


# ---- precision ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_measured_trained_and_saved_in_float32(dtype, tiny, trainer, images, tmp_path):
    half = tiny().to(dtype)
    wide = copy.deepcopy(half).float()
    run, other = trainer(half), trainer(wide)
    for training in (False, True):
        if training:
            run.train(), other.train()
        # Of features with the rounding of half precision, log10 κ would be smaller by orders of magnitude.
        found, expected = run.evaluate(), other.evaluate()
        assert spectral(found) == pytest.approx(spectral(expected), rel=1e-6)
        assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    run.save_model(str(tmp_path / "model"))
    saved = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert saved.dtype == torch.float32
    reloaded = feature_conditioning(features(saved, images(24, 4)))
    assert reloaded.log10_kappa == pytest.approx(found["eval_harmful_log10_kappa"], abs=1e-5)


def test_spectra_are_measured_outside_autocast_before_and_after_training(tiny, trainer):
    run, twin = trainer(bf16=True), tiny()
    for act in (run.evaluate, run.train):
        act()
        twin.load_state_dict(run.model.state_dict())
        assert spectral(run.evaluate()) == pytest.approx(spectral(trainer(twin).evaluate()), abs=1e-5)


# ---- the accuracy ----


@pytest.mark.parametrize(
    ("options", "preprocess"),
    [
        ({"batch_eval_metrics": True}, None),
        ({"eval_do_concat_batches": False}, None),
        ({}, lambda logits, labels: logits.argmax(-1)),
        ({}, lambda logits, labels: (logits, torch.zeros(len(labels), 9))),
    ],
    ids=["batch by batch", "lists", "classes", "with more outputs"],
)
def test_the_accuracy_is_the_same_however_it_is_computed_unless_the_user_has_metrics(options, preprocess, trainer):
    run = trainer(**options)
    run.preprocess_logits_for_metrics = preprocess
    found = [run.evaluate()["eval_accuracy"] for _ in range(2)]
    assert found == pytest.approx([trainer().evaluate()["eval_accuracy"]] * 2) and found[0] > 0
    metrics = trainer(compute_metrics=lambda prediction: {"mine": 3.0}).evaluate()
    assert metrics["eval_mine"] == 3.0 and "eval_accuracy" not in metrics and "eval_rir" in metrics


# ---- references of other images ----


@pytest.mark.parametrize("loss", ["distillation", "task"])
def test_what_was_before_is_measured_of_other_images_where_the_start_is_kept_and_else_not_claimed(
    loss, trainer, images, tmp_path, caplog
):
    """Evaluated after two steps on one set and after the third on another."""
    hf.utils.logging.warning_once.cache_clear()  # another test may have had it said
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "benign_loss": loss}
    whole = trainer(eval_dataset=images(20, 7), **settings)
    before = whole.evaluate()
    whole.train()
    first = trainer(**settings)
    assert first.evaluate()["eval_accuracy"] != before["eval_accuracy"]
    first.train()
    resumed = trainer(eval_dataset=images(20, 7), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    state = {name: value.clone() for name, value in resumed.model.state_dict().items()}
    metrics = resumed.evaluate()
    assert all(torch.equal(value, state[name]) for name, value in resumed.model.state_dict().items())
    resumed.save_model(str(tmp_path / "model"))
    record = read_record(tmp_path / "model")
    if loss == "task":  # the starting weights were not kept
        assert "eval_rir" not in metrics and "eval_dataset" in " ".join(r.getMessage() for r in caplog.records)
        assert record.metric.before is None and record.benign_features.before is None
        return
    assert metrics["eval_log10_rir"] == pytest.approx(whole.evaluate()["eval_log10_rir"], abs=1e-6)
    kappa, known = before["eval_benign_log10_kappa"], resumed.starting_metrics
    assert record.metric.before == known["eval_accuracy"] == before["eval_accuracy"] and known["eval_rir"] == 1.0
    assert [record.benign_features.before.log10_kappa, known["eval_benign_log10_kappa"]] == pytest.approx([kappa] * 2)
