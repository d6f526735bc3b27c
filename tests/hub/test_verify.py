"""Agrees, differs, cannot say."""

import json

import pytest
import torch
from transformers import AutoImageProcessor, ViTImageProcessorPil

from hf_immunize import verify
from hf_immunize.errors import DataError
from hf_immunize.hub.load import load_model
from hf_immunize.hub.record import write_record
from hf_immunize.hub.verify import AGREES, CANNOT_SAY, DIFFERS, groups_ratio, image_rows, measure, rounding_allowance
from hf_immunize.hub.weights import hash_weights
from hf_immunize.spectra.conditioning import feature_conditioning


def checked(checkpoint, benign, harmful, **options):
    return verify(checkpoint, benign=benign, harmful=harmful, progress=False, **options)


def outcomes(found):
    return {figure.name: figure.outcome for figure in found.figures}


def test_true_record_agrees(checkpoint, benign, harmful):
    found = checked(checkpoint, benign, harmful)
    assert (found.outcome, found.exit_code) == (AGREES, 0)
    assert set(outcomes(found).values()) == {AGREES}


def test_claims_and_measurements_are_given(checkpoint, benign, harmful, record):
    figures = {figure.name: figure for figure in checked(checkpoint, benign, harmful).figures}
    exact = figures["log10 RIR (exact)"]
    assert exact.claimed == record.ratios["exact"].log10_rir
    assert exact.measured == pytest.approx(exact.claimed, abs=1e-3)
    assert figures["benign accuracy"].measured == record.metric.after


@pytest.mark.parametrize("batch_size", [1, 7, 24])
def test_batch_size_does_not_matter(batch_size, checkpoint, benign, harmful):
    assert checked(checkpoint, benign, harmful, batch_size=batch_size).outcome == AGREES


def test_images_from_a_folder_agree(checkpoint, benign, harmful, tmp_path):
    for name, data in (("benign", benign), ("harmful", harmful)):
        data.save_to_disk(tmp_path / name)
    assert checked(checkpoint, str(tmp_path / "benign"), str(tmp_path / "harmful")).outcome == AGREES


def test_a_config_without_label2id_is_measured(checkpoint, benign, harmful):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"label2id": None}))
    assert checked(checkpoint, benign, harmful).outcome == AGREES


def test_tampered_weight_differs(checkpoint, benign, harmful, tamper):
    tamper(checkpoint)
    found = checked(checkpoint, benign, harmful)
    assert (found.outcome, found.exit_code) == (DIFFERS, 3)
    assert "model.safetensors has changed" in found.reasons[0]


def test_weights_changed_under_a_new_hash_differ_by_their_figures(checkpoint, benign, harmful, record):
    model = load_model(checkpoint)
    model.vit.layernorm.weight.data[0] *= 2.0
    model.save_pretrained(checkpoint)
    record.weights = hash_weights(checkpoint)
    write_record(checkpoint, record)
    found = checked(checkpoint, benign, harmful)
    assert found.outcome == DIFFERS
    assert outcomes(found)["log10 RIR (exact)"] == DIFFERS


@pytest.mark.parametrize("shift", [0.002, -0.5, 3.0])
def test_flattering_claim_differs(shift, checkpoint, benign, harmful, record):
    record.ratios["exact"].log10_rir += shift
    write_record(checkpoint, record)
    assert checked(checkpoint, benign, harmful).outcome == DIFFERS


def test_claim_within_the_tolerance_agrees(checkpoint, benign, harmful, record):
    record.ratios["exact"].log10_rir += 0.0009
    write_record(checkpoint, record)
    assert checked(checkpoint, benign, harmful).outcome == AGREES


def test_flattering_accuracy_differs(checkpoint, benign, harmful, record):
    record.metric.after = min(1.0, record.metric.after + 0.1)
    write_record(checkpoint, record)
    assert outcomes(checked(checkpoint, benign, harmful))["benign accuracy"] == DIFFERS


def test_accuracy_of_half_precision_has_more_room(checkpoint, benign, harmful, record):
    record.metric.after, record.metric.precision = record.metric.after - 0.015, "bf16"
    write_record(checkpoint, record)
    figures = {figure.name: figure for figure in checked(checkpoint, benign, harmful).figures}
    assert figures["benign accuracy"].tolerance > 0.015


def test_other_images_cannot_say(checkpoint, benign, harmful):
    found = checked(checkpoint, harmful, benign)
    assert (found.outcome, found.exit_code) == (CANNOT_SAY, 4)
    assert "not those of the record" in str(found)


