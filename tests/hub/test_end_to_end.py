"""Train, push, fetch elsewhere, load, verify, tamper: the real client in processes of its own, on loopback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, USER, card_problems
from huggingface_hub import ModelCard

from hf_immunize.hub.card import eval_results
from hf_immunize.hub.record import ImmunizationRecord


pytestmark = [pytest.mark.hub, pytest.mark.slow]
SCRIPTS = Path(__file__).parent / "scripts"
REPO = f"{USER}/immunized-vit"
FILES = {"README.md", "immunization.json", "config.json", "preprocessor_config.json", "model.safetensors"}


def run(environment, folder, *command):
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def trained(hub, environment, benign, harmful, tmp_path):
    """A folder with data and a run that was pushed, and what the process said."""
    folder = tmp_path / "work-of-alice"
    for name, data in (("benign", benign), ("harmful", harmful)):
        data.save_to_disk(folder / name)
    return folder, run(environment, folder, SCRIPTS / "train_and_push.py", folder, REPO)


def test_the_whole_way(trained, hub, environment, tmp_path):
    folder, said = trained
    report = json.loads(said.stdout.splitlines()[-1])
    files = hub.files(REPO)

    # The second push had nothing to do, and the repository holds what is allowed, no more.
    assert report["changed"] == [True, False]
    assert set(files) == FILES | {".gitattributes"}

    # Nobody's token, name or path is in what left, nor in what was said.
    for name, content in files.items():
        for private in (TOKEN, "alice", str(tmp_path)):
            assert private.encode() not in content, (name, private)
    assert TOKEN not in said.stdout + said.stderr

    # The card reads back, with the best step's figures.
    record = ImmunizationRecord.from_json(files["immunization.json"].decode())
    card = ModelCard(files["README.md"].decode())
    assert card.data.eval_results == eval_results(record)
    assert card_problems(files["README.md"].decode()) == []
    assert record.ratios["exact"].log10_rir == pytest.approx(report["best"])

    # Anyone can use it without this library, and the card's code works as it stands.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    used = json.loads(run(environment, elsewhere, SCRIPTS / "use_plainly.py", REPO).stdout.splitlines()[-1])
    assert (used["shape"], used["labels"]) == ([1, 2], ["cat", "dog"])
    assert {path.name for path in Path(used["folder"]).iterdir()} >= FILES

    # Measured again, it agrees; with one weight tampered, it differs.
    again = json.loads(run(environment, elsewhere, SCRIPTS / "measure_again.py", REPO, folder).stdout.splitlines()[-1])
    assert (again["objective"], again["agrees"], again["differs"]) == ("kappa", "agrees", "differs")
    assert "model.safetensors has changed" in again["reasons"][0]
    assert "WeightsChangedWarning" in again["warnings"]
