"""Every attacker of the list attacks, sees nothing where there is nothing, keeps to its budget and repeats itself."""

from dataclasses import replace

import pytest
import torch
from attacked import CLASSES, clusters, pictures, tiny_vit

from hf_immunize.attacks import descent
from hf_immunize.attacks.attacker import Attacker, Found, ProbeBudget, TuningBudget
from hf_immunize.attacks.presets import ATTACKERS, PRESETS, find_attacker, find_preset
from hf_immunize.attacks.probe_data import Part, ProbeData
from hf_immunize.audit.names import label
from hf_immunize.spectra.ratio import relative_immunization_ratio


CHANCE = 1 / CLASSES
PROBES = ProbeBudget(descent_steps=200, iterations=20, steps=60, batch_size=32)
TUNING = TuningBudget(steps=60, trial_steps=15, optimizers={"adamw": (3e-3,)}, evaluations=3)
ON_FEATURES = [one.name for one in ATTACKERS.values() if one.access == "head_input"]
MINIBATCH = ["sgd", "momentum", "adam", "adamw", "batchnorm_adamw"]
TIMED = [*MINIBATCH, "mlp", "last_stage", "whole_network", "bias_only", "lora_r8"]
every_attacker = pytest.mark.parametrize("name", ATTACKERS)
on_features = pytest.mark.parametrize("name", ON_FEATURES)


def attack(name, change=lambda *rows: rows, seed=0, dtype=torch.float64, **budget):
    """Run an attacker on points or pictures of four colours, after a change of ``(Z, y, Z_test, y_test)``."""
    one = ATTACKERS[name]
    if one.access == "fine_tuning" and not one.shares:
        rows = change(*pictures(80, 0), *pictures(40, 1))
        return one.run(tiny_vit(), Part(*rows, CLASSES), replace(TUNING, **budget), seed)
    rows = change(*clusters(120, 0), *clusters(80, 1))
    data = ProbeData(*rows, int(rows[1].max()) + 1).at(dtype)
    given = dict.fromkeys(one.shares, data) if one.shares else data
    return one.run(given, replace(PROBES, **budget), seed)


@pytest.mark.outcome
@pytest.mark.parametrize("seed", [0, 1, 2])
@every_attacker
def test_reads_classes_that_are_separable(name, seed):
    """The controls, in which it may not, are the two tests below."""
    assert attack(name, seed=seed).accuracy > CHANCE + (0.5 if ATTACKERS[name].access == "head_input" else 0.3)


@every_attacker
def test_is_blind_where_images_say_nothing_about_labels(name):
    def noise(*rows):
        generator = torch.Generator().manual_seed(5)
        return [torch.randn(part.shape, generator=generator) if part.is_floating_point() else part for part in rows]

    found = attack(name, noise)
    assert found.status == "diverged" or found.accuracy < CHANCE + 0.25


@every_attacker
def test_reads_collapsed_images_at_chance(name):
    found = attack(name, lambda Z, y, Z_test, y_test: (0 * Z, y, 0 * Z_test, y_test))
    assert found.status == "diverged" or found.accuracy == pytest.approx(CHANCE)


@every_attacker
def test_the_same_seed_gives_the_same_finding(name):
    short = {"steps": 4}
    assert attack(name, seed=3, **short) == attack(name, seed=3, **short)


@every_attacker
def test_takes_no_more_steps_than_its_budget(name):
    weights = ATTACKERS[name].access == "fine_tuning" and not ATTACKERS[name].shares
    counts = {"steps": 7} if weights else {"steps": 7, "iterations": 7, "descent_steps": 7}
    found = attack(name, **counts)
    assert len(found.steps) == len(found.curve) and max(found.steps, default=0) <= 7
    assert bool(found.steps) <= (not ATTACKERS[name].closed_form)


@every_attacker
def test_no_setting_is_chosen_by_the_test_images(name):
    found = [
        attack(name, lambda Z, y, Z_test, y_test, sign=sign: (Z, y, sign * Z_test, (y_test + (sign < 0)) % CLASSES))
        for sign in (1, -1)
    ]
    assert found[0].settings == found[1].settings


@pytest.mark.outcome
@on_features
def test_reads_features_of_tiny_scale_in_float32(name):
    def shrink(Z, y, Z_test, y_test):
        return 1e-6 * Z, y, 1e-6 * Z_test, y_test

    assert attack(name, shrink, dtype=torch.float32).accuracy > CHANCE + 0.5


@pytest.mark.outcome
@on_features
def test_a_class_with_one_image_is_no_obstacle(name):
    def lonely(Z, y, *test):
        return torch.cat([Z, Z[:1]]), torch.cat([y, torch.tensor([CLASSES])]), *test

    assert attack(name, lonely).accuracy > CHANCE + 0.5


