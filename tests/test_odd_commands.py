"""Odd calls of every command, typed where the terminal knows cp1252 alone: one sentence and an exit code each."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_server import USER

from hf_immunize import __version__
from hf_immunize.cli import main as cli


sys.path.insert(0, str(Path(__file__).parent / "hub"))
from checkpoints import benign_images, harmful_images, write_checkpoint


COMMANDS = ("train", "audit", "ceiling", "push", "verify", "card", "demo")


@pytest.fixture
def typed(monkeypatch):
    """A call of the command line in this process: exit code and what was printed, by streams of cp1252."""

    def call(*words):
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="cp1252") for name in ("stdout", "stderr")}
        with monkeypatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            patch.setattr(sys, "argv", ["hf-immunize", *map(str, words)])
            with pytest.raises(SystemExit) as stop:
                cli.main()
                sys.exit(0)
        printed = {}
        for name, stream in streams.items():
            stream.flush()
            printed[name] = stream.buffer.getvalue().decode("cp1252")
        return int(stop.value.code or 0), printed["stdout"] + printed["stderr"]

    return call


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint and images as they should be, and what stands in their place by mistake."""
    root = tmp_path_factory.mktemp("files")
    write_checkpoint(root / "model")
    for name, images in (("benign", benign_images()), ("harmful", harmful_images())):
        images.save_to_disk(root / name)
        generator = np.random.default_rng(len(name))
        np.save(root / f"{name}.npy", generator.normal(size=(20, 3)))
        np.save(root / f"{name}_flat.npy", generator.normal(size=20))
        (root / f"{name}.csv").write_text("a,b\n1,2\n2,1\n3,5\n", encoding="utf-8")
    (root / "latin.yaml").write_bytes("model: Modèle\n".encode("latin-1"))
    (root / "latin.csv").write_bytes("a,b\né,2\n2,1\n".encode("latin-1"))
    (root / "broken.yaml").write_text("model: [", encoding="utf-8")
    (root / "list.yaml").write_text("- model", encoding="utf-8")
    (root / "empty.yaml").write_text("", encoding="utf-8")
    (root / "a.file").write_text("a file", encoding="utf-8")
    (root / "empty").mkdir()
    (root / "damaged.parquet").write_bytes(b"PAR1 and no more")
    (root / "damaged").mkdir()
    (root / "damaged" / "train.parquet").write_bytes(b"PAR1 and no more")
    (root / "unfinished").mkdir()
    (root / "unfinished" / "state.json").write_text("{", encoding="utf-8")
    (root / "unfinished_dict").mkdir()
    (root / "unfinished_dict" / "dataset_dict.json").write_text("{}", encoding="utf-8")
    for name, config, weights in (
        ("no_config", None, b""),
        ("no_json", "{", b""),
        ("no_type", "{}", b""),
        ("odd_type", '{"model_type": "no such type"}', b""),
        ("list_config", "[]", b""),
        ("latin_config", None, b""),
        ("no_weights", (root / "model" / "config.json").read_text(encoding="utf-8"), None),
        ("cut_weights", (root / "model" / "config.json").read_text(encoding="utf-8"), b"\x08\x00"),
    ):
        folder = root / name
        folder.mkdir()
        if config is not None:
            (folder / "config.json").write_text(config, encoding="utf-8")
        if weights is not None:
            (folder / "model.safetensors").write_bytes(weights)
    (root / "latin_config" / "config.json").write_bytes(b'{"model_type": "\xe9"}')
    for name, record in (("latin_record", b"\xe9"), ("cut_record", b"{"), ("list_record", b"[]"), ("no_record", None)):
        (root / name).mkdir()
        if record is not None:
            (root / name / "immunization.json").write_bytes(record)
    return root


