"""The global batch by its features and by its Hessian; what two processes find is in tests/distributed."""

import pytest
import torch

from hf_immunize.training.distributed import sum_hessian
from hf_immunize.training.objectives import INSIDE, OBJECTIVES, Side
from hf_immunize.training.weighting import gradient_norm


SPECTRAL = [name for name in OBJECTIVES if name not in ("imma", *INSIDE)]


def both(name, dtype, scale_free=False):
    """Terms by features and by their Hessian, each with what it is of and the rows."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for given in (lambda rows: rows, sum_hessian):
        generator.manual_seed(0)
        rows = [torch.randn(60, 5, generator=generator).to(dtype).requires_grad_() for _ in range(2)]
        sides = [given(each) for each in rows]
        terms = OBJECTIVES[name](*map(Side, sides), scale_free)
        found.append((terms, dict(zip(("benign", "harmful"), sides, strict=True)), rows))
    return found


def close(found, expected, tolerance):
    difference = found.double() - expected.double()
    return float(difference.norm()) <= tolerance * float(expected.double().norm())


@pytest.mark.parametrize("scale_free", [False, True])
@pytest.mark.parametrize("name", SPECTRAL)
def test_values_and_gradients_are_those_of_the_features(name, scale_free):
    (by_rows, _, rows), (by_sum, _, others) = both(name, torch.float32, scale_free)
    for side in ("benign", "harmful"):
        expected, found = getattr(by_rows, side), getattr(by_sum, side)
        assert expected.keys() == found.keys()
        for term, value in expected.items():
            assert found[term].item() == pytest.approx(value.item(), rel=1e-6)
            value.backward()
            found[term].backward()
    for some, wanted in zip(others, rows, strict=True):
        assert (some.grad is None) == (wanted.grad is None)
        assert wanted.grad is None or close(some.grad, wanted.grad, 1e-6)


def test_half_precision_features_get_gradients_of_their_type():
    (by_rows, _, rows), (by_sum, _, others) = both("concentration", torch.bfloat16)
    by_rows.harmful["concentration"].backward()
    by_sum.harmful["concentration"].backward()
    assert others[1].grad.dtype == torch.bfloat16 and close(others[1].grad, rows[1].grad, 1e-2)


@pytest.mark.parametrize("name", SPECTRAL)
def test_norms_of_gradients_are_those_on_the_features(name):
    (by_rows, features, _), (by_sum, hessians, _) = both(name, torch.float32)
    for side in ("benign", "harmful"):
        for term, value in getattr(by_rows, side).items():
            expected = gradient_norm(value, features[side])
            found = gradient_norm(getattr(by_sum, side)[term], hessians[side])
            assert found.dtype == expected.dtype and float(found) == pytest.approx(float(expected), rel=1e-5)