@pytest.mark.parametrize(("name", "loss"), [("ridge", 0.03), ("whitening", 0.03), ("knn", 0.05)])
def test_an_invertible_map_changes_nothing(name, loss):
    def ill(Z, y, Z_test, y_test):
        theta = torch.diag(torch.logspace(0, -5, Z.shape[1], dtype=torch.float64))
        return Z.double() @ theta, y, Z_test.double() @ theta, y_test

    assert attack(name, ill).accuracy >= attack(name).accuracy - loss


@pytest.mark.parametrize("name", [*MINIBATCH, "whole_network"])
def test_divergence_is_recorded_and_has_no_accuracy(name):
    def noise(Z, y, *test):
        return Z, torch.randint(0, CLASSES, y.shape, generator=torch.Generator().manual_seed(5)), *test

    rates = {"optimizers": {"sgd": (1e30,)}} if name == "whole_network" else {"rates": (1e30,)}
    found = attack(name, noise, dtype=torch.float32, **rates)
    assert (found.status, found.accuracy) == ("diverged", None)


@pytest.fixture
def ticking(monkeypatch):
    """A clock of the machine on which a millisecond goes by at every look."""
    time = iter(range(10**9))
    monkeypatch.setattr(descent.time, "perf_counter", lambda: next(time) / 1000)


@pytest.mark.parametrize("name", TIMED)
def test_an_attack_that_runs_out_of_time_is_a_whole_attack_of_fewer_steps(name, ticking):
    weights = ATTACKERS[name].access == "fine_tuning"
    found = attack(name, steps=5000, seconds=0.2 if weights else 0.8, **({"trial_steps": 500} if weights else {}))
    assert 1 < found.steps[-1] < 1000
    assert found.accuracy > CHANCE + 0.3


def test_time_ends_what_steps_would_not_but_never_before_the_first_step(ticking):
    limited = descent.Clock(1_000_000, seconds=0.01)
    assert next(done for done in range(1, 100) if limited.over(done)) < 15
    assert not descent.Clock(10, seconds=0.0).over(0)


def test_every_setting_has_its_share_of_the_time(ticking):
    grid = {"adamw": (1e-6, 3e-3), "sgd": (1e-6,)}
    found = attack("whole_network", steps=500, trial_steps=500, seconds=0.1, optimizers=grid)
    assert (found.trials, found.settings["learning_rate"]) == (3, 3e-3)


# ---- what ill-conditioning slows, and what it does not


@pytest.mark.outcome
def test_on_a_linear_map_with_rir_above_1e4_descent_takes_a_hundred_times_the_steps_and_ridge_none():
    generator = torch.Generator().manual_seed(3)
    train, test, benign = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (400, 200, 400))
    benign = benign * torch.tensor([100.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    theta = torch.diag(torch.tensor([0.01, 1, 1, 1, 1, 1], dtype=torch.float64))
    sides = {"harmful": train @ theta, "harmful_reference": train}
    assert relative_immunization_ratio(**sides, benign=benign @ theta, benign_reference=benign).rir > 1e4
    labels = [(part[:, 0] > 0).long() for part in (train, test)]
    data = [ProbeData(train @ map_, labels[0], test @ map_, labels[1], 2) for map_ in (torch.eye(6).double(), theta)]
    budget = ProbeBudget(descent_steps=100_000)
    found = [ATTACKERS["gd_line_search"].run(one, budget, 0) for one in data]
    fast, slow = (next(step for step, value in zip(f.steps, f.curve, strict=True) if value >= 0.9) for f in found)
    assert slow >= 100 * fast
    assert found[0].accuracy == found[0].curve[found[0].steps.index(found[0].settings["stop"])]
    ridge = [ATTACKERS["ridge"].run(one, budget, 0).accuracy for one in data]
    assert abs(ridge[0] - ridge[1]) <= 0.01


# ---- the list


def test_every_attacker_is_in_a_preset_has_a_label_and_a_name_of_its_own():
    assert set(ATTACKERS) == set(PRESETS["full"].attackers)
    assert all(label(name) == one.label and one.name == name for name, one in ATTACKERS.items())
    assert len({one.label for one in ATTACKERS.values()}) == len(ATTACKERS)


def test_an_attacker_in_the_list_is_all_that_an_audit_needs(monkeypatch):
    nearest = Attacker("nearest_mean", "the nearest mean", "head_input", True, lambda *_: Found(0.5))
    monkeypatch.setitem(ATTACKERS, "nearest_mean", nearest)
    assert find_preset("quick").only(["nearest_mean"]).probes == ("nearest_mean",)
    assert label("nearest_mean") == "the nearest mean"


@pytest.mark.parametrize(("name", "known"), [("lora_r4", True), ("lora_r0", False), ("lora_r", False), ("", False)])
def test_adapters_of_any_rank_have_a_name(name, known):
    assert (find_attacker(name) is not None) == known
