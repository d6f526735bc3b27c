"""What the package imports is declared, bounded and pinned."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DECLARED = {canonicalize_name(one.name): one for one in map(Requirement, PROJECT["dependencies"])}
TOOLS = {canonicalize_name(one.name): one for one in map(Requirement, PROJECT["optional-dependencies"]["test"])}
PINS = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] not in "#"]
PINNED = {canonicalize_name(name): version for name, version in (line.split("==") for line in PINS)}
# Imported where the user has it, and guarded there.
OPTIONAL = {"timm"}


def imported(folder):
    """Top-level names that the files of a folder import."""
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"hf_immunize"} - OPTIONAL


def test_what_the_package_imports_is_declared():
    owners = packages_distributions()
    found = {canonicalize_name(owner) for name in imported("hf_immunize") for owner in owners.get(name, [name])[:1]}
    assert len(found) > 10 and found <= DECLARED.keys()


@pytest.mark.parametrize("name", [*DECLARED, *TOOLS])
def test_what_is_declared_is_pinned_within_its_bounds(name):
    requirement = DECLARED.get(name) or TOOLS[name]
    assert requirement.specifier.contains(PINNED[name])
    assert any(one.operator == ">=" for one in requirement.specifier)


@pytest.mark.parametrize("name", ["transformers", "accelerate", "datasets", "huggingface-hub", "peft"])
def test_the_next_major_version_is_not_taken_untried(name):
    following = f"{int(PINNED[name].split('.')[0]) + 1}.0.0"
    assert not DECLARED[name].specifier.contains(following)