TRAIN = "--output_dir {tmp} --use_cpu --report_to none --disable_tqdm True"
PAIR = "--benign {root}/benign --harmful {root}/harmful"
QUICK = "--quick --attackers ridge --output-dir {tmp}/out"
BROKEN = ("nowhere", "a.file", "empty", "no_config", "no_json", "no_type", "odd_type", "list_config", "latin_config")
BROKEN += ("no_weights", "cut_weights")
DAMAGED = ("nowhere", "a.file", "empty", "damaged", "damaged.parquet", "unfinished", "unfinished_dict")
ODD = {
    "demo": [
        "--output-dir {root}/a.file",
        "--output-dir {root}/a.file/below",
        "--output-dir=",
        "--seed -1",
        "--seed 99999999999999",
        "--seed x",
        "--nonsense",
        "word",
    ],
    "card": [
        "",
        "{root}/nowhere",
        "{root}/a.file",
        "{root}/empty",
        "{root}/latin_record",
        "{root}/cut_record",
        "{root}/list_record",
        "{root}/no_record --check",
        "{root}/model --nonsense",
        "{root}/model --name=",
        "{root}/model {root}/model",
    ],
    "push": [
        "{root}/model",
        "{root}/nowhere user/name --dry-run",
        "{root}/a.file user/name --dry-run",
        "{root}/empty user/name --dry-run",
        "{root}/latin_record user/name --dry-run",
        "{root}/cut_record user/name --dry-run",
        "{root}/model not/a/name --dry-run",
        "{root}/model sp\u00e4ce\u03ba/\u03bb --dry-run",
        "{root}/model user/name --revision= --dry-run",
        "{root}/model user/name --private=maybe",
    ],
    "verify": [
        "",
        "{root}/model",
        "{root}/model --benign {root}/benign",
        "{root}/model --dataset {root}/benign",
        "{root}/model --harmful-classes a",
        "{root}/model " + PAIR + " --harmful-classes a",
        "{root}/model " + PAIR + " --dataset {root}/benign",
        "{root}/model " + PAIR + " --split nowhere",
        "{root}/model " + PAIR + " --held-out 2",
        "{root}/model " + PAIR + " --held-out 0",
        "{root}/model " + PAIR + " --held-out nan",
        "{root}/model " + PAIR + " --max-images 0",
        "{root}/model " + PAIR + " --max-images -3",
        "{root}/model " + PAIR + " --batch-size 0",
        "{root}/model " + PAIR + " --revision other",
        "{root}/model " + PAIR + " --reference {root}/no_type",
        "{root}/model " + PAIR + " --reference {root}/nowhere",
        "{root}/model " + PAIR + " --reference {root}/a.file",
        "{root}/model --benign {root}/a.file --harmful {root}/harmful",
        "{root}/model --benign {root}/empty --harmful {root}/harmful",
        "{root}/model --benign {root}/damaged --harmful {root}/harmful",
        "{root}/model --benign {root}/damaged.parquet --harmful {root}/harmful",
        "{root}/model --benign {root}/unfinished --harmful {root}/harmful",
        "{root}/model --benign {root}/unfinished_dict --harmful {root}/harmful",
        "{root}/model --dataset {root}/benign --harmful-classes nowhere",
        "{root}/model --dataset {root}/benign --harmful-class cat",
        "{root}/nowhere " + PAIR,
        "{root}/empty " + PAIR,
        "{root}/a.file " + PAIR,
        "{root}/no_record " + PAIR,
        "{root}/cut_record " + PAIR,
    ],
    "audit": [
        "",
        "{root}/model",
        "{root}/model {root}/model " + PAIR,
        "{root}/model " + PAIR + " --nonsense",
        "{root}/model --harmful",
        "{root}/model --benign {root}/benign",
        "{root}/model --dataset {root}/benign",
        "{root}/model --harmful-classes cat",
        "{root}/model --dataset {root}/benign --harmful-class cat",
        "{root}/model --dataset {root}/benign --harmful-classes nowhere",
        "{root}/model --dataset {root}/benign --harmful-classes 99",
        "{root}/model --dataset {root}/benign --harmful-classes cat --harmful {root}/harmful",
        "{root}/model --dataset {root}/benign --harmful-classes cat --benign {root}/benign",
        "{root}/model --dataset {root}/benign --harmful-classes cat --harmful-test {root}/harmful",
        "{root}/model --dataset {root}/benign --harmful-classes cat --benign-test {root}/benign",
        "{root}/model --harmful {root}/harmful --benign-test {root}/benign",
        "{root}/model --harmful {root}/harmful --harmful-classes cat",
        *(
            "{root}/model " + PAIR + " --quick --output-dir {tmp}/out " + option
            for option in (
                "--full",
                "--quick=maybe",
                "--output-dir {root}/a.file",
                "--output-dir {root}/a.file/below",
                "--output-dir=",
                *("--attackers=", "--attackers ,", "--attackers nonsense", "--attackers ridge,nonsense"),
                *("--attackers lora_r0", "--attackers halfway"),
                *(f"--{name}={value}" for name in ("seconds", "steps", "seeds") for value in ("0", "-1", "x", "nan")),
                *("--attackers ridge --steps 8", "--attackers ridge,lda --seconds 8"),
                *("--steps 1.5", "--seeds 1.5", "--seconds inf"),
                *("--keep-features=-1", "--keep-features inf", "--keep-features nan", "--keep-features x"),
                *("--keep-features 1e308", "--test-fraction 0", "--test-fraction 1", "--test-fraction nan"),
                *("--test-fraction x", "--max-images 1", "--max-images=-3", "--max-images 2.5", "--max-images x"),
                *("--accuracies 20", "--accuracies x", "--accuracies nan", "--accuracies 0", "--accuracies 0.2,"),
                *("--accuracies=,", "--accuracies="),
                *("--seed=-1", "--seed 1.5", "--seed 99999999999999", "--seed x"),
                *("--image-column nowhere", "--label-column nowhere", "--label-column image", "--image-column label"),
                *("--head-module nowhere", "--head-module vit", "--head-module= "),
                *("--revision other", "--revision=", "--trust-remote-code=maybe"),
            )
        ),
        *(
            f"{{root}}/{name} {PAIR} {QUICK}"
            for name in (*BROKEN, "no_record --attach", "cut_record --attach", "latin_record --attach")
        ),
        *(f"{{root}}/model {PAIR} {QUICK} --reference {{root}}/{name}" for name in BROKEN),
        "user/name " + PAIR + " --attach",
        *(
            f"{{root}}/model {given} {{root}}/{name} {QUICK}"
            for given in (
                *("--benign {root}/benign --harmful", "--harmful {root}/harmful --benign"),
                *(f"{PAIR} --{option}" for option in ("harmful-test", "benign-test", "unseen", "unrelated")),
                "--harmful-classes cat --dataset",
            )
            for name in DAMAGED
        ),
    ],
    "ceiling": [
        "",
        "{root}/benign.npy",
        "{root}/nowhere.npy {root}/harmful.npy",
        "{root}/a.file {root}/harmful.npy",
        "{root}/empty {root}/empty",
        "{root}/benign_flat.npy {root}/harmful_flat.npy",
        "{root}/latin.csv {root}/latin.csv",
        "{root}/damaged.parquet {root}/damaged.parquet",
        "{root}/benign.npy {root}/harmful.csv",
        "{root}/benign.npy {root}/harmful.npy --key x",
        "{root}/benign.npy {root}/harmful.npy --columns a",
        "{root}/benign.npy {root}/harmful.npy --drop a",
        "{root}/benign.npy {root}/harmful.npy --fill 0",
        "{root}/benign.csv {root}/harmful.csv --key x",
        "{root}/benign.csv {root}/harmful.csv --columns a,c",
        "{root}/benign.csv {root}/harmful.csv --drop a,b",
        "{root}/benign.csv {root}/harmful.csv --columns=,",
        "{root}/benign.npy {root}/harmful.npy --image-size 0",
        "{root}/benign.npy {root}/harmful.npy --image-size -4",
        "{root}/benign.npy {root}/harmful.npy --tolerance 0",
        "{root}/benign.npy {root}/harmful.npy --tolerance nan",
        "{root}/benign.npy {root}/harmful.npy --leading 0",
        "{root}/benign.npy {root}/harmful.npy --produced-dtype int8",
        "{root}/benign.npy {root}/harmful.npy --figure {root}/a.file/figure.png",
        "{root}/benign.npy {root}/harmful.npy --figure {root}/figure.nonsense",
        "{root}/benign.npy {root}/harmful.npy --figure {root}/empty",
    ],
    "train": [
        "",
        "--model",
        "--model {root}/model",
        "--model {root}/model --benign {root}/benign",
        "--model {root}/model " + PAIR + " --harmful_classes a",
        "--model {root}/model " + PAIR + " --dataset {root}/benign --harmful_classes a",
        "--model {root}/model --dataset {root}/benign --harmful_classes a --benign {root}/benign",
        "--model {root}/model --dataset {root}/benign --harmful_classes a --benign_eval {root}/benign",
        "--model {root}/model --dataset {root}/benign --harmful_classes a --harmful_eval {root}/benign",
        "--model {root}/model --dataset {root}/benign --harmful_classes",
        "--model {root}/model --dataset {root}/benign --harmful_classes nowhere " + TRAIN,
        "--model {root}/model " + PAIR + " --eval_fraction nan",
        "--model {root}/model " + PAIR + " --max_images 0",
        "--model {root}/model " + PAIR + " --max_images -1",
        "--model {root}/model " + PAIR + " --model_revision other",
        "--model {root}/model " + PAIR + " --do_train False " + TRAIN,
        "--model {root}/model " + PAIR + " --do_predict " + TRAIN,
        "--model {root}/model " + PAIR + " --learning_rate fast",
        "--model {root}/model " + PAIR + " --use_cpu maybe",
        "--model {root}/model " + PAIR + " --optim nonsense",
        "--model {root}/model " + PAIR + " --lr_scheduler_type nonsense",
        "--model {root}/model " + PAIR + " --lr_scheduler_kwargs nonsense",
        "--model {root}/model " + PAIR + " --report_to nonsense " + TRAIN.replace("--report_to none", ""),
        "--model {root}/model " + PAIR + " --report_to flyte " + TRAIN.replace("--report_to none", ""),
        "--model {root}/model " + PAIR + " --load_best_model_at_end --eval_strategy no",
        "--model {root}/model " + PAIR + " --fsdp nonsense",
        "--model {root}/model " + PAIR + " --output_dir= ",
        "--model {root}/model " + PAIR + " --output_dir {root}/a.file --use_cpu --report_to none",
        "--model {root}/model " + PAIR + " --resume_from_checkpoint {root}/nowhere " + TRAIN,
        "--model {root}/model " + PAIR + " --resume_from_checkpoint {root}/a.file " + TRAIN,
        "--model {root}/model " + PAIR + " --resume_from_checkpoint True " + TRAIN,
        "--model {root}/model " + PAIR + " --nonsense",
        "--model {root}/model " + PAIR + " --config",
        "--config {root}/nowhere.yaml",
        "--config {root}",
        "--config {root}/latin.yaml",
        "--config {root}/broken.yaml",
        "--config {root}/list.yaml",
        "--config {root}/empty.yaml",
        *(f"--model {{root}}/{name} {PAIR} {TRAIN}" for name in BROKEN),
        *(f"--model {{root}}/model --benign {{root}}/{name} --harmful {{root}}/harmful {TRAIN}" for name in DAMAGED),
    ],
}


