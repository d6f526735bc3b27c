"""What is measured beside the attacks."""

import torch

from hf_immunize.audit.run import FeatureMetrics


def noted(*tasks, collapse=False):
    Z = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metrics = FeatureMetrics([])
    for subject in ("reference", "immunized"):
        for task in tasks:
            scale = torch.ones(6, dtype=torch.float64)
            if (subject, task) == ("immunized", "harmful"):
                scale[0] = 0.0 if collapse else 1e-3
            metrics.note_features(subject, task, Z * scale, torch.float64)
    return metrics


def test_ratio_has_its_parts():
    ratio = noted("harmful", "benign").ratio()
    assert ratio["benign_ratio"] == 1.0
    assert ratio["rir"] == ratio["harmful_ratio"] > 1e5


def test_collapse_is_a_bound_and_not_good_conditioning():
    metrics = noted("harmful", "benign", collapse=True)
    assert metrics.ratio()["bound"] == "lower"
    assert [one.is_bound for one in metrics.spectra() if one.subject == "immunized"] == [True, False]


def test_without_benign_data_there_is_no_ratio():
    assert noted("harmful").ratio() == {}


def test_without_benign_data_there_is_no_utility():
    assert noted("harmful").utility() is None


def test_features_that_are_all_zero_are_said_and_not_an_error():
    warnings = []
    metrics = FeatureMetrics(warnings)
    metrics.note_features("immunized", "harmful", torch.zeros(6, 3), torch.float32)
    assert metrics.spectra() == [] and "all zero" in " ".join(warnings).replace("are zero", "all zero")
