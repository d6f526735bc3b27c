"""Figures are written beside the weights they were measured on, and beside no others."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_immunize.hub.record import AttackRecord, AuditRecord, DataRecord, RatioRecord, read_record
from hf_immunize.hub.weights import hash_weights
from hf_immunize.tensor_hash import weights_fingerprint


def finished(run):
    run.evaluate()
    run.train()
    return run.evaluate()


def test_record_holds_what_evaluate_reported(trainer, tmp_path):
    run = trainer()
    metrics = finished(run)
    run.save_model(str(tmp_path / "model"))
    record = read_record(tmp_path / "model")
    assert record.metric.after == metrics["eval_accuracy"]
    assert record.ratios["exact"].log10_rir == pytest.approx(metrics["eval_log10_rir"])
    assert record.harmful_features.after.log10_kappa == pytest.approx(metrics["eval_harmful_log10_kappa"])
    assert record.benign_features.after.rank == metrics["eval_benign_rank"]


def test_record_names_the_objective_that_auto_stands_for(trainer, tmp_path):
    run = trainer("resnet", objective="auto", benign_loss="distillation", benign_budget=0.05)
    finished(run)
    run.save_model(str(tmp_path / "model"))
    assert read_record(tmp_path / "model").method.objective == "silence"


def test_record_holds_what_was_before(trainer, tmp_path):
    run = trainer()
    before = run.evaluate()
    run.train()
    run.evaluate()
    run.save_model(str(tmp_path / "model"))
    record = read_record(tmp_path / "model")
    assert record.metric.before == before["eval_accuracy"]
    assert record.harmful_features.before.log10_kappa == pytest.approx(before["eval_harmful_log10_kappa"])


def test_record_names_the_weights_by_their_hashes(trainer, tmp_path):
    run = trainer()
    finished(run)
    run.save_model(str(tmp_path / "model"))
    assert read_record(tmp_path / "model").weights == hash_weights(tmp_path / "model")


def test_record_holds_method_and_sizes(trainer, tmp_path):
    run = trainer(harmful_weight=2.5, seed=7)
    finished(run)
    run.save_model(str(tmp_path / "model"))
    record = read_record(tmp_path / "model")
    assert (record.method.objective, record.method.harmful_weight, record.method.benign_weight) == (
        "kappa",
        2.5,
        "auto",
    )
    assert (record.method.steps, record.method.seed) == (2, 7)
    assert [(data.train_size, data.size) for data in (record.benign, record.harmful)] == [(16, 24), (16, 24)]


def test_no_record_without_a_measurement(trainer, tmp_path):
    run = trainer()
    run.train()
    run.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model" / "immunization.json").exists()


def test_outdated_record_is_taken_away(trainer, tmp_path):
    run = trainer()
    finished(run)
    run.save_model(str(tmp_path / "model"))
    run.model.classifier.weight.data += 1.0
    run.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model" / "immunization.json").exists()


def test_other_data_leave_no_trace_in_the_record(trainer, images, tmp_path):
    run = trainer()
    metrics = finished(run)
    run.evaluate(images(24, 99))
    run.save_model(str(tmp_path / "model"))
    assert read_record(tmp_path / "model").metric.after == metrics["eval_accuracy"]


CHECKPOINTS = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}


def test_every_checkpoint_has_its_own_figures(trainer):
    run = trainer(**CHECKPOINTS)
    run.train()
    logged = {entry["step"]: entry["eval_log10_rir"] for entry in run.state.log_history if "eval_log10_rir" in entry}
    for step in (1, 2, 3):
        record = read_record(Path(run.args.output_dir) / f"checkpoint-{step}")
        assert record.ratios["exact"].log10_rir == pytest.approx(logged[step])
        assert record.method.steps == step


def best_run(trainer, **options):
    # The least log10 κ of harmful features: of the first step, since training raises it.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_log10_rir", "greater_is_better": False}
    return trainer(**CHECKPOINTS, **best, **options)


def test_best_model_gets_the_best_steps_figures(trainer, tmp_path):
    run = best_run(trainer)
    run.train()
    best = run.state.best_global_step
    assert best != 3, "the last step is the best one: the test shows nothing"
    run.save_model(str(tmp_path / "model"))
    record = read_record(tmp_path / "model")
    assert record.method.steps == best
    assert record.ratios["exact"].log10_rir == pytest.approx(run.state.best_metric)
    assert record.weights == hash_weights(tmp_path / "model")


def test_best_model_evaluated_again_gets_these_figures(trainer, tmp_path):
    run = best_run(trainer)
    run.train()
    assert run.state.best_global_step != run.state.global_step
    metrics = run.evaluate()
    run.save_model(str(tmp_path / "model"))
    record = read_record(tmp_path / "model")
    assert record.ratios["exact"].log10_rir == pytest.approx(metrics["eval_log10_rir"])
    assert record.method.steps == run.state.best_global_step


@pytest.mark.parametrize("options", [{"benign_loss": "distillation"}, {}], ids=["with start", "without"])
def test_a_run_resumed_with_other_images_claims_nothing_of_those_before(options, trainer, images, tiny, tmp_path):
    first = trainer(**CHECKPOINTS, **options)
    first.evaluate()
    first.train()
    other = images(20, 7)
    expected = trainer(eval_dataset=other).evaluate()
    assert expected["eval_accuracy"] != first.evidence.before["eval_accuracy"]
    resumed = trainer(**(CHECKPOINTS | {"max_steps": 4}), **options, eval_dataset=other)
    resumed.train(resume_from_checkpoint=True)
    resumed.evaluate()
    resumed.save_model(str(tmp_path / "model"))
    record = read_record(tmp_path / "model")
    if not options:  # the starting weights were not kept
        assert record.metric.before is None and record.benign_features.before is None
        return
    assert record.metric.before == expected["eval_accuracy"]
    assert record.benign_features.before.log10_kappa == pytest.approx(expected["eval_benign_log10_kappa"])
    known = resumed.starting_metrics
    assert known["eval_accuracy"] == expected["eval_accuracy"] and known["eval_rir"] == 1.0
    assert known["eval_benign_log10_kappa"] == pytest.approx(expected["eval_benign_log10_kappa"])


def test_the_record_holds_the_state_of_the_budget(trainer, tmp_path):
    budget = {"benign_loss": "distillation", "benign_budget": 0.01, "budget_measure": "kl"}
    run = trainer(**budget, learning_rate=0.3, max_steps=12)
    finished(run)
    run.save_model(str(tmp_path / "model"))
    state = read_record(tmp_path / "model").method.budget
    assert (state.limit, state.measure) == (0.01, "kl")
    logged = [entry["budget_spent"] for entry in run.state.log_history if "budget_spent" in entry]
    # The multiplier falls by a tenth in each step beyond the budget.
    assert logged[-1] == pytest.approx(state.spent / 0.01) and state.exceeded and state.weight < 1


def test_resumed_run_still_knows_what_was_before(trainer, tmp_path):
    run = trainer(**CHECKPOINTS)
    before = run.evaluate()
    run.train()
    resumed = trainer(**(CHECKPOINTS | {"max_steps": 4}))
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model(str(tmp_path / "model"))
    record = read_record(tmp_path / "model")
    assert record.metric.before == before["eval_accuracy"]
    assert record.benign_features.before is not None


def test_several_benign_sets_the_first_counts(trainer, images, tmp_path):
    run = trainer(eval_dataset={"near": images(24, 3), "far": images(20, 5)})
    metrics = finished(run)
    run.save_model(str(tmp_path / "model"))
    record = read_record(tmp_path / "model")
    assert record.metric.after == metrics["eval_near_accuracy"]
    assert record.benign.size == 24


def test_names_that_were_given_are_kept(trainer, tmp_path):
    run = trainer()
    run.evidence.benign = DataRecord("user/pets", on_hub=True, revision="abc")
    finished(run)
    run.save_model(str(tmp_path / "model"))
    benign = read_record(tmp_path / "model").benign
    assert (benign.name, benign.revision, benign.size) == ("user/pets", "abc", 24)


def test_what_was_attached_belongs_to_its_weights_only(trainer, tmp_path):
    run = trainer()
    finished(run)
    audit = AuditRecord("quick", strongest={"head_input": AttackRecord("ridge", 0.5)})
    run.evidence.attach(run.model, groups=RatioRecord(1.0, relative_std=0.1), audit=audit)
    run.save_model(str(tmp_path / "model"))
    record = read_record(tmp_path / "model")
    assert (record.audit, record.ratios["groups"].log10_rir) == (audit, 1.0)
    run.model.classifier.weight.data += 0.5
    run.evaluate()
    run.save_model(str(tmp_path / "model"))
    record = read_record(tmp_path / "model")
    assert (record.audit, set(record.ratios)) == (None, {"exact"})


def test_path_of_the_base_model_does_not_get_in(trainer, tiny, tmp_path):
    tiny().save_pretrained(tmp_path / "alice" / "base")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "alice" / "base")
    run = trainer(model)
    finished(run)
    run.save_model(str(tmp_path / "model"))
    assert read_record(tmp_path / "model").base_model.name == "base"
    assert "alice" not in (tmp_path / "model" / "immunization.json").read_text()
    assert "alice" not in json.dumps(json.loads((tmp_path / "model" / "config.json").read_text()))


def test_fingerprint_sees_one_weight(tiny):
    model = tiny("resnet")
    before = weights_fingerprint(model)
    assert weights_fingerprint(model) == before
    model.classifier[1].weight.data[0, 0] += 1e-3
    assert weights_fingerprint(model) != before


def test_fingerprint_sees_two_weights_change_places(tiny):
    model = tiny("resnet")
    before = weights_fingerprint(model)
    # Sum and norm of the tensor stay as they are.
    model.classifier[1].weight.data = model.classifier[1].weight.data.flip(1)
    assert weights_fingerprint(model) != before


def test_fingerprint_sees_batch_statistics(tiny):
    model = tiny("resnet")
    before = weights_fingerprint(model)
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    norm.running_mean += 0.1
    assert weights_fingerprint(model) != before
