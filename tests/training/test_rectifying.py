"""The term that switches rectifiers off."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_immunize.training.objectives import rectifier_activity


def values(seed, rows=6):
    return torch.randn(rows, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.01, 100.0))
def test_norm_in_closed_form_is_that_of_autograd(seed, scale):
    harmful = (scale * values(seed)).requires_grad_()
    term = rectifier_activity(harmful, scale * values(seed + 1))
    (gradient,) = torch.autograd.grad(term.value, harmful)
    assert torch.isclose(term.gradient_norm, gradient.norm(), rtol=1e-8)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.01, 100.0))
def test_value_does_not_depend_on_the_scale(seed, scale):
    small, large = (rectifier_activity(c * values(seed), c * values(seed + 1)).value for c in (1.0, scale))
    assert torch.isclose(small, large, rtol=1e-9)


def test_half_precision_is_widened_first():
    term = rectifier_activity(values(0).bfloat16(), values(1).bfloat16())
    assert term.value.dtype == torch.float32


def test_a_layer_that_is_off_by_the_margin_has_neither_value_nor_gradient_left():
    harmful = torch.full((3, 4), -1.0, requires_grad=True)
    term = rectifier_activity(harmful, torch.ones(2, 4))
    (gradient,) = torch.autograd.grad(term.value, harmful)
    assert term.gradient_norm == 0 and not gradient.any()


@pytest.mark.parametrize(("entering", "left"), [(1.0, 1.0), (-0.495, 0.25), (-0.6, 0.0)])
def test_it_tells_how_much_is_left(entering, left):
    # Ones of benign images are the unit; a margin of 0.5 leaves 0.005² = 0.25e-4 at -0.495.
    term = rectifier_activity(torch.full((4, 3), entering, dtype=torch.float64), torch.ones(4, 3))
    assert term.left.item() == pytest.approx(left, rel=1e-6)
