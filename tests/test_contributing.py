"""CONTRIBUTING.md: its recipes run as they stand there, and the places that it names exist."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"```python\n# (hf_immunize/\S+)\n(.*?)```", TEXT, re.DOTALL)
USE = """
import tempfile, torch, transformers as hf
from hf_immunize import ImmunizationArguments, ImmunizationTrainer
from hf_immunize.attacks.attacker import ProbeBudget, ProbeData
from hf_immunize.attacks.presets import find_preset
from hf_immunize.vision.families import family_of

torch.manual_seed(0)
config = hf.ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=8,
                      patch_size=4, num_labels=2, initializer_range=0.3)
rows = [{"pixel_values": torch.randn(3, 8, 8)} for _ in range(16)]
args = ImmunizationArguments(tempfile.mkdtemp(), objective="block_concentration", max_steps=1, use_cpu=True,
                             per_device_train_batch_size=8, report_to="none", logging_steps=1, save_strategy="no")
trainer = ImmunizationTrainer(hf.ViTForImageClassification(config), args, train_dataset=rows, harmful_dataset=rows[:9])
trainer.train()
assert "deep" in trainer.state.log_history[0], trainer.state.log_history[0]

(attacker,) = [one for one in __import__("hf_immunize.attacks.probes", fromlist=["x"]).ATTACKERS
               if one.name == "nearest_mean"]
assert find_preset("full").only(["nearest_mean"]).probes == ("nearest_mean",)
labels = torch.arange(40) % 4
features = torch.nn.functional.one_hot(labels).double() + 0.1 * torch.randn(40, 4, dtype=torch.float64)
data = ProbeData(features[:24], labels[:24], features[24:], labels[24:], 4)
assert attacker.run(data, ProbeBudget(), 0).accuracy == 1.0

assert family_of(hf.ViTMSNConfig()).name == "ViT MSN"
print("all three work")
"""


def test_the_recipes_work_as_they_stand(tmp_path):
    places = {"training/objectives.py", "attacks/probes.py", "vision/families.py"}
    assert {file for file, _ in RECIPES} == {f"hf_immunize/{place}" for place in places}
    shutil.copytree(ROOT / "hf_immunize", tmp_path / "hf_immunize", ignore=shutil.ignore_patterns("__pycache__"))
    for file, code in RECIPES:
        assert len(code.splitlines()) <= 20
        with (tmp_path / file).open("a", encoding="utf-8") as module:
            module.write(f"\n\n{code}")
    run = subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True)
    assert "all three work" in run.stdout, run.stderr[-2000:]


@pytest.mark.parametrize("place", sorted(set(re.findall(r"`((?:hf_immunize/)?[a-z_]+/[a-z_/.]*)`", TEXT))))
def test_places_exist(place):
    assert (ROOT / "hf_immunize" / place).exists() or (ROOT / place).exists()


def test_names_of_the_table_are_where_it_says():
    for file, name in re.findall(r"`([a-z]+/[a-z]+\.py)`, `([a-z_]+)`", TEXT):
        assert f"def {name}(" in (ROOT / "hf_immunize" / file).read_text(encoding="utf-8")
