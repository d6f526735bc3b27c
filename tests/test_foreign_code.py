"""Code that comes with a checkpoint: it runs where it was asked for by name; nobody is asked at the keyboard."""

import json
import sys
from pathlib import Path

import pytest

from hf_immunize import load_immunized, verify
from hf_immunize.cli import main as cli
from hf_immunize.errors import ImmunizationError
from hf_immunize.vision.bare import load_with_linear_head


sys.path.insert(0, str(Path(__file__).parent / "hub"))
from checkpoints import benign_images, harmful_images, write_checkpoint


FILES = {
    "model": ("config.json", {"model_type": "odd"}, ("AutoConfig", "AutoModel", "AutoModelForImageClassification")),
    "processor": ("preprocessor_config.json", {"image_processor_type": "OddProcessor"}, ("AutoImageProcessor",)),
}


@pytest.fixture
def data(tmp_path):
    """Images by side, in memory and on disk."""
    sides = {"benign": benign_images(), "harmful": harmful_images()}
    for side, images in sides.items():
        images.save_to_disk(tmp_path / side)
    return sides, [word for side in sides for word in (f"--{side}", str(tmp_path / side))]


def run_command(*words):
    return cli.app([str(word) for word in words], standalone_mode=False)


CALLS = {
    "verify": lambda folder, sides, words: verify(folder, **sides, progress=False),
    "verify's reference": lambda folder, sides, words: verify(folder.parent / "sound", **sides, reference=folder),
    "hf-immunize verify": lambda folder, sides, words: run_command("verify", folder, *words),
    "hf-immunize audit": lambda folder, sides, words: run_command("audit", folder, *words),
    "hf-immunize train": lambda folder, sides, words: run_command(
        "train", "--model", folder, *words, "--output_dir", folder.parent / "run", "--report_to", "none"
    ),
    "load_immunized": lambda folder, sides, words: load_immunized(folder),
    "load_with_linear_head": lambda folder, sides, words: load_with_linear_head(folder),
}
LOADS_NO_PROCESSOR = ("verify's reference", "load_immunized", "load_with_linear_head")


@pytest.mark.parametrize(
    ("call", "part"), [(c, p) for c in CALLS for p in FILES if p == "model" or c not in LOADS_NO_PROCESSOR]
)
def test_code_of_a_checkpoint_is_refused_without_a_question(call, part, data, tmp_path, monkeypatch):
    for name in ("sound", "odd"):
        write_checkpoint(tmp_path / name)
    file, named, classes = FILES[part]
    path, mark = tmp_path / "odd" / file, tmp_path / "it-ran"
    values = json.loads(path.read_text()) | named | {"auto_map": dict.fromkeys(classes, "odd_code.Odd")}
    path.write_text(json.dumps(values))
    (path.parent / "odd_code.py").write_text(f"open({str(mark)!r}, 'w')\nclass Odd:\n    pass\n")
    questions = []
    monkeypatch.setattr("builtins.input", lambda *words: questions.append(words) or "y")
    with pytest.raises(ImmunizationError, match="trust_remote_code"):
        CALLS[call](tmp_path / "odd", *data)
    assert questions == []
    assert not mark.exists()
