"""Odd calls of every command, typed where the terminal knows cp1252 alone: one sentence and an exit code each."""

import io
import json
import logging
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_server import USER

import hf_immunize
from hf_immunize import __version__
from hf_immunize.cli import main as cli
from hf_immunize.errors import DataError, MissingPackageError


sys.path.insert(0, str(Path(__file__).parent / "hub"))
from checkpoints import benign_images, harmful_images, write_checkpoint


COMMANDS = ("train", "audit", "ceiling", "push", "verify", "card", "demo")


@pytest.fixture
def typed(monkeypatch):
    """A call of the command line in this process: exit code and what was printed, by streams of cp1252."""

    def call(*words):
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="cp1252") for name in ("stdout", "stderr")}
        factory = logging.getLogRecordFactory()
        with monkeypatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            patch.setattr(sys, "argv", ["hf-immunize", *map(str, words)])
            try:
                with pytest.raises(SystemExit) as stop:
                    cli.main()
                    sys.exit(0)
            finally:
                logging.setLogRecordFactory(factory)
        for stream in streams.values():
            stream.flush()
        printed = [stream.buffer.getvalue().decode("cp1252") for stream in streams.values()]
        return int(stop.value.code or 0), "".join(printed)

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
    (root / "empty").mkdir()
    good = (root / "model" / "config.json").read_bytes()
    for name, content in {
        "latin.yaml": b"model: Mod\xe8le\n",
        "latin.csv": b"a,b\n\xe9,2\n2,1\n",
        "broken.yaml": b"model: [",
        "list.yaml": b"- model",
        "empty.yaml": b"",
        "a.file": b"a file",
        "damaged.parquet": b"PAR1 and no more",
        "damaged/train.parquet": b"PAR1 and no more",
        "unfinished/state.json": b"{",
        "unfinished_dict/dataset_dict.json": b"{}",
        "no_config/model.safetensors": b"",
        "no_json/config.json": b"{",
        "no_type/config.json": b"{}",
        "odd_type/config.json": b'{"model_type": "no such type"}',
        "list_config/config.json": b"[]",
        "latin_config/config.json": b'{"model_type": "\xe9"}',
        "no_weights/config.json": good,
        "cut_weights/config.json": good,
        "cut_weights/model.safetensors": b"\x08\x00",
        "latin_record/immunization.json": b"\xe9",
        "cut_record/immunization.json": b"{",
        "list_record/immunization.json": b"[]",
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
        if name.endswith("config.json") and content != good:
            (root / name).with_name("model.safetensors").write_bytes(b"")
    return root


def calls(before, options, after=""):
    """A call with each of the options, which bars divide."""
    return [f"{before} {option.strip()} {after}" for option in options.split("|")]


MODEL, PAIR = "{root}/model", "--benign {root}/benign --harmful {root}/harmful"
NPY, CSV = "{root}/benign.npy {root}/harmful.npy", "{root}/benign.csv {root}/harmful.csv"
SPLIT = "--dataset {root}/benign --harmful_classes cat"
QUICK = "--quick --attackers ridge --output-dir {tmp}/out"
TRAIN = "--output_dir {tmp} --use_cpu --report_to none --disable_tqdm True"
BROKEN = (
    "{root}/nowhere | {root}/a.file | {root}/empty | {root}/no_config | {root}/no_json | {root}/no_type | "
    "{root}/odd_type | {root}/list_config | {root}/latin_config | {root}/no_weights | {root}/cut_weights"
)
DAMAGED = (
    "{root}/nowhere | {root}/a.file | {root}/empty | {root}/damaged | {root}/damaged.parquet | {root}/unfinished | "
    "{root}/unfinished_dict"
)
RECORDS = "{root}/no_config | {root}/cut_record | {root}/latin_record | {root}/list_record"
ODD = {
    "demo": [
        *calls("--output-dir", "{root}/a.file | {root}/a.file/below"),
        *calls("", "--output-dir= | --seed -1 | --seed 99999999999999 | --seed x | --nonsense | word"),
    ],
    "card": [
        *calls("", f"| {RECORDS} | {{root}}/nowhere | {{root}}/a.file | {{root}}/empty"),
        *calls(MODEL, "--nonsense | --name= | {root}/model"),
    ],
    "push": [
        *calls("", f"{RECORDS} | {{root}}/nowhere | {{root}}/a.file | {{root}}/empty", "user/name --dry-run"),
        *calls(MODEL, "| not/a/name --dry-run | sp\u00e4ce\u03ba/\u03bb --dry-run | user/name --private=maybe"),
        *calls(MODEL, "user/name --revision= --dry-run"),
    ],
    "verify": [
        *calls("", f"| {RECORDS} | {{root}}/nowhere | {{root}}/a.file | {{root}}/empty", PAIR),
        *calls(MODEL, "| --benign {root}/benign | --dataset {root}/benign | --harmful-classes a"),
        *calls(f"{MODEL} --dataset {{root}}/benign", "--harmful-classes nowhere | --harmful-class cat"),
        *calls(f"{MODEL} {PAIR}", "--harmful-classes a | --dataset {root}/benign"),
        *calls(f"{MODEL} {PAIR}", "--batch-size 0 | --revision other"),
        *calls(f"{MODEL} {PAIR} --reference", "{root}/no_type | {root}/nowhere | {root}/a.file"),
        *calls(f"{MODEL} --harmful {{root}}/harmful --benign", DAMAGED),
    ],
    "audit": [
        *calls("", "| {root}/model | {root}/model {root}/model --harmful x"),
        *calls("", BROKEN, f"{PAIR} {QUICK}"),
        *calls("", RECORDS, f"{PAIR} {QUICK} --attach"),
        *calls(f"{MODEL} --dataset {{root}}/benign --harmful-classes", f"nowhere {QUICK} | 99 {QUICK}"),
        *calls(
            f"{MODEL} {PAIR} --quick --output-dir {{tmp}}/out",
            "--full | --nonsense | --output-dir= | --output-dir {root}/a.file/below | --output-dir {root}/a.file "
            "| --revision= | --attackers nonsense | --attackers restore_swap "
            "| --image-column nowhere | --image-column label | --label-column nowhere | --label-column image "
            "| --head-module nowhere | --head-module vit | --head-module= ",
        ),
        *calls(f"{MODEL} {PAIR} {QUICK} --reference", BROKEN),
        *(
            call
            for option in ("harmful-classes cat --dataset", "harmful", "harmful {root}/harmful --benign")
            for call in calls(f"{MODEL} {QUICK} --{option}", DAMAGED)
        ),
        *(
            call
            for option in ("harmful-test", "benign-test", "unseen", "unrelated")
            for call in calls(f"{MODEL} {QUICK} {PAIR} --{option}", DAMAGED)
        ),
    ],
    "ceiling": [
        *calls("", "| {root}/benign.npy | {root}/empty {root}/empty | {root}/latin.csv {root}/latin.csv"),
        *calls("", "{root}/nowhere.npy | {root}/a.file", "{root}/harmful.npy"),
        *calls("", "{root}/damaged.parquet {root}/damaged.parquet | {root}/benign.npy {root}/harmful.csv"),
        *calls("", "{root}/benign_flat.npy {root}/harmful_flat.npy | {root}/benign.npy {root}/benign_flat.npy"),
        *calls(NPY, "--produced-dtype int8"),
        *calls(f"{NPY} --figure", "{root}/a.file/figure.png | {root}/figure.nonsense | {root}/empty"),
        *calls(CSV, "--drop a,c | --drop a,b | --drop=,"),
    ],
    "train": [
        *calls("", f"| --model | --model {MODEL}"),
        *calls(
            f"--model {MODEL}",
            f"--benign {{root}}/benign | {PAIR} {SPLIT} | {SPLIT} --benign x | {SPLIT} --benign_eval x "
            f"| {SPLIT} --harmful_eval x | --dataset {{root}}/benign --harmful_classes "
            f"| --dataset {{root}}/benign --harmful_classes nowhere {TRAIN}",
        ),
        *calls(
            f"--model {MODEL} {PAIR} {TRAIN}",
            "--harmful_classes a | --eval_fraction nan | --eval_fraction 1.5 | --max_images 0 | --max_images -1 "
            "| --model_revision other | --do_train False | --do_predict | --learning_rate fast | --use_cpu maybe "
            "| --optim nonsense | --lr_scheduler_type nonsense | --lr_scheduler_kwargs nonsense "
            "| --report_to nonsense | --report_to flyte "
            "| --load_best_model_at_end --eval_strategy no | --fsdp nonsense | --output_dir= "
            "| --output_dir {root}/a.file | --resume_from_checkpoint {root}/nowhere | --nonsense | --config "
            "| --resume_from_checkpoint {root}/a.file | --resume_from_checkpoint True",
        ),
        *calls("--config", "{root} | {root}/nowhere.yaml | {root}/latin.yaml | {root}/broken.yaml | {root}/list.yaml"),
        *calls("--config", "{root}/empty.yaml"),
        *calls("--model", BROKEN, f"{PAIR} {TRAIN}"),
        *calls(f"--model {MODEL} --harmful {{root}}/harmful {TRAIN} --benign", DAMAGED),
    ],
}


@pytest.mark.parametrize(("command", "words"), [(c, w) for c, calls in ODD.items() for w in calls])
def test_an_odd_call_ends_in_a_sentence(typed, files, tmp_path, command, words):
    code, text = typed(command, *words.format(root=files, tmp=tmp_path).split())
    assert code == 2
    assert "Traceback" not in text
    assert text.strip()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("nonsense", 1), ("help", True), (1, 2), ("learning_rate", [0.1, 0.2]), ("learning_rate", {"a": 1})],
        *[("learning_rate", "fast"), ("max_steps", 1.5), ("max_steps", "many"), ("use_cpu", "maybe"), ("model", "")],
        *[("model", ["a", "b"]), ("output_dir", ""), ("harmful_classes", {"a": 1}), ("do_train", False)],
        ("optim", "nonsense"),
    ],
)
def test_an_odd_config_file_ends_in_a_sentence(typed, tmp_path, name, value):
    config = tmp_path / "arguments.yaml"
    config.write_text(yaml.safe_dump({"model": "m", "benign": "b", "harmful": "h", name: value}), encoding="utf-8")
    code, text = typed("train", "--config", config)
    assert code == 2
    assert str(name) in text


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "no text"),
        json.JSONDecodeError("no JSON", "{", 0),
        yaml.YAMLError("no YAML"),
        ModuleNotFoundError("No module named 'wandb'"),
        MemoryError("too much"),
        KeyboardInterrupt(),
    ],
)
def test_what_a_machine_or_a_person_does_ends_in_a_sentence(typed, monkeypatch, error):
    def fail(words):
        raise error

    monkeypatch.setattr("hf_immunize.cli.train.run_train", fail)
    code, text = typed("train")
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert text.strip() and str(error) in text


