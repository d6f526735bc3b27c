"""Settings give valid runs with names of their own; the seed decides the images."""

import pytest
import yaml

from examples.experiments import tasks
from examples.experiments.methods import METHODS
from examples.experiments.settings import Run, load_settings, parse_changes, planned_runs
from examples.experiments.training import write_arguments
from examples.head_start_page import PLAN
from hf_immunize.errors import ArgumentError, DataError
from hf_immunize.training.arguments import ImmunizationArguments, Method


PAIRS = dict.fromkeys((run.backbone, run.task) for run in planned_runs(gpu=True))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_valid(method, tmp_path):
    args = ImmunizationArguments(str(tmp_path), report_to="none", use_cpu=True, **METHODS[method])
    assert Method.of(args).objective == METHODS[method].get("objective", Method.objective)


@pytest.mark.parametrize(("backbone", "task"), PAIRS)
def test_every_experiment_of_the_plan_has_valid_arguments(backbone, task, tmp_path):
    paths = dict.fromkeys(("benign", "harmful", "distillation"), "images")
    found = tasks.Data(paths, {"benign": {"digest": "0"}})
    run = Run(backbone, task, seed=3, output_dir=str(tmp_path))
    file, arguments = write_arguments(run, found, "model")
    assert arguments["max_steps"] == run.spec()["training"]["max_steps"] and arguments["seed"] == 3
    defaults = ImmunizationArguments(str(tmp_path), report_to="none", use_cpu=True)
    assert arguments["objective"] == defaults.objective and arguments["learning_rate"] == defaults.learning_rate
    assert str(tmp_path) not in str(arguments)
    assert yaml.safe_load(file.read_text())["distillation"] == "images" and arguments["distillation"]
    _, paper = write_arguments(Run(backbone, task, "kappa", output_dir=str(tmp_path)), found, "model")
    # The task's own loss has no use for it.
    assert paper["optim"] == "sgd" and paper["benign_budget"] is None and not paper["distillation"]


def test_the_plan_names_each_row_once_and_all_that_is_in_the_settings():
    names = [run.name for run in planned_runs(gpu=True)]
    assert len(names) == len(set(names)) > 40
    settings, head_start = load_settings(), {name for _, backbones, *_ in PLAN for name in backbones}
    backbones, tasks = map(set, zip(*PAIRS, strict=True))
    alone = {"vit_cifar10_seen", "resnet18_cifar10_seen", "mobilenet_distilled"}  # of the head start
    assert (backbones | alone, tasks) == (set(settings["backbones"]), set(settings["tasks"]))
    assert alone == head_start - backbones
    assert not any("imagenet" in run.backbone for run in planned_runs())


def test_changes_are_part_of_the_name_which_is_safe_for_a_file():
    run = Run("mobilenet", "cars", "default", 1, parse_changes(["max_steps=700", "benign_budget=none"]))
    assert run.name == "mobilenet_cars-default-benign_budget=none-max_steps=700-seed1"
    assert "--set max_steps=700 --set benign_budget=none" in run.command()
    assert parse_changes(["learning_rate=1e-4"]) == {"learning_rate": 1e-4}
    names = {Run("x", "y", changes={"trainable": pattern}).name for pattern in (r"layer\.1[45]", r"layer\.1[46]")}
    assert len(names) == 2 and not any("/" in name or "\\" in name or "[" in name for name in names)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"changes": {"no_such_thing": 1}}, "no_such_thing"),
        ({"changes": {"seed": 1}}, "seed"),
        ({"changes": {"output_dir": "elsewhere"}}, "output_dir"),
        ({"method": "kapa"}, "kapa"),
        ({"backbone": "mobilnet"}, "mobilnet"),
        ({"task": "card"}, "card"),
    ],
)
def test_what_is_no_part_of_a_run_is_refused_by_name(given, named):
    with pytest.raises(ArgumentError, match=f"found '?{named}"):
        Run(**{"backbone": "mobilenet", "task": "cars", **given}).spec()


@pytest.mark.parametrize(("parts", "named"), [({"harmfull": {}}, "harmfull"), ({"start": None}, "start")])
def test_settings_with_unknown_or_missing_parts_are_refused(parts, named, tiny):
    with pytest.raises(ArgumentError, match=rf"\['{named}'\]"):
        load_settings(tiny(**parts))


# ---- images ----


def test_the_seed_decides_split_and_classes(run_of):
    one, two = tasks.prepare(run_of()), tasks.prepare(run_of(seed=1))
    assert one.about["benign"]["test_rows"] != two.about["benign"]["test_rows"]
    classes = [found.load("harmful", "train").features["label"].names for found in (one, two)]
    assert classes[0] != classes[1] and len(classes[0]) == 3
    assert tasks.prepare(run_of(place="again")).about == one.about
    # Other data at the same place are other data.
    assert tasks.prepare(run_of(distillation={"source": "cifar10", "max_images": 13})).paths != one.paths


def test_classes_and_images_that_are_held_out_are_not_used(run_of):
    found = tasks.prepare(run_of())
    names = [set(found.load(side, "test").features["label"].names) for side in ("harmful", "unseen")]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 5
    sides = [{image.tobytes() for image in found.load("benign", split)["image"]} for split in ("train", "test")]
    assert not sides[0] & sides[1] and [len(side) for side in sides] == [42, 18]


def test_the_first_source_that_is_there_is_taken(run_of):
    found = tasks.prepare(run_of(harmful={"source": ["no_such", "arms", "digits"]}))
    assert found.about["harmful"]["source"] == "arms"
    far = tasks.prepare(run_of(harmful={"source": ["no_such", "digits"], "max_images": 30}))
    assert far.about["harmful"]["source"] == "digits" and far.about["harmful"]["images"]["train"] == 30
    with pytest.raises(DataError, match=r"no_such.*--data_path"):
        tasks.prepare(run_of(harmful={"source": "no_such"}))
