"""Every attacker on fixed features really attacks, and does the same under the same seed."""

from dataclasses import replace

import pytest
import torch

from hf_immunize.attacks.attacker import PROBES
from hf_immunize.attacks.presets import ALL_ATTACKERS, FINE_TUNING, PRESETS, RESTORING
from hf_immunize.attacks.probe_data import ProbeData


pytest_plugins = ["attack_fixtures"]


CHANCE, MARGIN = 0.25, 0.5
DTYPES = [torch.float64, torch.float32]


@pytest.mark.outcome
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROBES)
def test_beats_chance_by_fifty_points(name, dtype, features, probe_budget):
    assert PROBES[name](features, 0, dtype, probe_budget).accuracy > CHANCE + MARGIN


@pytest.mark.parametrize("name", PROBES)
def test_same_seed_gives_the_same_finding(name, features, probe_budget):
    again = ProbeData(features.Z, features.y, features.Z_test, features.y_test, features.num_classes)
    assert PROBES[name](features, 1, torch.float64, probe_budget) == PROBES[name](
        again, 1, torch.float64, probe_budget
    )


@pytest.mark.parametrize("name", PROBES)
def test_collapsed_features_are_read_at_chance(name, features, probe_budget):
    dead = ProbeData(torch.zeros_like(features.Z), features.y, torch.zeros_like(features.Z_test), features.y_test, 4)
    found = PROBES[name](dead, 0, torch.float64, probe_budget)
    assert found.status == "diverged" or found.accuracy == pytest.approx(CHANCE)


@pytest.mark.outcome
@pytest.mark.parametrize("name", PROBES)
def test_features_of_tiny_scale_are_read_all_the_same(name, features, probe_budget):
    small = ProbeData(1e-6 * features.Z, features.y, 1e-6 * features.Z_test, features.y_test, 4)
    assert PROBES[name](small, 0, torch.float32, probe_budget).accuracy > CHANCE + MARGIN


@pytest.mark.outcome
@pytest.mark.parametrize("name", PROBES)
def test_a_class_with_one_image_is_no_obstacle(name, features, probe_budget):
    Z, y = torch.cat([features.Z, features.Z[:1]]), torch.cat([features.y, torch.tensor([4])])
    data = ProbeData(Z, y, features.Z_test, features.y_test, 5)
    assert PROBES[name](data, 0, torch.float64, probe_budget).accuracy > CHANCE + MARGIN


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw", "batchnorm_adamw"])
def test_divergence_is_recorded_and_has_no_accuracy(name, features, probe_budget):
    # Labels that features say nothing about, and rates that only throw the weights about.
    noise = torch.randint(0, 4, features.y.shape, generator=torch.Generator().manual_seed(5))
    data = ProbeData(features.Z, noise, features.Z_test, features.y_test, 4)
    found = PROBES[name](data, 0, torch.float32, replace(probe_budget, rates=(1e30,)))
    assert (found.status, found.accuracy) == ("diverged", None)


@pytest.mark.parametrize("name", PROBES)
def test_no_setting_is_chosen_by_the_test_images(name, features, probe_budget):
    other = ProbeData(features.Z, features.y, -features.Z_test, features.y_test.flip(0), features.num_classes)
    found = [PROBES[name](data, 0, torch.float64, probe_budget) for data in (features, other)]
    assert found[0].settings == found[1].settings


def test_presets_name_known_probes():
    named = {name for p in PRESETS.values() for name in (*p.probes, *p.layer_probes, *p.flattened_probes)}
    assert named <= set(PROBES)


def test_every_attacker_is_one_of_those_that_are_tested_to_attack_and_to_repeat_themselves():
    # PROBES above, FINE_TUNING in test_finetune.py, RESTORING in test_restore.py.
    used = {name for p in PRESETS.values() for name in (*p.probes, *p.fine_tuning, *p.restoring)}
    assert used <= set(ALL_ATTACKERS) == {*PROBES, *FINE_TUNING, *RESTORING}
