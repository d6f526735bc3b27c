"""Nearest neighbours see through an invertible linear map by whitening."""

import torch

from hf_immunize.attacks.direct import knn
from hf_immunize.attacks.probe_data import ProbeData


pytest_plugins = ["attack_fixtures"]


def test_neighbours_survive_a_linear_map(features, probe_budget):
    theta = torch.diag(torch.logspace(0, -5, features.Z.shape[1], dtype=torch.float64))
    ill = ProbeData(features.Z.double() @ theta, features.y, features.Z_test.double() @ theta, features.y_test, 4)
    before, after = (knn(data, 0, torch.float64, probe_budget).accuracy for data in (features, ill))
    assert after >= before - 0.05