@pytest.mark.parametrize("package, extra", [("scipy.special", "audit"), ("matplotlib", "plots")])
def test_a_package_that_an_extra_brings_is_missed_with_the_command_that_installs_it(
    typed, monkeypatch, package, extra
):
    missing = ModuleNotFoundError(f"No module named {package!r}", name=package)

    def fail(*words):
        raise missing

    monkeypatch.setattr("hf_immunize.cli.train.run_train", fail)
    code, text = typed("train")
    assert code == 2 and text.rstrip().endswith(f"pip install 'hf-immunize[{extra}]'")
    monkeypatch.setattr("hf_immunize.import_module", fail)
    with pytest.raises(MissingPackageError, match=extra):
        hf_immunize.__getattr__("AuditReport")


def test_other_errors_keep_their_traceback(typed, monkeypatch):
    monkeypatch.setattr(cli, "app", lambda: {}["a bug"])
    with pytest.raises(KeyError):
        typed("train")


WRITES = {
    "train": "--model {0}/none --benign {0}/none --harmful {0}/none --use_cpu --report_to none --output_dir",
    "audit": "{0}/none --harmful {0}/none --output-dir",
    "demo": "--output-dir",
    "ceiling": "{0}/none.npy {0}/none.npy --figure",
}


@pytest.mark.parametrize("command", WRITES)
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_read(typed, tmp_path, command):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    code, text = typed(command, *WRITES[command].format(tmp_path).split(), tmp_path / "file" / "below.png")
    assert code == 2
    assert str(tmp_path / "file") in text.replace("\n", "") and "none" not in text


