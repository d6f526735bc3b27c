"""The table of model families is what the code finds. A family without a row is added to it by the command."""

import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "backbones.md"
sys.path.insert(0, str(ROOT))
from examples.backbones_page import SHOWN, page  # noqa: E402


def test_the_page_is_current():
    shown = PAGE.read_text(encoding="utf-8").splitlines()
    expected = page().splitlines()
    rows = {line for line in expected if any(line.startswith(f"| {family.name} |") for family in SHOWN.values())}
    assert set(expected) - rows <= set(shown) <= set(expected), "run: python -m examples.backbones_page"
