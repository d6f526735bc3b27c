"""What is read off the files: one direction of imports, a light front door, declared dependencies, UTF-8."""

import ast
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hf_immunize.errors import _EXTRAS


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_immunize"
# Lowest first. A room imports from rooms of a lower level, from itself, and from errors.py.
LEVEL = {"text": 0, "files": 0, "intervals": 0, "spectra": 1, "linear": 2, "metrics": 3, "data": 2, "vision": 2}
LEVEL |= {"features": 3, "attacks": 4, "hub": 4, "audit": 5, "training": 5, "cli": 6, "__main__": 7}


@cache
def nodes(file):
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def imported(file):
    """Dotted names that a file imports; ``from hf_immunize import x`` as ``hf_immunize.x``."""
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: use absolute imports, so that this test can follow them"
            whole = node.module == "hf_immunize"
            yield from (f"hf_immunize.{alias.name}" for alias in node.names) if whole else [node.module]


def test_rooms_import_only_from_below():
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imported(file):
            target = name.removeprefix("hf_immunize.").split(".")[0]
            if name.startswith("hf_immunize.") and target not in ("errors", "__version__", room):
                assert LEVEL[target] < LEVEL[room], f"{file} imports {target}"


def test_spectra_imports_torch_alone():
    allowed = {"torch", "hf_immunize", "math", "dataclasses", "typing", "collections", "contextlib", "__future__"}
    for file in (PACKAGE / "spectra").glob("*.py"):
        assert {name.split(".")[0] for name in imported(file)} <= allowed, file


def test_importing_the_package_alone_loads_nothing_heavy():
    code = "import sys, hf_immunize; print([m for m in ('transformers', 'datasets', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_text_files_are_read_and_written_as_utf8():
    for file in (file for name in ("hf_immunize", "examples", "benchmarks") for file in (ROOT / name).rglob("*.py")):
        for call in nodes(file):
            if isinstance(call, ast.Call) and _opens_text(call):
                named = {keyword.arg for keyword in call.keywords}
                assert "encoding" in named, f"{file}:{call.lineno} leaves the encoding to the machine"


def _opens_text(call):
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return True
    # The method of a path has its mode first, the function after the path; methods of other things take no mode.
    values = [*call.args[:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    texts = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    modes = [text for text in texts if set(text) <= set("rwxab+t")]
    is_open = name == "open" and (isinstance(call.func, ast.Name) or bool(modes))
    return is_open and not any("b" in mode for mode in modes)


# ---- dependencies: declared, bounded and pinned ----

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def declared(*lists):
    """Requirements by their names, without those that an extra takes from another."""
    found = {canonicalize_name(one.name): one for each in lists for one in map(Requirement, each)}
    return {name: one for name, one in found.items() if name != PROJECT["name"]}


OPTIONAL = declared(EXTRAS["plots"], EXTRAS["audit"])
DECLARED = declared(PROJECT["dependencies"]) | OPTIONAL
TOOLS = declared(EXTRAS["test"], EXTRAS["docs"])
PINS = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] not in "#"]
PINNED = {canonicalize_name(name): version for name, version in (line.split("==") for line in PINS)}


def test_what_the_package_imports_is_declared():
    names = {name.split(".")[0] for file in PACKAGE.rglob("*.py") for name in imported(file)}
    # timm is imported where the user has it, and guarded there; trackio where the run reports to it.
    names -= {*sys.stdlib_module_names, "hf_immunize", "timm", "trackio"}
    owners = packages_distributions()
    found = {canonicalize_name(owner) for name in names for owner in owners.get(name, [name])[:1]}
    assert len(found) > 10 and found <= DECLARED.keys()


def test_what_an_extra_brings_is_named_where_it_is_missed():
    owners = packages_distributions()
    assert {canonicalize_name(owners[package][0]) for package in _EXTRAS} == OPTIONAL.keys()
    for package, extra in _EXTRAS.items():
        assert canonicalize_name(owners[package][0]) in declared(EXTRAS[extra])


@pytest.mark.parametrize("name", [*DECLARED, *TOOLS])
def test_what_is_declared_is_pinned_within_its_bounds(name):
    specifier = (DECLARED.get(name) or TOOLS[name]).specifier
    assert specifier.contains(PINNED[name]) and any(one.operator == ">=" for one in specifier)
    if name in ("transformers", "accelerate", "datasets", "huggingface-hub", "peft"):  # no major version untried
        assert not specifier.contains(f"{int(PINNED[name].split('.')[0]) + 1}.0.0")
