"""Agrees, differs, cannot say."""

import json

import pytest
import torch
from transformers import ViTImageProcessorPil

import hf_immunize.hub.verify as verifying
from hf_immunize import verify
from hf_immunize.errors import DataError
from hf_immunize.hub.collect import describe_side
from hf_immunize.hub.load import hash_weights, load_model
from hf_immunize.hub.record import ConditioningRecord, write_record
from hf_immunize.hub.verify import AGREES, CANNOT_SAY, DIFFERS, image_rows, measure, rounding_allowance
from hf_immunize.spectra.conditioning import feature_conditioning


def checked(checkpoint, benign, harmful, **options):
    return verify(checkpoint, benign=benign, harmful=harmful, progress=False, **options)


def outcomes(found):
    return {figure.name: figure.outcome for figure in found.figures}


@pytest.mark.parametrize("batch_size", [7, 24])
def test_a_true_record_agrees_whatever_the_batch_size(batch_size, checkpoint, benign, harmful, record):
    found = checked(checkpoint, benign, harmful, batch_size=batch_size)
    assert (found.outcome, found.exit_code, set(outcomes(found).values())) == (AGREES, 0, {AGREES})
    assert "taken on trust" in str(found)  # the figures before
    figures = {figure.name: figure for figure in found.figures}
    exact = figures["log10 RIR (exact)"]
    assert exact.claimed == record.ratios["exact"].log10_rir
    assert exact.measured == pytest.approx(exact.claimed, abs=1e-3)
    assert figures["benign accuracy"].measured == record.metric.after


@pytest.mark.parametrize("referred", [False, True])
def test_rows_are_kept_only_to_be_compared_with_a_reference(
    referred, checkpoint, benign, harmful, reference, monkeypatch
):
    found = []
    monkeypatch.setattr(verifying, "compare", lambda record, *sides: found.extend(sides[:2]))
    checked(checkpoint, benign, harmful.remove_columns("label"), reference=reference if referred else None)
    kept = [sum(len(rows) for _, rows in now.measurement.by_image) for now, _ in found]
    assert kept == [0, 24 * referred]
    assert [now.measurement.factor.num_samples for now, _ in found] == [24, 24]


def test_images_from_a_folder_agree_also_by_a_config_without_label2id(checkpoint, benign, harmful, tmp_path):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"label2id": None}))
    for name, data in (("benign", benign), ("harmful", harmful)):
        data.save_to_disk(tmp_path / name)
    assert checked(checkpoint, str(tmp_path / "benign"), str(tmp_path / "harmful")).outcome == AGREES


def test_tampered_weights_differ_also_under_a_new_hash(checkpoint, benign, harmful, record, tamper):
    tamper(checkpoint)
    found = checked(checkpoint, benign, harmful)
    assert (found.outcome, found.exit_code) == (DIFFERS, 3)
    assert "model.safetensors has changed" in found.reasons[0]
    model = load_model(checkpoint)
    model.vit.layernorm.weight.data[0] *= 2.0
    model.save_pretrained(checkpoint)
    record.weights = hash_weights(checkpoint)
    write_record(checkpoint, record)
    assert outcomes(checked(checkpoint, benign, harmful))["log10 RIR (exact)"] == DIFFERS


def flattered(shift):
    def change(record):
        record.ratios["exact"].log10_rir += shift

    return change


def more_accurate(record):
    record.metric.after = min(1.0, record.metric.after + 0.1)


def another_bound(record):
    record.ratios["exact"].bound = "lower"


def in_half_precision(record):
    record.metric.after, record.metric.precision = record.metric.after - 0.015, "bf16"


def without_checksum(record):
    record.harmful.checksum = None


def without_figures(record):
    record.ratios, record.metric = {}, None
    record.benign_features.after = record.harmful_features.after = None


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        *((flattered(shift), DIFFERS) for shift in (0.002, -0.5, 3.0)),
        (flattered(0.0009), AGREES),
        (another_bound, DIFFERS),
        (more_accurate, DIFFERS),
        (in_half_precision, AGREES),
        (without_checksum, CANNOT_SAY),
        (without_figures, CANNOT_SAY),
    ],
)
def test_claims_agree_within_their_tolerance(change, outcome, checkpoint, benign, harmful, record):
    change(record)
    write_record(checkpoint, record)
    assert checked(checkpoint, benign, harmful).outcome == outcome


