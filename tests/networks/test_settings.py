"""Experiments, methods, names and data of the experiments on networks."""

import pytest
import yaml
from networks_fixtures import experiment

from examples.networks import data
from examples.networks.__main__ import main, parse
from examples.networks.methods import BASELINES, METHODS, PAPER, TITLES
from examples.networks.plan import planned_runs
from examples.networks.settings import (
    Run,
    check_changes,
    differences,
    experiment_names,
    load_experiment,
    parse_changes,
)
from examples.networks.training import decisive, write_arguments
from examples.networks.trials import known
from hf_immunize.errors import ArgumentError, DataError
from hf_immunize.training.arguments import ImmunizationArguments, Method


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_valid(method, tmp_path):
    with known():
        args = ImmunizationArguments(str(tmp_path), report_to="none", use_cpu=True, **METHODS[method])
        assert Method.of(args).objective == METHODS[method].get("objective", Method.objective)


def test_under_our_recipe_only_the_objective_differs():
    assert all(METHODS[f"{name}_ours"] == {"objective": name} for name in BASELINES) and METHODS["default"] == {}
    assert all(METHODS[name] == {"objective": name, **PAPER} for name in BASELINES)
    assert set(TITLES) == set(METHODS)


def test_the_papers_recipe_has_no_budget_and_its_own_loss(tmp_path):
    args = ImmunizationArguments(str(tmp_path), report_to="none", use_cpu=True, **METHODS["kappa"])
    assert not Method.of(args).needs_start and args.optim == "sgd" and "momentum" in args.optim_args


@pytest.mark.parametrize("name", experiment_names())
def test_every_experiment_reads_and_its_arguments_are_valid(name, tmp_path):
    spec = load_experiment(name)
    paths = dict.fromkeys(("benign", "harmful", "distillation"), "images")
    found = data.Data(paths, {"benign": {"digest": "0"}})
    run = Run(name, seed=3, output_dir=str(tmp_path))
    file, arguments = write_arguments(run, spec, found, "model")
    assert arguments["max_steps"] == spec["training"]["max_steps"] and arguments["seed"] == 3
    assert yaml.safe_load(file.read_text())["distillation"] == "images" and arguments["distillation"]
    _, paper = write_arguments(Run(name, "kappa", output_dir=str(tmp_path)), spec, found, "model")
    # The task's own loss has no use for it.
    assert paper["optim"] == "sgd" and not paper["distillation"]


def test_experiments_are_those_of_the_plan():
    assert {run.experiment for run in planned_runs(gpu=True)} == set(experiment_names())
    assert not any("imagenet" in run.experiment for run in planned_runs() if "mobilenet" not in run.experiment)


def test_the_plan_names_each_row_once():
    names = [run.name for run in planned_runs(gpu=True)]
    assert len(names) == len(set(names)) > 40


def test_changes_are_part_of_the_name():
    run = Run("mobilenet_cars", "default", 1, parse_changes(["max_steps=700", "benign_budget=none"]))
    assert run.name == "mobilenet_cars-default-benign_budget=none-max_steps=700-seed1"
    assert "--set max_steps=700 --set benign_budget=none" in run.command()
    assert parse_changes(["learning_rate=1e-4"]) == {"learning_rate": 1e-4}


def test_a_change_with_odd_characters_is_safe_as_a_file_name_and_one_of_its_own():
    names = {Run("x", changes={"trainable": pattern}).name for pattern in (r"layer\.1[45]", r"layer\.1[46]")}
    assert len(names) == 2 and not any("/" in name or "\\" in name or "[" in name for name in names)


@pytest.mark.parametrize("changes", [{"no_such_thing": 1}, {"seed": 1}, {"output_dir": "elsewhere"}])
def test_what_is_no_argument_of_the_run_is_refused(changes):
    with pytest.raises(ArgumentError, match="--set with names"):
        check_changes(changes)


def test_unknown_methods_and_experiments_name_those_there_are():
    with pytest.raises(ArgumentError, match="kappa_ours"):
        Run("mobilenet_cars", "kapa")
    with pytest.raises(ArgumentError, match="mobilenet_cars"):
        load_experiment("mobilenet_card")


def test_a_file_gives_arguments_and_flags_override_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"experiment": "vit_cifar10", "seed": 4, "set": ["max_steps=3"]}))
    found = parse(["run", "--config", str(path), "--seed", "5"])
    assert (found.experiment, found.seed, found.set) == ("vit_cifar10", 5, ["max_steps=3"])
    path.write_text(yaml.safe_dump({"experiments": "vit_cifar10"}))
    with pytest.raises(ArgumentError, match="experiments"):
        parse(["run", "--config", str(path)])


def test_what_differs_is_named():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}}) == ["a.b: 1 → 3"]


def test_everything_that_decides_the_result_is_told(tmp_path):
    args = ImmunizationArguments(str(tmp_path), report_to="none", use_cpu=True)
    known = decisive(args)
    assert known["objective"] == args.objective and known["learning_rate"] == args.learning_rate
    assert str(tmp_path) not in str(known)


# ---- data ----


def prepared(images, tmp_path, seed=0, **parts):
    spec = yaml.safe_load(experiment(**parts))
    return data.prepare(spec, "tiny", seed, str(images), tmp_path / "shared")


def test_the_seed_decides_split_and_classes(images, tmp_path):
    one, two = prepared(images, tmp_path), prepared(images, tmp_path, seed=1)
    assert one.about["benign"]["test_rows"] != two.about["benign"]["test_rows"]
    classes = [found.load("harmful", "train").features["label"].names for found in (one, two)]
    assert classes[0] != classes[1] and len(classes[0]) == 3
    again = prepared(images, tmp_path / "again")
    assert again.about == one.about


def test_used_and_unseen_classes_are_apart_and_all_there(images, tmp_path):
    found = prepared(images, tmp_path)
    names = [set(found.load(side, "test").features["label"].names) for side in ("harmful", "unseen")]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 5


def test_training_and_held_out_images_are_apart(images, tmp_path):
    found = prepared(images, tmp_path)
    sides = [{image.tobytes() for image in found.load("benign", split)["image"]} for split in ("train", "test")]
    assert not sides[0] & sides[1] and [len(side) for side in sides] == [42, 18]


def test_the_first_source_that_is_there_is_taken(images, tmp_path):
    found = prepared(images, tmp_path, harmful={"source": ["no_such", "arms", "digits"]})
    assert found.about["harmful"]["source"] == "arms"
    far = prepared(images, tmp_path, harmful={"source": ["no_such", "digits"], "max_images": 30})
    assert far.about["harmful"]["source"] == "digits" and far.about["harmful"]["images"]["train"] == 30


def test_missing_data_are_named_with_the_remedy(images, tmp_path):
    with pytest.raises(DataError, match=r"no_such.*--data_path"):
        prepared(images, tmp_path, harmful={"source": "no_such"})


def test_other_data_at_the_same_place_are_other_data(tmp_path, images):
    first = prepared(images, tmp_path)
    assert prepared(images, tmp_path).paths == first.paths
    assert prepared(images, tmp_path, distillation={"source": "cifar10", "max_images": 13}).paths != first.paths


def test_the_list_names_every_experiment_and_method(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*experiment_names(), *METHODS])


def test_all_says_what_is_to_do(capsys, tmp_path):
    assert main(["all", "--dry_run", "--only", "vit_cifar10", "--output_dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("to do: python -m examples.networks run --experiment vit_cifar10 ") for line in lines)
