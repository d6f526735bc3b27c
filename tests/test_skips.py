"""A test that is skipped says what would let it run."""

import ast
import re
from pathlib import Path

import pytest


SKIPPING = {"skip", "skipif", "importorskip"}
REMEDY = re.compile(r"(pip|apt-get) install \S|needs ")


def skips(source):
    """Line and reason (None where there is none) of every call that skips a test."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SKIPPING:
            given = [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
            given += node.args[:1] if node.func.attr == "skip" else []
            yield node.lineno, given[0].value if given and isinstance(given[0], ast.Constant) else None


FOUND = [
    pytest.param(reason, id=f"{path.name}:{line}")
    for path in sorted(Path(__file__).parent.rglob("*.py"))
    for line, reason in skips(path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("reason", FOUND)
def test_a_skipped_test_names_what_it_wants(reason):
    assert reason and REMEDY.search(reason)


@pytest.mark.parametrize(
    "call", ["pytest.skip()", "pytest.importorskip('x')", "pytest.mark.skipif(True, reason='no')"]
)
def test_a_reason_without_a_remedy_is_found(call):
    ((_, reason),) = skips(call)
    assert reason is None or not REMEDY.search(reason)
