"""What people read: pages whose code runs, options that exist, names that are described."""

import inspect
import re
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import typer
from folders import image_folder, tiny_classifier
from PIL import Image
from transformers import pipeline

import hf_immunize
from hf_immunize.cli.main import app
from hf_immunize.cli.train import DataArguments
from hf_immunize.training import immunize as immunizing
from hf_immunize.training.arguments import ImmunizationArguments


ROOT = Path(__file__).parents[1]
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if path.parent.name != "results"
}
# Commands in the pages run a thousand steps; here two suffice.
QUICK = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "disable_tqdm": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the pages' code runs: beside ./my-classifier, ./pets and ./weapons."""
    root = tmp_path_factory.mktemp("pages")
    for seed, (task, classes) in enumerate({"pets": ("cat", "dog"), "weapons": ("gun", "knife")}.items()):
        image_folder(root / task, classes, {"train": 12, "test": 16}, 16, seed)
    tiny_classifier(root / "my-classifier", ("cat", "dog"), 16)
    immunizing.immunize(root / "my-classifier", str(root / "pets"), str(root / "weapons"), root / "runs/mine", **QUICK)
    return root


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if "```python\n" in text and "::" not in text])
def test_code_of_a_page_runs_from_top_to_bottom(page, place, monkeypatch):
    monkeypatch.chdir(place)
    quick = partial(ImmunizationArguments, **QUICK)
    monkeypatch.setattr(immunizing, "ImmunizationArguments", quick)
    monkeypatch.setattr(hf_immunize, "ImmunizationArguments", quick, raising=False)
    names = {"__name__": "page"}
    for code in re.findall(r"^```python\n(.*?)^```", TEXTS[page], re.DOTALL | re.MULTILINE):
        if not code.startswith("# hf_immunize/"):  # a recipe, which test_contributing.py runs
            exec(compile(code, page, "exec"), names)
    assert len(names) > 2


def test_an_immunized_checkpoint_is_one_of_a_pipeline(place):
    classify = pipeline("image-classification", model=str(place / "runs" / "mine"), device="cpu")
    found = classify(Image.new("RGB", (40, 30)))
    assert {one["label"] for one in found} == {"cat", "dog"} and sum(one["score"] for one in found) == pytest.approx(1)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_without_a_network(monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[test]'")
    nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[test]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", 4)
    for cell in notebook.cells:
        cell.source = re.sub(r"max_steps=\d+", "max_steps=5", cell.source)
    nbclient.NotebookClient(notebook, timeout=300).execute()
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert {"image/png", "text/html", "text/markdown"} <= {kind for data in outputs for kind in data}
    assert any("<b>RIR" in data.get("text/html", "") for data in outputs)
    assert set(eval(outputs[-1]["text/plain"])) <= {
        "config.json",
        "immunization.json",
        "model.safetensors",
        "preprocessor_config.json",
    }


def options_of(command):
    if command == "train":
        flags = {*DataArguments.__dataclass_fields__, *ImmunizationArguments.__dataclass_fields__, "config", "help"}
        return {f"--{flag}" for flag in flags} | {f"--{flag.replace('_', '-')}" for flag in flags}
    found = {option for one in commands()[command].params for option in (*one.opts, *one.secondary_opts)}
    return found | {"--help"}


def commands():
    return typer.main.get_command(app).commands


def test_every_command_in_the_pages_exists_with_its_options():
    seen = set()
    for page, text in TEXTS.items():
        for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                found = re.search(r"hf[-_]immunize (\w+)(.*)", line.split("#")[0])
                if found is None:
                    continue
                command, words = found[1], re.findall(r"(?<!\S)--[\w-]+", found[2])
                assert command in commands() and set(words) <= options_of(command), f"{page}: {line}"
                seen.add(command)
    assert seen >= {"demo", "train", "audit", "push", "verify"}


def test_the_reference_has_every_public_name_command_and_metric(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "reference"))
    import generate

    pages = generate.pages()  # which refuses a metric without a description, and a name without a place
    whole = "\n".join(pages.values())
    for module, names in hf_immunize._PUBLIC.items():
        assert all(f"\n::: hf_immunize.{module}.{name}\n" in whole for name in names)
    assert all(f"## `hf-immunize {name}`" in pages["reference/command-line.md"] for name in commands())
    sys.modules.pop("generate")


@pytest.mark.parametrize("name", hf_immunize.__all__[1:])
def test_a_public_name_says_what_it_takes_and_its_methods_what_they_do(name):
    module = next(home for home, names in hf_immunize._PUBLIC.items() if name in names)
    thing = getattr(import_module(f"hf_immunize.{module}"), name)
    text = thing.__doc__ or ""
    assert ">>> " in text or f"import {name}\n" in TEXTS["docs/guides/audit.md"] + TEXTS["docs/guides/publish.md"]
    # Methods, and what a class computes of itself.
    for label, member in vars(thing).items() if inspect.isclass(thing) else ():
        if not label.startswith("_") and (callable(member) or isinstance(member, (property, classmethod))):
            assert inspect.getdoc(getattr(thing, label)), label
    if not inspect.isclass(thing):
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        known = inspect.signature(inspect.unwrap(thing)).parameters if name != "audit" else {}
        missing = [one for one, kind in known.items() if kind.kind not in kinds and not re.search(rf"\b{one}\b", text)]
        assert not missing and "Returns:" in text


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(TEXTS["README.md"].splitlines()) <= 150
    links = re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS["README.md"])
    assert len(links) > 20 and all((ROOT / link).exists() for link in links)


def test_what_the_readme_says_of_the_audit_stands_on_its_page():
    said = TEXTS["README.md"].split("- **Fine-tuning**")[1].split("\n\n")[0]
    page = (ROOT / "docs" / "results" / "audit-demo.md").read_text(encoding="utf-8").replace("%", " %")
    shares = re.findall(r"\d+\.\d %", said)
    assert len(shares) == 7 and all(share in page for share in shares), "take them from docs/results/audit-demo.md"
