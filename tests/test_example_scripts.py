"""The examples run on tiny data, and three lines turn a classification script into an immunizing one."""

import difflib
import importlib.util
import json
import os
import re
import subprocess
import sys
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from datasets import load_dataset
from folders import image_folder, tiny_classifier
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainingArguments

import hf_immunize
from hf_immunize import ImmunizationArguments, ImmunizationTrainer
from hf_immunize.audit.names import signed
from hf_immunize.audit.statistics import paired_utility
from hf_immunize.data.images import ImageCollator, ImageRows


ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
QUICK = ["--per_device_train_batch_size", "4", "--learning_rate", "1e-3", "--report_to", "none", "--use_cpu"]
QUICK += ["--disable_tqdm", "True", "--save_strategy", "no", "--logging_steps", "1"]


def script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up to resolve annotations.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny classifier of pets, and images of pets and of weapons, of 32 pixels."""
    root = tmp_path_factory.mktemp("examples")
    for seed, (task, classes) in enumerate({"pets": ("cat", "dog"), "weapons": ("gun", "knife")}.items()):
        image_folder(root / task, classes, {"train": 8, "test": 12}, 32, seed)
    tiny_classifier(root / "model", ("cat", "dog"), 32)
    return root


@pytest.fixture
def here(folder, monkeypatch):
    """Where a user types: beside ./pets and ./weapons."""
    monkeypatch.chdir(folder)
    return folder


def moved(first, second):
    """Whether two checkpoints differ."""
    states = [AutoModelForImageClassification.from_pretrained(path).state_dict() for path in (first, second)]
    return {name for name, value in states[0].items() if not torch.equal(value, states[1][name])}


# ---- three lines ----


def differences():
    lines = [(EXAMPLES / f"{name}.py").read_text().splitlines() for name in ("image_classification", "immunize")]
    return [line for line in difflib.unified_diff(*lines, lineterm="", n=0) if line[:3] not in ("---", "+++")]


def test_three_lines_make_it_immunize_and_the_guide_shows_them_where_they_are():
    changed = [line for line in differences() if line[0] in "+-"]
    assert sorted(line[0] for line in changed) == ["+", "+", "+", "-"]
    page = (ROOT / "docs" / "guides" / "own-model.md").read_text(encoding="utf-8")
    block = page.split("```diff\n")[1].split("```")[0].splitlines()
    assert [line for line in block if line[0] in "+-"] == changed
    source = (EXAMPLES / "immunize.py").read_text().splitlines()
    assert all(line[1:] in source for line in block if line[0] in " +" and line.strip() != "…")


def test_what_the_guide_says_can_be_set_exists():
    page = (ROOT / "docs" / "guides" / "own-model.md").read_text(encoding="utf-8")
    table = page.split("## What you can set\n")[1].split("\n## ")[0]
    names = {name for row in table.splitlines() if row[:1] == "|" for name in re.findall(r"`(\w+)=`", row)}
    known = set(ImmunizationArguments.__dataclass_fields__) | set(signature(ImmunizationTrainer).parameters)
    assert len(names) > 8 and names <= known
    assert set(re.findall(r"`(\w+Callback)\(", table)) <= set(hf_immunize.__all__)


def test_both_versions_run_one_after_the_other_by_flags_and_by_a_file(here):
    words = ["--dataset", "./pets", "--max_steps", "3", *QUICK]
    plain = script("image_classification").main(["--model", "model", "--output_dir", "trained", *words])
    assert "eval_accuracy" in plain and "eval_rir" not in plain
    arguments = {"model": "trained", "dataset": "./pets", "output_dir": "immunized", "max_steps": 3, "use_cpu": True}
    arguments |= {"per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no", "learning_rate": 1e-3}
    Path("arguments.yaml").write_text(yaml.safe_dump(arguments))
    immunized = script("immunize").main(["arguments.yaml"])
    assert {"eval_accuracy", "eval_rir", "eval_benign_log10_kappa", "eval_harmful_log10_kappa"} <= set(immunized)
    assert moved("trained", "immunized")
    assert AutoImageProcessor.from_pretrained("immunized").size["height"] == 32


# ---- a network made anew ----


def test_a_fresh_network_learns_from_the_classifier_and_says_what_it_reaches(here, capsys):
    words = ["--dataset", "./pets", "--output_dir", "anew", "--max_steps", "3", *QUICK]
    found = script("distil_anew").main(["--model", "model", *words])
    before, after = (AutoModelForImageClassification.from_pretrained(name) for name in ("model", "anew"))
    assert all(
        not torch.equal(one, before.state_dict()[name]) for name, one in after.named_parameters() if one.ndim > 1
    )
    assert after.config.id2label == before.config.id2label
    rows, collate = load_dataset("./pets", split="test"), ImageCollator(AutoImageProcessor.from_pretrained("model"))
    batch = collate(list(ImageRows(rows, "pets", "image", "label")))
    hits = {}
    for name, model in (("eval_start_accuracy", before), ("eval_accuracy", after)):
        hits[name] = model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]
        assert found[name] == pytest.approx(hits[name].float().mean().item())
    said, benign = capsys.readouterr().out, paired_utility(hits["eval_accuracy"], hits["eval_start_accuracy"])
    assert f"Benign accuracy: {signed(benign.difference)} points" in said
    # A loss is one that the images can tell.
    assert ("less than it learned from" in said) == (benign.interval[1] < 0) != ("audit says" in said)
    with pytest.raises(SystemExit, match=r"Expected the model's classes .*cat.* found .*gun"):
        script("distil_anew").main(["--model", "model", *words[:1], "./weapons", *words[2:]])


def test_accumulated_steps_of_a_student_are_those_of_one_batch(here):
    words = ["--model", "model", "--dataset", "./pets", *QUICK, "--optim", "sgd", "--max_grad_norm", "0"]
    sizes = {"whole": (8, 1), "halves": (4, 2)}
    for name, (size, times) in sizes.items():
        budget = f"--max_steps 1 --per_device_train_batch_size {size} --gradient_accumulation_steps {times}".split()
        script("distil_anew").main([*words, *budget, "--output_dir", name])
    whole, halves = (AutoModelForImageClassification.from_pretrained(name).state_dict() for name in sizes)
    for name, value in whole.items():
        torch.testing.assert_close(halves[name], value, rtol=0, atol=1e-6)


def test_a_student_takes_up_all_weights_of_a_checkpoint(here, tmp_path):
    student, teacher = (AutoModelForImageClassification.from_pretrained("model") for _ in range(2))
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = script("distil_anew").Student(student, args, teacher=teacher, share=0.5)
    trainer.state.best_model_checkpoint = "model"
    for load in (trainer._load_best_model, lambda: trainer._load_from_checkpoint("model")):
        for value in student.parameters():
            torch.nn.init.constant_(value, 7)
        load()
        assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in student.state_dict().items())


def test_views_are_moved_by_at_most_an_eighth():
    image = Image.new("RGB", (32, 16), "white")
    anew = script("distil_anew")
    for _ in range(40):
        moved = np.asarray(anew.mirrored_and_shifted(image))
        assert moved.shape == (16, 32, 3) and moved[2:14, 4:28].min() == 255


# ---- the callback and the loop ----


def test_the_callback_joins_a_trainer_with_a_loss_of_its_own(here):
    words = ["--model", "model", "--benign", "./pets", "--harmful", "./weapons", "--output_dir", "beside"]
    history = script("callback_on_your_trainer").main([*words, "--max_steps", "2", "--eval_strategy", "epoch", *QUICK])
    assert {"loss", "outside", "kl", "harmful_weight"} <= set(history[0])
    assert any("spectrum_log10_rir" in entry for entry in history)
    assert moved("model", "beside")


LOOP = ["--model", "model", "--benign", "./pets", "--harmful", "./weapons", "--batch_size", "4", "--cpu"]


def test_the_bare_loop_accumulates_and_measures(here, capsys):
    words = [*LOOP, "--output_dir", "loop", "--epochs", "2", "--accumulation", "2", "--learning_rate", "1e-3"]
    metrics = script("accelerate_loop").main(words)
    assert metrics["steps"] == 4 and {"last_outside", "last_kl", "rir"} <= set(metrics)
    printed = capsys.readouterr().out
    assert "step 4: {'benign_loss'" in printed and "harmful: κ" in printed and "RIR" in printed
    assert moved("model", "loop") and not any("layers.0." in name for name in moved("model", "loop"))


# ---- started as a user starts them ----


def start(folder, *words):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


CONFIGS = EXAMPLES / "accelerate_configs"
SCRIPT = [EXAMPLES / "immunize.py", "--model", "model", "--dataset", "./pets", "--max_steps", "2", *QUICK]
ONE = ["accelerate.commands.launch", "--config_file", CONFIGS / "one_cpu.yaml"]
TWO = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_there_is_a_configuration_for_each_way_to_spread_which_says_how_it_is_used():
    processes = {"deepspeed": 8, "fsdp": 8, "multi_cpu": 2, "multi_gpu": 8, "multi_node": 16, "one_cpu": 1}
    assert {config.stem for config in CONFIGS.glob("*.yaml")} == set(processes)
    page = (ROOT / "docs" / "guides" / "several-gpus.md").read_text(encoding="utf-8")
    named = set(re.findall(r"accelerate_configs/(\w+)\.yaml", page))
    assert named and named <= set(processes)
    for name, count in processes.items():
        found, text = load_config_from_file(str(CONFIGS / f"{name}.yaml")), (CONFIGS / f"{name}.yaml").read_text()
        kind = {"one_cpu": "NO", "multi_node": "MULTI_GPU"}.get(name, name.upper())
        # The Trainer's own flags say the precision.
        assert (found.distributed_type.value, found.num_processes, found.mixed_precision) == (kind, count, "no")
        assert f"accelerate launch --config_file examples/accelerate_configs/{name}.yaml" in text
    shown, defined = (
        set(re.findall(r"`(test_\w+)`", page)),
        "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "distributed").glob("test_*.py")),
    )
    assert shown and all(f"def {name}(" in defined for name in shown)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("launch", "epochs"), [(ONE, 0.5), (TWO, 1.0)], ids=["one process", "two"])
def test_the_immunizing_script_is_launched(launch, epochs, folder):
    output = folder / f"launched_{epochs}"
    start(folder, *launch, *SCRIPT, "--output_dir", output)
    results = json.loads((output / "eval_results.json").read_text())
    # 16 images in batches of 4: of one process, two steps are half an epoch.
    assert "eval_rir" in results and results["epoch"] == epochs
    assert moved(folder / "model", output)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_loop_runs_on_two_processes(folder):
    start(folder, *TWO, EXAMPLES / "accelerate_loop.py", *LOOP, "--output_dir", "two", "--epochs", "2")
    metrics = json.loads((folder / "two" / "metrics.json").read_text())
    assert (metrics["processes"], metrics["steps"]) == (2, 4)
    assert moved(folder / "model", folder / "two")


@pytest.mark.slow
def test_accelerate_launches_the_train_command_from_a_file(folder):
    arguments = {"model": "model", "benign": "./pets", "harmful": "./weapons", "output_dir": "command", "max_steps": 2}
    arguments |= {"per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    (folder / "command.yaml").write_text(yaml.safe_dump(arguments))
    start(folder, *ONE, "-m", "hf_immunize", "train", "--config", "command.yaml")
    results = json.loads((folder / "command" / "results.json").read_text())
    assert results["steps"] == 2 and "eval_rir" in results["after"]


def test_the_page_of_an_audit_is_written_from_its_json(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "audit"))
    from audit_sample import attack, make

    from hf_immunize.audit.report import AuditReport

    accuracies = {"reference": 0.812, "immunized": 0.537, "random": 0.3}
    data = make([one for subject, of in accuracies.items() for one in attack("ridge", "head_input", subject, of)])
    report = AuditReport(data)
    report.write(tmp_path / "run")
    words = [str(tmp_path / "run"), "--output", str(tmp_path / "page.md"), "--command", "hf-immunize audit"]
    monkeypatch.setattr(sys, "argv", ["audit_page", *words])
    script("audit_page").main()
    page = (tmp_path / "page.md").read_text()
    assert all(f"- {one}" in page for one in report.verdict())
    assert "| closed-form least squares (ridge) | 81.2% | 53.7% |" in page
    assert "| Probes at the classifier's input | 54% |" in page and "| +51.2 | 81.2% | 53.7% | 30.0% |" in page
    assert (tmp_path / "figures" / "page.svg").stat().st_size > 1000


def test_the_page_of_model_families_is_current(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.backbones_page import SHOWN, page

    shown = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8").splitlines()
    expected = page().splitlines()
    # A family without a row is added to the table by the command.
    rows = {line for line in expected if any(line.startswith(f"| {family.name} |") for family in SHOWN.values())}
    assert set(expected) - rows <= set(shown) <= set(expected), "run: python -m examples.backbones_page"
