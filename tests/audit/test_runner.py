"""The audit as a whole, on tiny models."""

import copy
import os
import re
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from attacked import pictures, rows_of, tiny_resnet, tiny_vit
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from tqdm.auto import tqdm
from transformers import ViTImageProcessorPil

from hf_immunize import audit
from hf_immunize.attacks.presets import ATTACKERS
from hf_immunize.audit.journal import Journal, key_of
from hf_immunize.audit.result import Outcome
from hf_immunize.audit.run import FeatureMetrics
from hf_immunize.errors import ArgumentError, CheckpointError, DataError


@pytest.fixture
def models():
    model, reference = tiny_vit(), tiny_vit()
    with torch.no_grad():
        model.vit.layernorm.weight *= torch.logspace(0, -3, 16)
    return model, reference


@pytest.fixture
def benign():
    return rows_of(*pictures(40, 5)), rows_of(*pictures(24, 6))


def run(models, harmful, preset, **options):
    options = {"reference": models[1], "progress": False, "preset": preset, **options}
    return audit(models[0], harmful=harmful, **options).data


def without_time(data):
    return [replace(outcome, seconds=0.0) for outcome in data.outcomes]


def test_all_classes_are_attacked_on_both_models_and_utility_spectra_and_rir_measured(
    models, harmful, benign, tiny_preset
):
    data = run(models, harmful, tiny_preset, benign=benign)
    seen = {(one.subject, one.access) for one in data.outcomes if one.status == "done"}
    classes = ("head_input", "any_layer", "fine_tuning")
    assert seen == {(subject, access) for subject in ("immunized", "reference") for access in classes}
    assert data.utility.size == 24 and len(data.spectra) == 4 and data.rir["harmful_ratio"] > 100


def test_a_model_that_is_its_own_reference_is_attacked_once_and_found_as_a_copy_of_it_is(
    models, harmful, benign, tiny_preset, tmp_path
):
    preset = replace(tiny_preset, random_copies=2, restoring=("restore_swap",))
    own, other = (
        run((models[0], one), harmful, preset, benign=benign, run_dir=tmp_path / name)
        for name, one in (("own", models[0]), ("copy", copy.deepcopy(models[0])))
    )
    assert sorted(map(key_of, own.outcomes)) == sorted(map(key_of, other.outcomes))
    for subject in ("reference", "immunized", "random"):
        found, expected = ([one for one in without_time(of) if one.subject == subject] for of in (own, other))
        assert found == expected and found
    assert (own.utility, own.rir) == (other.utility, other.rir)
    assert {(one.subject, one.task, one.log10_kappa) for one in own.spectra} == {
        (one.subject, one.task, one.log10_kappa) for one in other.spectra
    }
    ran = [(tmp_path / name / "outcomes.jsonl").read_text() for name in ("own", "copy")]
    assert ['"immunized"' in text for text in ran] == [False, True]


def test_models_of_half_precision_are_attacked_in_float32(models, harmful, tiny_preset):
    halves = [copy.deepcopy(model).bfloat16() for model in models]
    wide = [copy.deepcopy(model).float() for model in halves]
    preset = tiny_preset.only(["ridge", "last_stage"])
    assert without_time(run(halves, harmful, preset)) == without_time(run(wide, harmful, preset))
    assert {model.dtype for model in halves} == {torch.bfloat16}


def test_an_interrupted_audit_goes_on_where_it_was(models, harmful, tiny_preset, tmp_path, monkeypatch):
    tiny_preset = replace(tiny_preset, random_copies=2)
    whole = run(models, harmful, tiny_preset)
    run(models, harmful, tiny_preset, run_dir=tmp_path)
    path = tmp_path / "outcomes.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:8]) + lines[8][:30])
    resumed = run(models, harmful, tiny_preset, run_dir=tmp_path)
    assert without_time(resumed) == without_time(whole)
    assert len(path.read_text().splitlines()) == len(lines)
    assert any("unfinished" in sentence for sentence in resumed.warnings)
    idle = {name: replace(one, run=lambda *_: pytest.fail("attacked again")) for name, one in ATTACKERS.items()}
    monkeypatch.setattr(sys.modules["hf_immunize.audit.run"], "ATTACKERS", idle)
    assert run(models, harmful, tiny_preset, run_dir=tmp_path).outcomes == resumed.outcomes


