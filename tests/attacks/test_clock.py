"""A budget in seconds ends a training early and whole; without one, nothing depends on the machine."""

from dataclasses import replace

import pytest
import torch
from attacked import CLASSES, pictures, tiny_vit

from hf_immunize.attacks import descent as clock
from hf_immunize.attacks.attacker import PROBES
from hf_immunize.attacks.descent import Clock
from hf_immunize.attacks.finetune import fine_tune


pytest_plugins = ["attack_fixtures"]


TRAINED = ["sgd", "momentum", "adam", "adamw", "batchnorm_adamw", "mlp"]


@pytest.fixture
def ticking(monkeypatch):
    """A clock of the machine on which a millisecond goes by at every look."""
    time = iter(range(10**9))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(time) / 1000)


def test_without_seconds_the_steps_alone_count():
    assert [Clock(4).progress(done) for done in range(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_time_ends_what_steps_would_not(ticking):
    limited = Clock(1_000_000, seconds=0.01)
    assert next(done for done in range(1, 100) if limited.over(done)) < 15


def test_the_first_step_is_always_taken():
    assert not Clock(10, seconds=0.0).over(0)


@pytest.mark.parametrize("name", TRAINED)
def test_a_probe_that_runs_out_of_time_is_a_whole_attack_of_fewer_steps(name, features, probe_budget, ticking):
    found = PROBES[name](features, 0, torch.float32, replace(probe_budget, steps=5000, seconds=0.8))
    assert 1 < found.steps[-1] < 1000
    assert found.accuracy > 0.75


def test_fine_tuning_that_runs_out_of_time_is_a_whole_attack_of_fewer_steps(tuning_budget, ticking):
    hurried = replace(tuning_budget, steps=5000, trial_steps=500, seconds=0.2)
    found = fine_tune(tiny_vit(), "whole_network", pictures(80, 0), pictures(40, 1), CLASSES, 0, hurried)
    assert 1 < found.settings["steps"] == found.steps[-1] < 200
    assert found.accuracy > 0.55


def test_every_setting_has_its_share_of_the_time(tuning_budget, ticking):
    hurried = replace(
        tuning_budget, steps=500, trial_steps=500, seconds=0.1, optimizers={"adamw": (1e-6, 3e-3), "sgd": (1e-6,)}
    )
    found = fine_tune(tiny_vit(), "whole_network", pictures(80, 0), pictures(40, 1), CLASSES, 0, hurried)
    assert (found.trials, found.settings["learning_rate"]) == (3, 3e-3)
