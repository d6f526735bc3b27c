"""Every attacker of the list attacks, sees nothing where there is nothing, keeps to its budget and repeats itself."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from attacked import CLASSES, clusters, pictures, tiny_resnet, tiny_vit

from hf_immunize.attacks.attacker import Found, Part, ProbeBudget, ProbeData, TuningBudget, guarded
from hf_immunize.attacks.presets import ATTACKERS, PRESETS, find_preset
from hf_immunize.errors import ArgumentError
from hf_immunize.spectra.ratio import relative_immunization_ratio


CHANCE = 1 / CLASSES
QUICK = PRESETS["quick"]
PROBES = ProbeBudget(descent_steps=200, iterations=20, steps=60, batch_size=32)
TUNING = TuningBudget(steps=60, trial_steps=15, optimizers={"adamw": (3e-3,)}, evaluations=3)
ON_FEATURES = [one.name for one in ATTACKERS.values() if one.access == "head_input"]
WITH_WEIGHTS = [one.name for one in ATTACKERS.values() if one.access == "fine_tuning" and not one.restores]
MINIBATCH = ["sgd", "momentum", "adam", "adamw", "batchnorm_adamw"]
every_attacker = pytest.mark.parametrize("name", ATTACKERS)


def attack(name, change=lambda *rows: rows, seed=0, **budget):
    """Run an attacker on points or pictures of four colours, after a change of ``(Z, y, Z_test, y_test)``."""
    one = ATTACKERS[name]
    if name in WITH_WEIGHTS:
        rows = change(*pictures(80, 0), *pictures(40, 1))
        model = next(model for model in (tiny_vit(), tiny_resnet()) if one.applies(model))
        return one.run(model, Part(*rows, CLASSES), replace(TUNING, **budget), seed)
    rows = change(*clusters(120, 0), *clusters(80, 1))
    data = ProbeData(*rows, int(rows[1].max()) + 1)
    return one.run(data, replace(PROBES, **budget), seed)


def noise(*rows):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(part.shape, generator=generator) if part.is_floating_point() else part for part in rows]


def of_tiny_scale(Z, y, Z_test, y_test):
    return 1e-6 * Z, y, 1e-6 * Z_test, y_test


def with_a_lonely_class(Z, y, *test):
    return torch.cat([Z, Z[:1]]), torch.cat([y, torch.tensor([CLASSES])]), *test


AS_THEY_ARE = ("as they are", lambda *rows: rows)
CASES = [(name, AS_THEY_ARE) for name in ATTACKERS]
CASES += [(name, ("tiny scale", of_tiny_scale)) for name in ON_FEATURES]
CASES += [(name, ("a class with one image", with_a_lonely_class)) for name in ON_FEATURES]
in_every_case = pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}, {case[0]}" for name, case in CASES])


@pytest.mark.outcome
@pytest.mark.parametrize("seed", [0, 1, 2])
@in_every_case
def test_reads_classes_that_are_separable(name, case, seed):
    """The control, in which it may not, is the next test."""
    margin = 0.5 if ATTACKERS[name].access == "head_input" else 0.3
    assert attack(name, case[1], seed).accuracy > CHANCE + margin


@in_every_case
def test_is_blind_where_images_say_nothing_about_labels(name, case):
    found = attack(name, lambda *rows: case[1](*noise(*rows)))
    assert found.status == "diverged" or found.accuracy < CHANCE + 0.25


@every_attacker
def test_reads_collapsed_images_at_chance(name):
    found = attack(name, lambda Z, y, Z_test, y_test: (0 * Z, y, 0 * Z_test, y_test), steps=8)
    assert found.status == "diverged" or found.accuracy == pytest.approx(CHANCE)


@every_attacker
def test_the_same_seed_gives_the_same_finding(name):
    assert attack(name, seed=3, steps=4) == attack(name, seed=3, steps=4)


@every_attacker
def test_takes_no_more_steps_than_its_budget(name):
    found = attack(name, steps=7, **({} if name in WITH_WEIGHTS else {"iterations": 7, "descent_steps": 7}))
    assert len(found.steps) == len(found.curve)
    if ATTACKERS[name].counts == "images":
        return
    assert max(found.steps, default=0) <= 7
    assert bool(found.steps) <= (not ATTACKERS[name].closed_form)


def test_of_few_images_every_class_has_some_and_more_are_added_to_them(monkeypatch):
    given = []

    def ridge(data, budget, seed):
        given.append(data)
        return Found(0.5)

    monkeypatch.setattr("hf_immunize.attacks.probes.ridge", ridge)
    Z = torch.arange(103.0)[:, None]
    y = (Z[:, 0] % CLASSES).long()
    found = ATTACKERS["few_images"].run(ProbeData(Z, y, Z, y, CLASSES), PROBES, 0)
    assert found.steps[0] == 2 * CLASSES and found.steps[-1] == 103 and len(found.curve) == len(found.steps) >= 6
    for fewer, more in itertools.pairwise(given):
        assert torch.equal(fewer.Z, more.Z[: len(fewer.Z)])
        assert max(fewer.y.bincount()) - min(fewer.y.bincount()) <= 1


@every_attacker
def test_no_setting_is_chosen_by_the_test_images(name):
    found = [
        attack(
            name,
            lambda Z, y, Z_test, y_test, sign=sign: (Z, y, sign * Z_test, (y_test + (sign < 0)) % CLASSES),
            steps=8,
        )
        for sign in (1, -1)
    ]
    assert found[0].settings == found[1].settings


@pytest.mark.parametrize(("name", "loss"), [("ridge", 0.03), ("whitening", 0.03), ("knn", 0.05)])
def test_an_invertible_map_changes_nothing(name, loss):
    def ill(Z, y, Z_test, y_test):
        theta = torch.diag(torch.logspace(0, -5, Z.shape[1], dtype=torch.float64))
        return Z.double() @ theta, y, Z_test.double() @ theta, y_test

    assert attack(name, ill).accuracy >= attack(name).accuracy - loss


@pytest.mark.parametrize("name", [*MINIBATCH, "whole_network"])
def test_divergence_is_recorded_and_has_no_accuracy(name):
    def without_meaning(Z, y, *test):
        return Z, torch.randint(0, CLASSES, y.shape, generator=torch.Generator().manual_seed(5)), *test

    rates = {"optimizers": {"sgd": (1e30,)}} if name in WITH_WEIGHTS else {"rates": (1e30,)}
    found = attack(name, without_meaning, **rates)
    assert (found.status, found.accuracy) == ("diverged", None)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError("12 GiB"), "skipped"),
        (RuntimeError("out of memory"), "skipped"),
        (torch.linalg.LinAlgError("svd"), "diverged"),
        (RuntimeError("a mistake"), None),
    ],
)
def test_an_attack_that_the_machine_or_its_decomposition_stops_is_a_finding(error, status):
    def fails():
        raise error

    if status is None:
        with pytest.raises(RuntimeError, match="a mistake"):
            guarded(fails)
    else:
        assert (guarded(fails).status, guarded(fails).accuracy) == (status, None)


# ---- what ill-conditioning slows, and what it does not


@pytest.mark.outcome
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_on_a_linear_map_with_rir_above_1e4_descent_takes_a_hundred_times_the_steps_and_ridge_none(seed):
    """The control is a rotation, which slows nothing."""
    generator = torch.Generator().manual_seed(seed)
    train, test, benign = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (400, 200, 400))
    benign = benign * torch.tensor([100.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    theta = torch.diag(torch.tensor([0.01, 1, 1, 1, 1, 1], dtype=torch.float64))
    turned = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    sides = {"harmful": train @ theta, "harmful_reference": train}
    assert relative_immunization_ratio(**sides, benign=benign @ theta, benign_reference=benign).rir > 1e4
    y, y_test = ((part[:, 0] > 0).long() for part in (train, test))
    data = [ProbeData(train @ map_, y, test @ map_, y_test, 2) for map_ in (torch.eye(6).double(), turned, theta)]
    found = [ATTACKERS["gd_line_search"].run(one, ProbeBudget(), 0) for one in data]
    fast, control, slow = (
        next(step for step, value in zip(one.steps, one.curve, strict=True) if value >= 0.9) for one in found
    )
    assert slow >= 100 * fast and control == fast
    ridge = [ATTACKERS["ridge"].run(one, ProbeBudget(), 0).accuracy for one in data]
    assert max(ridge) - min(ridge) <= 0.01


def test_removing_directions_that_rule_gives_descent_its_speed_back():
    def ruled(Z, y, Z_test, y_test):
        generator = torch.Generator().manual_seed(2)
        scales = torch.logspace(2, 4, 3)
        loud = torch.randn(len(Z) + len(Z_test), 3, generator=generator) * scales
        loud = loud @ torch.linalg.qr(torch.randn(Z.shape[1], 3, generator=generator)).Q.mT
        return Z + loud[: len(Z)], y, Z_test + loud[len(Z) :], y_test

    plain, found = attack("gd_line_search", ruled), attack("deflated_descent", ruled)
    assert plain.accuracy < CHANCE + 0.25 and found.accuracy > CHANCE + 0.5
    assert found.settings["directions_removed"] > 0 and found.steps[-1] == plain.steps[-1]


# ---- the list


def test_every_attacker_is_in_a_preset_and_every_preset_has_one_that_conditioning_cannot_slow():
    assert set(ATTACKERS) == set(PRESETS["full"].attackers)
    assert len({one.label for one in ATTACKERS.values()}) == len(ATTACKERS)
    for preset in PRESETS.values():
        assert "ridge" in preset.probes and set(QUICK.attackers) <= set(preset.attackers)


@pytest.mark.parametrize(
    ("ask", "named"),
    [
        (lambda: find_preset("fast"), "quick, standard, full"),
        (lambda: QUICK.only(["ridge", "magic"]), "magic"),
        (lambda: replace(QUICK, probes=("magic",)), "magic"),
    ],
)
def test_an_unknown_name_is_named(ask, named):
    with pytest.raises(ArgumentError, match=named):
        ask()


def test_what_is_asked_for_is_what_runs_and_a_changed_budget_is_in_the_name():
    chosen = find_preset("standard").only(["adam", "lora_r2", "restore_swap"])
    assert (chosen.probes, chosen.fine_tuning, chosen.restoring) == (("adam",), ("lora_r2",), ("restore_swap",))
    assert chosen.attackers == ("adam", "lora_r2", "restore_swap")
    changed = QUICK.changed(steps=40, seeds=4)
    assert changed.name == "quick, changed" and QUICK.changed() is QUICK
    assert (changed.probe_budget.steps, changed.tuning_budget.steps, changed.tuning_budget.trial_steps) == (40, 40, 10)
    assert (changed.probe_seeds, changed.layer_seeds, changed.tuning_seeds) == (4, 4, 4)


@pytest.mark.parametrize("value", [0, -1, 2.5, "3", True, math.nan, math.inf])
def test_a_budget_is_a_positive_number(value):
    for asked in ("steps", "seeds"):
        with pytest.raises(ArgumentError, match=asked):
            QUICK.changed(**{asked: value})