def test_progress_counts_what_is_ahead_also_when_resumed_or_shared_and_tells_each_attack(
    models, harmful, tiny_preset, tmp_path, monkeypatch, capsys
):
    module, bars = sys.modules["hf_immunize.audit.run"], []

    class Bar(tqdm):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            bars.append((self, self.n))

    def told():
        said = capsys.readouterr().err
        return sorted(set(re.findall(r"harmful task, (.*?): [\d.]+% before immunization, [\d.]+% after", said)))

    monkeypatch.setattr(module, "tqdm", Bar)
    preset = replace(tiny_preset, random_copies=2)
    planned = len(run(models, harmful, preset, progress=True, run_dir=tmp_path).outcomes)
    first = told()
    assert any("ridge" in line for line in first) and any("bias" in line for line in first)
    path = tmp_path / "outcomes.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:8]))
    # Another process adds all but the last while the first of the rest is under way.
    attack, others = module.guarded, ["".join(lines[9:-1])]

    def shared(call):
        with path.open("a") as file:
            file.write(others.pop() if others else "")
        return attack(call)

    monkeypatch.setattr(module, "guarded", shared)
    run(models, harmful, preset, progress=True, run_dir=tmp_path)
    assert [(bar.total, start, bar.n) for bar, start in bars] == [(planned, 0, planned), (planned, 7, planned)]
    assert told() == first


def test_what_a_budget_allows_is_in_the_report_and_a_layer_above_its_limit_is_named_with_it(
    models, harmful, tiny_preset
):
    preset = replace(tiny_preset.only(["ridge"]).changed(steps=9), layer_entries=10)
    data = run(models, harmful, preset, max_images=30)
    stated = ("probe_steps", "fine_tuning_steps", "images_of_a_task")
    assert [data.budget[name] for name in stated] == [9, 9, 30]
    assert data.budget["layer_entries"] == 10
    notes = {one.note for one in data.outcomes if one.status == "skipped"}
    assert notes and all("more than the preset's 10" in note for note in notes)


def test_a_run_directory_keeps_outcomes_alone_and_refuses_other_weights_and_architectures(
    models, harmful, tiny_preset, tmp_path
):
    run(models, harmful, tiny_preset.only(["ridge"]), run_dir=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["outcomes.jsonl"]
    with pytest.raises(ArgumentError, match="--output-dir"):
        run((models[1], models[1]), harmful, tiny_preset.only(["ridge"]), run_dir=tmp_path)
    with pytest.raises(DataError, match="same architecture"):
        run(models, harmful, tiny_preset, reference=tiny_resnet())


def test_restored_weights_and_layers_left_alone_read_what_the_reference_reads(models, harmful, tiny_preset):
    data = run(models, harmful, tiny_preset.only(["ridge", "restore_swap"]))
    reference = {o.seed: o.accuracy for o in data.outcomes if (o.subject, o.access) == ("reference", "head_input")}
    swapped = [o for o in data.outcomes if o.attacker == "restore_swap"]
    assert swapped and all(one.accuracy == reference[one.seed] for one in swapped)
    # Layers that immunization left alone read the same.
    by_subject = [
        {one.layer: one.accuracy for one in data.outcomes if (one.subject, one.access) == (subject, "any_layer")}
        for subject in ("reference", "immunized")
    ]
    assert by_subject[0] == by_subject[1] != {}


def test_what_does_not_fit_into_memory_runs_when_there_is_enough(models, harmful, tiny_preset, tmp_path):
    data = run(models, harmful, tiny_preset, memory_limit=1000, run_dir=tmp_path)
    skipped = [one for one in data.outcomes if one.status == "skipped"]
    assert {one.access for one in skipped} == {"any_layer", "fine_tuning"}
    assert all("GiB" in one.note and one.accuracy is None for one in skipped)
    assert {one.status for one in run(models, harmful, tiny_preset, run_dir=tmp_path).outcomes} == {"done"}


def test_other_tasks_are_attacked_by_those_that_measure_learning_speed(models, harmful, benign, tiny_preset):
    chosen = tiny_preset.only(["gd_line_search", "lora_r2"])
    preset = replace(chosen, fine_tuning=("lora_r2",), benign_attackers=("gd_line_search", "lora_r2"))
    data = run(models, harmful, preset, benign=benign, unseen=benign, unrelated=harmful)
    assert set(data.tasks) == {"harmful", "benign", "unseen", "unrelated"} == {one.task for one in data.outcomes}
    seen = {(one.subject, one.attacker) for one in data.outcomes if one.task == "benign" and one.curve}
    assert seen == {(s, a) for s in ("immunized", "reference") for a in ("gd_line_search", "lora_r2")}
    assert any("both harmful and unrelated" in sentence for sentence in data.warnings)


def test_features_that_are_not_finite_are_one_sentence(models, harmful, tiny_preset):
    with torch.no_grad():
        models[0].vit.layernorm.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="finite"):
        run(models, harmful, tiny_preset)