@pytest.mark.parametrize("name", ["\x1b[2J\x1b]0;x\x07", "\u202eevil", "\x9b31m", "a\rb", "\ud800"])
def test_no_name_commands_the_terminal(typed, monkeypatch, caplog, name):
    def fail():
        logging.getLogger("hf_immunize.data.sources").warning("%s", f"Left out, found none in {name}.")
        raise DataError(f"Expected an image, found none in {name}. Give one.")

    monkeypatch.setattr(cli, "app", fail)
    for said in (typed("train")[1], caplog.messages[0]):
        assert "found none in" in said
        assert not [c for c in said.rstrip() if unicodedata.category(c) in ("Cc", "Cf", "Cs")]


def test_version_and_the_help_of_training_with_its_own_flags_first_are_printed(typed):
    assert typed("--version")[1].split() == ["hf-immunize", __version__]
    code, said = typed("train", "--help")
    flags = ("model", "harmful_classes", "objective", "trainable", "bf16")
    places = [re.search(rf"\n  --{flag}[ ,]", said).start() for flag in flags]  # a comma from Python 3.13 on
    assert code == 0 and places == sorted(places)


def test_commands_end_well_where_the_terminal_knows_few_characters(typed, files, tmp_path):
    pair = [word.format(root=files) for word in PAIR.split()]
    train = ["--model", files / "model", *pair, "--max_steps", 2, "--output_dir", tmp_path, "--use_cpu"]
    audit = [files / "model", *pair, "--quick", "--attackers", "ridge", "--output-dir", tmp_path / "audit"]
    for words in (
        ("ceiling", files / "benign.npy", files / "harmful.npy"),
        ("verify", files / "model", *pair),
        ("card", files / "model"),
        ("push", files / "model", f"{USER}/name", "--dry-run"),
        ("train", *train, "--report_to", "none", "--per_device_train_batch_size", 4),
        ("audit", *audit),
    ):
        assert typed(*words)[0] == 0, words


def test_an_interpreter_of_its_own_prints_all_helps_in_cp1252_and_loads_nothing_heavy():
    asked = [["--help"], *([command, "--help"] for command in COMMANDS if command != "train")]
    code = (
        "import sys; from hf_immunize.cli.main import main\n"
        f"for sys.argv[1:] in {asked}:\n"
        "    try: main()\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    environment = {"PYTHONIOENCODING": "cp1252", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode("cp1252")
    assert all(command in done.stdout.decode("cp1252") for command in COMMANDS)
