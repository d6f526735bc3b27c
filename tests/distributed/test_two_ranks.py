"""Two processes compute what one would on the whole batch, and each goes on from where the other stopped.

All in one file, so that they share two starts of processes wherever the tests run.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers as hf
from hub_server import USER

from hf_immunize.files import checked
from hf_immunize.hub.load import changed_weights, load_model
from hf_immunize.hub.record import read_record
from hf_immunize.hub.verify import verify
from hf_immunize.training.checkpoints import MANIFEST, last_whole_checkpoint
from hf_immunize.training.objectives import OBJECTIVES


INSIDE = [name for name, kind in OBJECTIVES.items() if kind.looks_inside()]
pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SPECTRAL = [name for name, kind in OBJECTIVES.items() if not (kind.needs_rows or name in INSIDE)]
# A ViT has no ReLU to train with.
TRAINED = [name for name in OBJECTIVES if name not in INSIDE]
RUNS = ["fixed", "adam", "defaults", "cached"]
RUNS += [f"summed {name}" for name in (*SPECTRAL, "distilled")]
EXACTLY = [*TRAINED, "distilled", "defaults", "both", "dead_relu"]


def same_weights(found, expected, tolerance):
    """Relative to each tensor's own size, where that is more than rounding: the bias of attention's keys is not."""
    assert found.keys() == expected.keys()
    some, wanted = ({name: torch.tensor(v, dtype=torch.float64) for name, v in of.items()} for of in (found, expected))
    least = 1e-3 * max(float(values.norm()) for values in wanted.values())
    for name, values in wanted.items():
        assert float((some[name] - values).norm()) < tolerance * max(least, float(values.norm())), name


def same_gradients(found, expected, tolerance):
    assert len(found) == len(expected) > 0
    for some, wanted in zip(found, expected, strict=True):
        some, wanted = (torch.tensor(each, dtype=torch.float64) for each in (some, wanted))
        assert float((some - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_gradients_of_every_objective_are_exact(objective, dtype, tolerance, one, two):
    case = f"{objective} {dtype} rows"
    same_gradients(two["gradients"][case], one["gradients"][case], tolerance)


def test_three_processes_of_two_launchers_compute_what_one_does(one, three):
    found, _, _ = three
    for case, expected in one["gradients"].items():
        same_gradients(found["gradients"][case], expected, 1e-12 if "float64" in case else 1e-6)
    expected = one["runs"]["defaults"]
    same_weights(found["run"]["weights"], expected["weights"], 1e-4)
    assert found["run"]["metrics"] == pytest.approx(expected["metrics"], rel=1e-3, abs=1e-6)


def test_in_bfloat16_two_processes_move_the_weights_as_one_does_to_its_rounding(one, two, script):
    start = {name: value.flatten().tolist() for name, value in script.vit().named_parameters()}

    def moved(run):
        return torch.cat([torch.tensor(v) - torch.tensor(start[name]) for name, v in run["weights"].items()])

    found, expected, whole = (
        moved(of["runs"][name]) for of, name in ((two, "bf16"), (one, "bf16"), (one, "defaults"))
    )
    assert float((found - expected).norm() / expected.norm()) < 0.1
    assert float((whole - expected).norm()) > 0  # it was another precision


@pytest.mark.parametrize("objective", SPECTRAL)
def test_gradients_by_the_summed_hessian_are_those_of_one_process_by_its_features(objective, one, two):
    found, expected = two["gradients"][f"{objective} float32 sum"], one["gradients"][f"{objective} float32 rows"]
    same_gradients(found, expected, 1e-6)


def test_hessians_are_summed_where_they_are_smaller_and_choices_are_those_of_the_first_process(one, two):
    assert (one["world_size"], two["world_size"]) == (1, 2) and two["main"] == {"rank": 0}
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-6)  # of the mean loss's gradient
    # Of both sides, in two steps of each run.
    assert (one["sums"], two["sums"]) == (0, 2 * 2 * (len(SPECTRAL) + 1))


@pytest.mark.parametrize("name", RUNS)
def test_weights_logs_and_metrics_are_those_of_one_process(name, one, two):
    found, expected = two["runs"][name], one["runs"][name]
    same_weights(found["weights"], expected["weights"], 1e-4)
    # A divergence of 1e-9 is rounding.
    assert found["log"] == pytest.approx(expected["log"], rel=1e-4, abs=1e-7)
    # Of a ratio near 1 the logarithm is near 0.
    assert (
        found["metrics"] == pytest.approx(expected["metrics"], rel=1e-3, abs=1e-6) and "eval_rir" in found["metrics"]
    )


@pytest.mark.parametrize("name", EXACTLY)
def test_in_float64_weights_and_metrics_are_those_of_one_process_to_rounding(name, one, two):
    found, expected = two["exactly"][name], one["exactly"][name]
    same_weights(found["weights"], expected["weights"], 1e-9)
    assert {"eval_rir", "eval_benign_log10_kappa", "eval_harmful_log10_kappa"} <= set(expected["metrics"])
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-9, nan_ok=True)


def test_all_processes_keep_the_same_weights_and_report_the_same_metrics(two):
    first, second = (each["exactly"] for each in two["each"])
    for name, run in first.items():
        assert (run["metrics"], run["weights"]) == (second[name]["metrics"], second[name]["weights"])


@pytest.mark.parametrize(("name", "count"), [("one image", 1), *((f"stream of {n}", n) for n in (8, 11, 13))])
def test_awkward_sets_are_measured_of_each_image_once(name, count, one, two):
    assert two["measured"][name][0] == one["measured"][name][0] == count
    assert two["measured"][name][1] == pytest.approx(one["measured"][name][1], rel=1e-12)


@pytest.mark.parametrize("objective", ["time", "imma"])
def test_beside_someone_elses_trainer_steps_end_at_the_same_weights(objective, one, two):
    same_weights(two["beside"][objective], one["beside"][objective], 1e-4)


# ---- sharded weights ----


def spectral(metrics):
    return [name for name in metrics if any(part in name for part in ("kappa", "rir", "probing_steps"))]


def weights_in(folder, names):
    state = load_model(folder).state_dict()
    return {name: state[name].flatten().tolist() for name in names}


def ended_as_one_process_does(found, folder, expected, hub):
    """Weights and figures of a run and of one that went on from its middle; what was pushed is what was saved."""
    saved, resumed = (weights_in(folder / name, expected["weights"]) for name in ("saved", "resumed"))
    same_weights(saved, expected["weights"], 1e-4)
    same_weights(resumed, saved, 1e-6)
    (folder / "pushed").mkdir()
    for name, content in hub.files(f"{USER}/{folder.name}").items():
        (folder / "pushed" / name).write_bytes(content)
    assert weights_in(folder / "pushed", saved) == saved
    for name in ("saved", "pushed"):
        record = read_record(folder / name)
        assert set(record.ratios) == {"exact", "intercept"} and not changed_weights(folder / name, record.weights)
    assert "NaN" in found["lost"] and not (folder / "lost" / "config.json").exists()
    metrics = [name for name in spectral(found["metrics"]) if name in expected["metrics"]]
    assert {"eval_rir", "eval_intercept_rir"} <= set(metrics)
    for name in metrics:
        assert found["metrics"][name] == pytest.approx(expected["metrics"][name], rel=1e-3, abs=1e-6), name
    # What went on measures the start again, through the copy.
    for now, then in (("started", "before"), ("resumed", "metrics")):
        for name in ("eval_accuracy", "eval_loss", *spectral(found[then])):
            assert found[now][name] == pytest.approx(found[then][name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_weights_end_where_one_process_does_and_are_measured_saved_whole_pushed_and_resumed(
    engine, one, two, two_folder, served
):
    assert two[engine]["in_parts"] == (engine == "fsdp2")
    ended_as_one_process_does(two[engine], two_folder / engine, one["runs"]["defaults"], served)


def test_what_cannot_be_sharded_is_refused(two):
    assert "ViTEmbeddings" in two["fsdp2"]["refused"]


def verified(folder, images):
    """Whether what the command wrote loads, and is what its record says."""
    sides = {"benign": str(images / "pets"), "harmful": str(images / "weapons")}
    found = verify(folder, **sides, reference=images / "model", progress=False)
    assert found.outcome == "agrees", found.reasons
    record, results = read_record(folder), json.loads((folder / "results.json").read_text())
    assert set(record.ratios) == {"exact", "intercept"} and record.harmful_features.probing is not None
    assert record.metric.before == results["before"]["eval_accuracy"]


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install deepspeed")
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_with_deepspeed_processes_end_where_one_does(stage, one, zero, images, served):
    folder, found = zero
    assert found[stage]["in_parts"] == (stage == "3")
    ended_as_one_process_does(found[stage], folder / f"zero{stage}", one["runs"]["defaults"], served)
    verified(folder / f"command{stage}", images)  # of ZeRO 3 too, under which transformers alone loads parts


@pytest.mark.parametrize("how", ["whole_weights", "parts"])
def test_the_train_command_writes_on_two_processes_what_loads_and_verifies(how, two_folder, images):
    folder = two_folder / how
    verified(folder, images)
    whole = load_model(two_folder / "whole_weights").state_dict()
    states = {name: value.flatten().tolist() for name, value in load_model(folder).state_dict().items()}
    same_weights(states, {name: value.flatten().tolist() for name, value in whole.items()}, 1e-4)


# ---- runs that were interrupted ----


def test_one_process_goes_on_from_two(one, two_folder, script, tmp_path):
    found = script.resumed(two_folder / "whole", tmp_path / "from_two", last=3)
    assert found["step"] == 5
    same_weights(found["weights"], one["whole"]["weights"], 1e-9)


def test_two_processes_go_on_from_one(one, two):
    assert two["from_one"]["step"] == 5
    same_weights(two["from_one"]["weights"], one["whole"]["weights"], 1e-9)
    for found in ("from_one", "whole"):
        assert two[found]["metrics"] == pytest.approx(one["whole"]["metrics"], rel=1e-3)


def test_a_dead_process_ends_the_run_with_an_error_and_leaves_a_whole_checkpoint(killed):
    folder, ended, seconds = killed
    assert ended.returncode != 0 and "SIGKILL" in ended.stderr + ended.stdout
    assert seconds < 60
    path, _ = last_whole_checkpoint(str(folder))
    assert path is not None and path.rpartition("-")[2] in ("2", "3")
    listed = checked((Path(path) / MANIFEST).read_text(encoding="utf-8"))["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= set(listed)


def test_a_process_that_dies_ends_those_of_another_launcher_too(three):
    _, ended, seconds = three
    assert all(each.returncode != 0 for each in ended) and seconds < 60


def test_a_run_resumed_after_a_death_ends_as_the_one_without(two):
    assert two["after_kill"]["step"] == 5
    for name, values in two["dropout"]["weights"].items():
        assert torch.equal(torch.tensor(two["after_kill"]["weights"][name]), torch.tensor(values)), name


# ---- callbacks of processes whose metrics differ ----


def test_all_processes_stop_when_one_would_and_go_back_to_the_first_ones_checkpoint(two, two_folder):
    stopped = [each["callbacks"] for each in two["each"]]
    for case in ("restore", "target"):
        assert [each[case]["step"] for each in stopped] == [3, 3]
    # The first process, whose accuracy never fell, has not saved the step at which the second stopped.
    saved = hf.ViTForImageClassification.from_pretrained(two_folder / "restore" / "checkpoint-2")
    expected = sum(float(parameter.detach().double().sum()) for parameter in saved.parameters())
    assert [each["restore"]["sum"] for each in stopped] == pytest.approx([expected, expected], abs=1e-9)
    drawn = sorted(path.name for path in (two_folder / "restore" / "spectrum").iterdir())  # by one process alone
    assert drawn == ["spectrum.png", "starting_spectra.safetensors"]