def test_a_missing_model_is_one_sentence(harmful, tiny_preset):
    with pytest.raises(ArgumentError, match="nowhere"):
        audit("./nowhere", harmful=harmful, preset=tiny_preset)


def test_utility_follows_the_models_class_names(models, tiny_preset):
    model = models[0]
    model.config.id2label = dict(enumerate(["d", "c", "b", "a"]))
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    images = [Image.fromarray(np.full((8, 8, 3), 9 * i, np.uint8)) for i in range(16)]
    data = Dataset.from_dict({"image": images, "label": [0, 1] * 8}, features=features)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 0, 0, 1]))  # always "a"
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    options = {"benign": (data, data), "processing_class": processor, "reference": None}
    found = run(models, (data, data), tiny_preset.only(["ridge"]), **options)
    assert found.utility.immunized == 0.5 and found.reference is None


def test_the_public_function_is_found_after_an_import_of_its_room(harmful):
    with pytest.raises(ArgumentError):
        sys.modules["hf_immunize.audit"](None, harmful=harmful)


@pytest.mark.parametrize("content", ["", "{", "\0\0\0\n", '{"attacker": "ridge"}\n'])
def test_a_damaged_journal_is_started_anew_with_a_sentence(tmp_path, content):
    (tmp_path / "outcomes.jsonl").write_text(content)
    done = Outcome(
        "ridge", "head_input", "immunized", "harmful", "head", 0, "float64", accuracy=0.5, settings={"k": 1}
    )
    Journal(tmp_path, "mark", said := []).add(done)
    assert said and list(Journal(tmp_path, "mark", []).outcomes.values()) == [done]
    with pytest.raises(CheckpointError, match=r"outcomes\.jsonl"):
        Journal(tmp_path / "outcomes.jsonl", "mark", [])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fork")
def test_what_a_process_claims_is_its_own_until_it_is_found_or_the_process_is_killed(tmp_path):
    one, other = (
        Outcome("ridge", "head_input", "immunized", "harmful", "head", seed, "float64", accuracy=0.5)
        for seed in (0, 1)
    )
    mine = Journal(tmp_path, "mark", [])
    if (child := os.fork()) == 0:  # goes on until it is killed
        theirs = Journal(tmp_path, "mark", [])
        with theirs.claimed(one), theirs.claimed(other):
            theirs.add(one)
            time.sleep(600)
    while "ridge" not in (tmp_path / "outcomes.jsonl").read_text():
        time.sleep(0.01)
    with mine.claimed(one) as free, mine.claimed(other) as free_too:
        assert not free and not free_too
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with mine.claimed(other, wait=True) as free:
        assert free and list(mine.outcomes.values()) == [one]
    mine.close()
    assert [file.name for file in tmp_path.iterdir()] == ["outcomes.jsonl"]


# What is measured in addition to the attacks


@pytest.mark.parametrize(("scale", "bound"), [(1e-3, None), (0.0, "lower")])
def test_the_ratio_has_its_parts_and_collapse_is_a_bound_and_not_good_conditioning(scale, bound):
    Z = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shrunk = Z * torch.tensor([scale, 1, 1, 1, 1, 1], dtype=torch.float64)
    metrics = FeatureMetrics(warnings := [])
    for subject, features in (("reference", Z), ("immunized", shrunk)):
        metrics.note_features(subject, "harmful", features, torch.float64)
    assert (metrics.ratio(), metrics.utility()) == ({}, None)  # without benign data
    for subject in ("reference", "immunized"):
        metrics.note_features(subject, "benign", Z, torch.float64)
    ratio = metrics.ratio()
    assert (ratio["bound"], ratio["benign_ratio"]) == (bound, 1.0) and ratio["rir"] == ratio["harmful_ratio"] > 1e5
    assert [one.is_bound for one in metrics.spectra] == [False, bound == "lower", False, False]
    assert ratio["protocol"] == "intercept"
    # What is the same for all images is no direction of a probe with an intercept.
    there = FeatureMetrics([])
    for subject, features in (("reference", Z + 100), ("immunized", shrunk - 7)):
        there.note_features(subject, "harmful", features, torch.float64)
    shifted = [one.log10_kappa for one in there.spectra]
    if bound is None:  # which grows with rounding noise
        assert shifted == pytest.approx([one.log10_kappa for one in metrics.spectra[:2]], abs=1e-6)
    metrics.note_features("reference", "harmful", torch.ones(6, 3), torch.float32)
    assert len(metrics.spectra) == 4 and "harmful images" in warnings[0]