def test_fewer_images_cannot_say(checkpoint, benign, harmful):
    found = checked(checkpoint, benign, harmful.select(range(20)))
    assert found.outcome == CANNOT_SAY
    assert "24 images then, 20 now" in str(found)


def test_another_image_processor_cannot_say(checkpoint, benign, harmful, record):
    other = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.4] * 3)
    rows = image_rows(benign, "benign", load_model(checkpoint))
    record.benign.fingerprint = measure(load_model(checkpoint), rows, other, progress=False).fingerprint
    write_record(checkpoint, record)
    found = checked(checkpoint, benign, harmful, image_processor=other)
    assert found.outcome == CANNOT_SAY
    assert "another image processor makes them" in str(found)


def test_record_without_checksums_cannot_say(checkpoint, benign, harmful, record):
    record.harmful.checksum = None
    write_record(checkpoint, record)
    assert checked(checkpoint, benign, harmful).outcome == CANNOT_SAY


def test_record_without_figures_cannot_say(checkpoint, benign, harmful, record):
    record.ratios, record.metric = {}, None
    record.benign_features.after = record.harmful_features.after = None
    write_record(checkpoint, record)
    assert checked(checkpoint, benign, harmful).outcome == CANNOT_SAY


def test_reference_figures_on_trust_are_said(checkpoint, benign, harmful):
    assert "taken on trust" in str(checked(checkpoint, benign, harmful))


def test_reference_is_measured_where_it_is_given(checkpoint, benign, harmful, reference, record):
    found = checked(checkpoint, benign, harmful, reference=reference)
    assert found.outcome == AGREES
    assert "trust" not in str(found)
    assert outcomes(found)["log10 κ of harmful features, before"] == AGREES
    assert outcomes(found)["log10 RIR (intercept)"] == AGREES
    record.ratios["intercept"].log10_rir += 1.0
    write_record(checkpoint, record)
    assert outcomes(checked(checkpoint, benign, harmful, reference=reference))["log10 RIR (intercept)"] == DIFFERS
    assert checked(checkpoint, benign, harmful).outcome == AGREES  # without the reference it can't be measured


def test_invented_reference_is_found_out(checkpoint, benign, harmful, reference, record):
    before = record.harmful_features.before
    before.log10_kappa -= 1.0
    record.ratios["exact"].log10_rir += 1.0
    record.ratios["exact"].log10_harmful_ratio += 1.0
    write_record(checkpoint, record)
    assert checked(checkpoint, benign, harmful).outcome == AGREES  # by the record's own κ before, on trust
    assert checked(checkpoint, benign, harmful, reference=reference).outcome == DIFFERS


def grouped(checkpoint, record, benign, harmful, reference, num_groups):
    model, sides = load_model(checkpoint), []
    for images in (harmful, benign):
        rows, processor = image_rows(images, "images", model), AutoImageProcessor.from_pretrained(checkpoint)
        sides.append(
            tuple(measure(m, rows, processor, keep_features=True, progress=False) for m in (model, reference))
        )
    record.ratios["groups"] = groups_ratio(*sides, num_groups=num_groups, group_size=12)
    write_record(checkpoint, record)


def test_groups_agree_within_their_spread(checkpoint, record, benign, harmful, reference):
    grouped(checkpoint, record, benign, harmful, reference, 2)
    found = checked(checkpoint, benign, harmful, reference=reference)
    assert found.outcome == AGREES
    assert outcomes(found)["groups: mean RIR"] == AGREES


def test_groups_outside_their_spread_differ(checkpoint, record, benign, harmful, reference):
    grouped(checkpoint, record, benign, harmful, reference, 2)
    groups = record.ratios["groups"]
    groups.log10_rir, groups.relative_std = groups.log10_rir + 1.0, 0.1
    write_record(checkpoint, record)
    assert checked(checkpoint, benign, harmful, reference=reference).outcome == DIFFERS


def test_groups_need_the_reference_and_do_not_decide_without(checkpoint, record, benign, harmful, reference):
    grouped(checkpoint, record, benign, harmful, reference, 2)
    found = checked(checkpoint, benign, harmful)
    assert found.outcome == AGREES
    assert outcomes(found)["groups: mean RIR"] == CANNOT_SAY


def test_images_without_a_processor_are_refused(checkpoint, benign, harmful):
    (checkpoint / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match="image processor"):
        checked(checkpoint, benign, harmful)


def test_no_allowance_for_healthy_features():
    assert rounding_allowance(feature_conditioning(torch.randn(50, 5))) < 1e-4


def test_allowance_where_noise_is_near():
    z = torch.randn(50, 5) * torch.tensor([1.0, 1.0, 1.0, 1.0, 4e-6])
    assert rounding_allowance(feature_conditioning(z)) > 1e-3
