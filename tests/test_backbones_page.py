"""The table of model families is what the code finds, and its words are what the heads see."""

import sys
from pathlib import Path

import pytest
import torch
from families import BUILDERS

from hf_immunize.vision.head import penultimate_features


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "backbones.md"
sys.path.insert(0, str(ROOT))
from examples.backbones_page import FAMILIES, page  # noqa: E402


# Row of the table -> tiny model.
TINY = {name: name.lower().replace(" ", "_") for name in FAMILIES} | {"MobileNetV2": "mobilenet_v2"}


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m examples.backbones_page"


def test_every_family_is_on_the_page():
    assert set(TINY.values()) == set(BUILDERS)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_head_sees_what_the_page_says(name):
    torch.manual_seed(0)
    model, pixels = BUILDERS[TINY[name]]().eval(), torch.randn(2, 3, 32, 32)
    for module in model.modules():  # a norm whose weights are one and zero would be the same when left out or doubled
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    backbone = getattr(model, "vision_model", model.base_model)
    expected = FAMILIES[name].features(model, backbone(pixels))
    torch.testing.assert_close(penultimate_features(model, pixels), expected)
