"""Figures are written next to the weights they were measured on, and to no others."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from PIL import Image
from transformers import AutoModelForImageClassification

from hf_immunize.audit.statistics import paired_utility
from hf_immunize.data.views import Views
from hf_immunize.files import weights_fingerprint
from hf_immunize.hub.card import record_rows, render_card
from hf_immunize.hub.load import hash_weights
from hf_immunize.hub.record import AttackRecord, AuditRecord, DataRecord, read_record


CHECKPOINTS = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}


@pytest.fixture
def saved(tmp_path):
    """Save a run's model, and read the record there."""

    def save(run):
        run.save_model(str(tmp_path / "model"))
        return read_record(tmp_path / "model")

    return save


def finished(run):
    run.evaluate()
    run.train()
    return run.evaluate()


# ---- the record of a run ----


@pytest.mark.parametrize("labels", [True, False])
def test_the_record_holds_what_was_before_and_after_with_method_sizes_and_hashes(
    labels, trainer, images, saved, tmp_path
):
    run = trainer(harmful_weight=2.5, seed=7, harmful_eval_dataset=images(24, 4, labels=labels))
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    record = saved(run)
    assert (record.metric.before, record.metric.after) == (before["eval_accuracy"], after["eval_accuracy"])
    assert record.ratios["exact"].log10_rir == pytest.approx(after["eval_log10_rir"])
    assert record.harmful_features.before.log10_kappa == pytest.approx(before["eval_harmful_log10_kappa"])
    assert record.harmful_features.after.log10_kappa == pytest.approx(after["eval_harmful_log10_kappa"])
    assert record.benign_features.after.rank == after["eval_benign_rank"]
    for side, features in (("benign", record.benign_features), ("harmful", record.harmful_features)):
        steps, unreached = after[f"eval_{side}_probing_steps"], after[f"eval_{side}_probing_is_lower_bound"]
        assert features.probing.before == before[f"eval_{side}_probing_steps"]
        assert features.probing.after == (None if unreached else steps)
        assert features.probing.conjugate_before == before[f"eval_{side}_conjugate_gradient_steps"]
        conjugate, unreached = (
            after[f"eval_{side}_conjugate_gradient_{what}"] for what in ("steps", "is_lower_bound")
        )
        assert features.probing.conjugate_after == (None if unreached else conjugate)
        assert features.probing.targets == ("classes" if labels or side == "benign" else "components")
    assert "steps of a harmful probe" in {name for name, *_ in record_rows(record)}
    assert record.weights == hash_weights(tmp_path / "model")
    method = record.method
    assert (method.objective, method.harmful_weight, method.benign_weight) == ("kappa", 2.5, "auto")
    assert (method.steps, method.seed) == (2, 7)
    assert [(data.train_size, data.size) for data in (record.benign, record.harmful)] == [(16, 24), (16, 24)]


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_change_of_accuracy_is_of_the_same_images_with_its_paired_interval(evaluated, trainer, images, saved):
    run, rows = trainer(), images(24, 3)
    pixels, labels = torch.stack([row["pixel_values"] for row in rows]), torch.tensor([row["labels"] for row in rows])

    def hits():
        with torch.no_grad():
            return run.model.eval()(pixel_values=pixels).logits.argmax(1) == labels

    before = hits()
    if evaluated:
        assert "eval_accuracy_change" not in run.evaluate()
    run.train()
    run.model.classifier.weight.data[1] *= -1  # so that some change
    run.evaluate()
    metric, utility = saved(run).metric, paired_utility(hits(), before)
    assert 0 < abs(utility.difference) < 1 and metric.before == pytest.approx(utility.reference)
    assert metric.change == pytest.approx(utility.difference) == pytest.approx(metric.after - metric.before)
    assert metric.change_interval == pytest.approx(utility.interval)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "the benign images"),
        ({"benign_loss": "task"}, None),
        ({"views": 9}, "9 views"),
        ({"others": 12}, "12 of"),
    ],
)
def test_the_record_and_the_card_say_what_was_distilled_on(given, found, trainer, images, saved):
    options = {"benign_loss": "distillation"} | given
    if count := options.pop("views", None):
        picture = [{"image": Image.new("RGB", (8, 8), (number, 9, 9))} for number in range(3)]
        options["distillation_dataset"] = Views(picture, count)
        options["processing_class"] = hf.ViTImageProcessorPil(size={"height": 8, "width": 8})
    if count := options.pop("others", None):
        options["distillation_dataset"] = images(count, 9, labels=False)
    run = trainer(**options)
    run.evaluate()
    record = saved(run)
    on = record.method.distilled_on
    assert on is None if found is None else found in on
    assert ("- distilled on: the benign images" in str(render_card(record))) == (found is not None)


