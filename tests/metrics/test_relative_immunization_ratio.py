"""The `evaluate` module, loaded from its path in the package without a network."""

import doctest
import math
import re
from pathlib import Path

import evaluate
import pytest
import torch

import hf_immunize
from hf_immunize import probing_time, relative_immunization_ratio
from hf_immunize.errors import ImmunizationError


FOLDER = Path(hf_immunize.__file__).parent / "metrics" / "relative_immunization_ratio"


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return evaluate.load(str(FOLDER), cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def features():
    sides = {"benign": torch.randn(30, 4), "harmful": torch.randn(20, 4)}
    scale = torch.tensor([1.0, 1.0, 1.0, 0.01])
    return {**{f"{side}_reference": z for side, z in sides.items()}, "benign": sides["benign"]} | {
        "harmful": sides["harmful"] * scale
    }


def inputs(features):
    stacked = {
        "predictions": torch.cat([features["benign"], features["harmful"]]),
        "references": torch.cat([features["benign_reference"], features["harmful_reference"]]),
        "harmful": torch.tensor([False] * 30 + [True] * 20),
    }
    return {name: value.numpy() for name, value in stacked.items()}


def test_example_of_its_description_holds(metric):
    parsed = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, "metric", None, 0)
    runner = doctest.DocTestRunner()
    assert runner.run(parsed).failed == 0


def test_code_of_the_card_runs(capsys):
    code = re.search(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)[1]
    exec(code, {})
    assert float(capsys.readouterr().out.splitlines()[-1]) == pytest.approx(100.0)


def test_with_labels_it_has_the_probing_time_of_each_side(metric, features):
    labels = torch.arange(50) % 2
    found, sides = metric.compute(**inputs(features), labels=labels.tolist()), {"benign": labels[:30]}
    for side, of in (sides | {"harmful": labels[30:]}).items():
        start = probing_time(features[f"{side}_reference"], of)
        goal = {"fractions": (0.8,), "attainable": start.attainable}
        for name, part in (("probing_steps_before", f"{side}_reference"), ("probing_steps", side)):
            assert found[f"{side}_{name}"] == probing_time(features[part], of, **goal).steps[0.8]
    growth = found["harmful_probing_steps"] / found["harmful_probing_steps_before"]
    assert found["probing_time_ratio"] == growth > 2  # the benign features are as they were
    assert "probing_time_ratio" not in metric.compute(**inputs(features))


@pytest.mark.parametrize("side", ["benign", "harmful"])
def test_a_side_of_one_class_leaves_the_other_its_probing_time(side, metric, features):
    labels, own = torch.arange(50) % 3, slice(0, 30) if side == "benign" else slice(30, 50)
    both = metric.compute(**inputs(features), labels=labels.tolist())
    labels[own] = 7
    found = metric.compute(**inputs(features), labels=labels.tolist())
    assert found.pop(f"{side}_probing_steps_before") is None
    assert found == {name: value for name, value in both.items() if name in found}
    assert {f"{side}_probing_steps", "probing_time_ratio"} <= both.keys() - found.keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("predictions", [[1.0]] * 50),
        ("labels", [0] * 50),
        ("labels", [0] * 30 + [1] * 20),
        ("labels", [0, 1]),
        ("predictions", [[math.nan] * 4] * 50),
        ("harmful", [True] * 50),
        ("harmful", [False] * 50),
        ("protocol", "nonsense"),
        ("num_groups", 10**12),
        ("seed", "a"),
        ("produced_dtype", torch.float32),
        ("produced_dtype", "int8"),
    ],
)
def test_bad_input_is_a_named_error(metric, features, name, value):
    given = inputs(features) | {"protocol": "groups", "group_size": 10} | {name: value}
    with pytest.raises(ImmunizationError):
        metric.compute(**given)


def test_batches_groups_and_bounds_are_those_of_the_library(metric, features):
    given, expected = inputs(features), relative_immunization_ratio(**features).rir
    assert metric.compute(**given)["rir"] == pytest.approx(expected, rel=1e-6)
    for start in range(0, 50, 16):
        metric.add_batch(**{name: value[start : start + 16] for name, value in given.items()})
    assert metric.compute()["rir"] == pytest.approx(expected, rel=1e-6)
    assert metric.compute(**given, protocol="groups", num_groups=2, group_size=10)["std"] > 0
    flat = torch.tensor([1.0, 1.0, 1.0, 0.0])
    features |= {"harmful": features["harmful"] * flat}
    assert metric.compute(**inputs(features))["bound"] == "lower"
    result = metric.compute(**inputs(features | {"benign": features["benign"] * flat}))
    assert result["bound"] == "undetermined" and math.isnan(result["rir"])