@pytest.mark.parametrize(("command", "words"), [(c, w) for c, calls in ODD.items() for w in calls])
def test_an_odd_call_ends_in_a_sentence(typed, files, tmp_path, command, words):
    code, text = typed(command, *words.format(root=files, tmp=tmp_path).split())
    assert code == 2
    assert "Traceback" not in text
    assert text.strip()


@pytest.mark.parametrize(
    "values",
    [
        {"nonsense": 1},
        {"help": True},
        {1: 2},
        {"learning_rate": [0.1, 0.2]},
        {"learning_rate": {"a": 1}},
        {"learning_rate": "fast"},
        {"max_steps": 1.5},
        {"max_steps": "many"},
        {"use_cpu": "maybe"},
        {"model": ""},
        {"model": ["a", "b"]},
        {"output_dir": ""},
        {"harmful_classes": {"a": 1}},
        {"do_train": False},
        {"optim": "nonsense"},
    ],
)
def test_an_odd_config_file_ends_in_a_sentence(typed, tmp_path, values):
    config = tmp_path / "arguments.yaml"
    config.write_text(yaml.safe_dump({"model": "m", "benign": "b", "harmful": "h"} | values), encoding="utf-8")
    code, text = typed("train", "--config", config)
    assert code == 2
    assert all(str(name) in text or str(name) == "1" for name in values)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "runs"),
        OSError(28, "No space left on device"),
        ConnectionError("gone"),
        TimeoutError("late"),
        UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "no text"),
        json.JSONDecodeError("no JSON", "{", 0),
        yaml.YAMLError("no YAML"),
        ModuleNotFoundError("No module named 'wandb'"),
        MemoryError("too much"),
    ],
)
def test_what_a_machine_does_ends_in_a_sentence(typed, monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(cli, "app", fail)
    code, text = typed("train")
    assert code == 2
    assert str(error) in text


def test_an_interruption_ends_with_130(typed, monkeypatch):
    def interrupted(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_immunize.cli.train.run_train", interrupted)
    code, text = typed("train")
    assert code == 130
    assert text.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_printed_in_any_encoding(typed, command):
    code, text = typed(command, "--help")
    assert code == 0
    assert command in text


def test_version_is_told(typed):
    assert typed("--version") == (0, f"hf-immunize {__version__}\n")


def test_commands_end_well_where_the_terminal_knows_few_characters(typed, files, tmp_path):
    pair = [word.format(root=files) for word in PAIR.split()]
    assert typed("ceiling", files / "benign.npy", files / "harmful.npy")[0] == 0
    assert typed("verify", files / "model", *pair)[0] == 0
    assert typed("card", files / "model")[0] == 0
    assert typed("push", files / "model", f"{USER}/name", "--dry-run")[0] == 0
    train = ["--model", files / "model", *pair, "--max_steps", 2, "--output_dir", tmp_path, "--use_cpu"]
    assert typed("train", *train, "--report_to", "none", "--per_device_train_batch_size", 4)[0] == 0
    audit = ["audit", files / "model", *pair, "--quick", "--attackers", "ridge", "--output-dir", tmp_path / "audit"]
    assert typed(*audit)[0] == 0


def test_an_interpreter_of_its_own_prints_all_helps_in_cp1252():
    calls = "\n".join(
        f"sys.argv[1:] = ['{command}', '--help']\ntry: main()\nexcept SystemExit as stop: assert not stop.code"
        for command in COMMANDS
    )
    code = f"import sys\nfrom hf_immunize.cli.main import main\n{calls}"
    environment = {"PYTHONIOENCODING": "cp1252", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode("cp1252")
