"""`hf-immunize audit` from the terminal."""

import json

import pytest
from attacked import pictures, tiny_vit
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTImageProcessorPil
from typer.testing import CliRunner

from hf_immunize.audit_command import _data
from hf_immunize.cli import app
from hf_immunize.errors import ArgumentError


def saved(folder, seed):
    parts = {}
    for split, rows in (("train", 24), ("test", 12)):
        pixels, labels = pictures(rows, seed + len(split))
        shades = ((pixels.clamp(-1, 2) + 1) * 80).byte().permute(0, 2, 3, 1).numpy()
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=list("abcd"))})
        images = [Image.fromarray(image) for image in shades]
        parts[split] = Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
    DatasetDict(parts).save_to_disk(folder)
    return str(folder)


@pytest.fixture
def model(tmp_path):
    tiny_vit().save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_writes_what_it_found(model, tmp_path):
    words = ["audit", model, "--harmful", saved(tmp_path / "harmful", 0), "--attackers", "ridge,adamw", "--quick"]
    result = CliRunner().invoke(app, [*words, "--reference", model, "--output-dir", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "audit.json").read_text())
    assert (tmp_path / "out" / "outcomes.jsonl").exists()


def test_one_data_set_is_split_by_harmful_classes(tmp_path):
    harmful, benign = _data(None, None, saved(tmp_path / "both", 0), "c, d", None, None, None)
    assert harmful["train"].features["label"].names == ["c", "d"]
    assert benign["test"].features["label"].names == ["a", "b"]


@pytest.mark.parametrize("given", [(None, None, None, None), ("a", None, "b", "c"), (None, None, "b", None)])
def test_incomplete_data_are_one_sentence(given):
    with pytest.raises(ArgumentError, match="--harmful"):
        _data(*given, None, None, None)


def test_quick_and_full_exclude_each_other(model):
    result = CliRunner().invoke(app, ["audit", model, "--harmful", "x", "--quick", "--full"])
    assert isinstance(result.exception, ArgumentError)
