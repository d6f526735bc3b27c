"""Fixtures of the attackers' tests: data, and budgets of a second or two.

A plugin rather than a conftest.py: of two files of that name, one of which stands before ``tests/conftest.py`` in the
alphabet, only one can be collected for doctests.
"""

from dataclasses import replace

import pytest
from attacked import CLASSES, clusters, pictures, rows_of

from hf_immunize.attacks.attacker import ProbeBudget, TuningBudget
from hf_immunize.attacks.presets import find_preset
from hf_immunize.attacks.probe_data import ProbeData


@pytest.fixture
def features():
    return ProbeData(*clusters(120, 0), *clusters(80, 1), CLASSES)


@pytest.fixture
def probe_budget():
    return ProbeBudget(descent_steps=200, iterations=20, steps=60, batch_size=32)


@pytest.fixture
def tuning_budget():
    return TuningBudget(steps=60, trial_steps=15, optimizers={"adamw": (3e-3,)}, evaluations=3)


@pytest.fixture
def tiny_preset(probe_budget, tuning_budget):
    return replace(
        find_preset("quick"),
        probes=("ridge", "gd_line_search"),
        fine_tuning=("bias_only",),
        benign_attackers=("ridge",),
        probe_seeds=2,
        layer_seeds=1,
        tuning_seeds=2,
        max_layers=2,
        probe_budget=probe_budget,
        tuning_budget=replace(tuning_budget, steps=4, trial_steps=2),
    )


@pytest.fixture
def harmful():
    return rows_of(*pictures(40, 0)), rows_of(*pictures(24, 1))
