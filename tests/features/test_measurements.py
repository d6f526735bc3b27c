"""Features of a data set are known again by their images, in whatever order and batches, and compared by κ and RIR."""

import math

import pytest
import torch

from hf_immunize.features.extract import Measurement, load_measurements, save_measurements, spectral_metrics


def measured(tensor, pixels=None):
    measurement = Measurement()
    measurement.update(tensor, torch.ones(len(tensor), 3, 2, 2) if pixels is None else pixels)
    return measurement


def test_lost_harmful_rank_is_flagged_and_rank_lost_on_both_sides_makes_no_statement():
    start = torch.randn(20, 4, dtype=torch.float64)
    lost = start * torch.tensor([0.0, 1, 1, 1], dtype=torch.float64)
    metrics = spectral_metrics(measured(start), measured(start), measured(lost), measured(start))
    assert (metrics["rir_is_lower_bound"], metrics["rir_is_upper_bound"]) == (1.0, 0.0)
    assert metrics["harmful_rank"] == 3.0 and metrics["rir"] > 1e10
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


def test_neither_order_nor_processes_nor_batches_of_the_images_matter():
    z, pixels = torch.randn(60, 4), torch.randn(60, 3, 2, 2)
    whole, dealt, batches = measured(z, pixels), Measurement(), Measurement()
    for part in (slice(1, None, 2), slice(0, None, 2)):
        dealt.merge(measured(z[part], pixels[part]))
    for part in (slice(0, 40), slice(40, 60)):
        batches.update(z[part], pixels[part])
    for found in (dealt, batches):
        assert found.same_data(whole)
        expected = whole.factor.conditioning()
        assert found.factor.conditioning().log_kappa == pytest.approx(expected.log_kappa, rel=1e-12)
        assert found.factor.conditioning().rank == expected.rank


def test_measurements_survive_a_file(tmp_path):
    before = {"eval": measured(torch.randn(20, 4)), "eval_a/b": measured(torch.randn(3, 4))}
    save_measurements(tmp_path / "state", before)
    after = load_measurements(tmp_path / "state")
    assert set(after) == set(before)
    for name, measurement in before.items():
        assert measurement.same_data(after[name])
        assert measurement.factor.conditioning() == after[name].factor.conditioning()