def test_of_other_images_nothing_can_be_said(checkpoint, benign, harmful):
    found = checked(checkpoint, harmful, benign)
    assert (found.outcome, found.exit_code) == (CANNOT_SAY, 4)
    assert "not those of the record" in str(found)
    found = checked(checkpoint, benign, harmful.select(range(20)))
    assert found.outcome == CANNOT_SAY
    assert "24 images then, 20 now" in str(found)
    other = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.4] * 3)
    assert checked(checkpoint, benign, harmful, image_processor=other).outcome == CANNOT_SAY


def test_images_are_resized_by_the_library_of_the_record(checkpoint, benign, harmful, record, monkeypatch):
    asked = []

    def remembered(folder, backend=None, **_):
        asked.append(backend)
        return ViTImageProcessorPil.from_pretrained(folder)

    monkeypatch.setattr("hf_immunize.hub.verify.AutoImageProcessor.from_pretrained", remembered)
    assert checked(checkpoint, benign, harmful).outcome == AGREES
    record.image_processor = "ViTImageProcessor"
    write_record(checkpoint, record)
    assert checked(checkpoint, benign, harmful).outcome == AGREES  # the pixels are the same
    assert asked == ["pil", None]
    record.harmful.checksum *= 1.01
    write_record(checkpoint, record)
    found = checked(checkpoint, benign, harmful)
    assert found.outcome == CANNOT_SAY
    assert "ViTImageProcessorPil and not ViTImageProcessor. Install torchvision for ViTImageProcessor" in str(found)


@pytest.mark.parametrize(("factor", "outcome"), [(1.0, AGREES), (1.005, AGREES), (1.5, DIFFERS)])
@pytest.mark.parametrize("name", ["before", "after", "conjugate_before", "conjugate_after"])
def test_probing_time_is_measured_again(factor, outcome, name, checkpoint, benign, harmful, reference, record):
    taken = getattr(record.harmful_features.probing, name)
    setattr(record.harmful_features.probing, name, max(round(factor * taken), taken + (2 if factor > 1.1 else 0)))
    write_record(checkpoint, record)
    assert checked(checkpoint, benign, harmful, reference=reference).outcome == outcome


def test_probing_time_of_classes_cannot_be_said_without_labels_and_that_of_components_needs_none(
    checkpoint, benign, harmful, reference, record
):
    found = outcomes(checked(checkpoint, benign, harmful.remove_columns("label"), reference=reference))
    assert {found[name] for name in found if "harmful probe" in name} == {CANNOT_SAY}
    assert {found[name] for name in found if "benign probe" in name} == {AGREES}
    rows = image_rows(harmful, "harmful", reference, "none")
    processor = ViTImageProcessorPil.from_pretrained(checkpoint)
    now, then = (measure(model, rows, processor, progress=False) for model in (load_model(checkpoint), reference))
    record.harmful_features = describe_side(now.measurement, then.measurement)
    assert record.harmful_features.probing.targets == "components"
    write_record(checkpoint, record)
    for images in (harmful, harmful.remove_columns("label")):
        assert checked(checkpoint, benign, images, reference=reference).outcome == AGREES
    record.harmful_features.probing = None  # as in records of earlier versions
    write_record(checkpoint, record)
    assert checked(checkpoint, benign, harmful, reference=reference).outcome == AGREES


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


def test_images_without_a_processor_are_refused(checkpoint, benign, harmful):
    (checkpoint / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match="image processor"):
        checked(checkpoint, benign, harmful)


def test_a_difference_is_allowed_where_rounding_noise_is_near():
    scales = (torch.ones(5), torch.tensor([1.0, 1.0, 1.0, 1.0, 4e-6]))
    healthy, near = (ConditioningRecord.of(feature_conditioning(torch.randn(50, 5) * scale)) for scale in scales)
    assert rounding_allowance(healthy) < 1e-4 and rounding_allowance(near) > 1e-3