def test_weights_that_were_not_evaluated_have_no_record(trainer, tmp_path):
    run = trainer()
    run.train()
    run.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model" / "immunization.json").exists()
    run.evaluate()  # of the weights that were saved: written after all
    assert read_record(tmp_path / "model").weights == hash_weights(tmp_path / "model")
    run.model.classifier.weight.data += 1.0
    run.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model" / "immunization.json").exists()


def test_of_several_benign_sets_the_first_counts_names_are_kept_and_other_data_leave_no_trace(trainer, images, saved):
    run = trainer(eval_dataset={"near": images(24, 3), "far": images(20, 5)})
    run.evidence.benign = DataRecord("user/pets", on_hub=True, revision="abc")
    metrics = finished(run)
    run.evaluate(images(24, 99))
    record = saved(run)
    assert (record.benign.name, record.benign.revision, record.benign.size) == ("user/pets", "abc", 24)
    assert record.metric.after == metrics["eval_near_accuracy"]


def test_what_was_attached_belongs_to_its_weights_only(trainer, saved):
    run = trainer()
    finished(run)
    audit = AuditRecord("quick", strongest={"head_input": AttackRecord("ridge", 0.5)})
    run.evidence.attach(run.model, audit)
    record = saved(run)
    assert record.audit == audit
    run.model.classifier.weight.data += 0.5
    run.evaluate()
    record = saved(run)
    assert record.audit is None


def test_the_path_of_the_base_model_does_not_get_in(trainer, tiny, saved, tmp_path):
    tiny().save_pretrained(tmp_path / "alice" / "base")
    run = trainer(AutoModelForImageClassification.from_pretrained(tmp_path / "alice" / "base"))
    finished(run)
    assert saved(run).base_model.name == "base"
    for name in ("immunization.json", "config.json"):
        assert "alice" not in json.dumps(json.loads((tmp_path / "model" / name).read_text()))


# ---- checkpoints ----


def test_every_checkpoint_has_its_own_figures_and_the_best_model_the_best_steps(trainer, saved, tmp_path):
    # The least log10 κ of harmful features: of the first step, since training raises it.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_log10_rir", "greater_is_better": False}
    run = trainer(**CHECKPOINTS, **best)
    run.train()
    logged = {entry["step"]: entry["eval_log10_rir"] for entry in run.state.log_history if "eval_log10_rir" in entry}
    for step in (1, 2, 3):
        record = read_record(Path(run.args.output_dir) / f"checkpoint-{step}")
        assert record.ratios["exact"].log10_rir == pytest.approx(logged[step]) and record.method.steps == step
    step = run.state.best_global_step
    assert step != 3, "the last step is the best one: the test shows nothing"
    for expected in (lambda: run.state.best_metric, lambda: run.evaluate()["eval_log10_rir"]):
        rir = expected()
        record = saved(run)
        assert record.method.steps == step and record.ratios["exact"].log10_rir == pytest.approx(rir)
        assert record.weights == hash_weights(tmp_path / "model")


# ---- the fingerprint ----


def test_the_fingerprint_sees_every_change(tiny):
    model = tiny("resnet")
    weight, norm = model.classifier[1].weight.data, next(m for m in model.modules() if hasattr(m, "running_mean"))
    seen = [weights_fingerprint(model), weights_fingerprint(model)]
    assert seen[0] == seen[1]
    weight[0, 0] += 1e-3
    seen.append(weights_fingerprint(model))
    weight.copy_(weight.flip(1))  # with the same sum and norm
    seen.append(weights_fingerprint(model))
    norm.running_mean += 0.1  # of the batches seen
    seen.append(weights_fingerprint(model))
    assert len(set(seen)) == 4
