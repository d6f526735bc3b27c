"""Weights by gradient norm, by a multiplier, and their warm-up."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_immunize.training.arguments import Method
from hf_immunize.training.objectives import InnerTerm, Terms
from hf_immunize.training.weighting import Weighting, warmup_factor


def ruled(budget=None, **options):
    """Weighting by a rule: options without their prefix."""
    names = {"benign": "benign_weight", "harmful": "harmful_weight", "warmup_steps": "weight_warmup_steps"}
    options = {names.get(name, f"auto_weight_{name}"): value for name, value in options.items()}
    return Weighting(Method(benign_budget=budget, budget_measure="kl", **options))


def budgeted(count=1, budget=1.0):
    made = [ruled(budget=budget) for _ in range(count)]
    return made[0] if count == 1 else made


def weights(weighting, scale=1.0, step=0, size=3.0):
    """The weights of a benign term of gradient norm `size` and a harmful one of 2·size, the loss, and the log."""
    features = {side: torch.ones(4, requires_grad=True) for side in ("benign", "harmful")}
    terms = Terms({"r": features["benign"][0] * size}, {"q": features["harmful"][0] * 2 * size})
    loss, logged = weighting.weigh(torch.zeros(()), terms, features, lambda: torch.tensor(scale), step)
    assert not (logged["benign_weight"].requires_grad or logged["harmful_weight"].requires_grad)
    assert loss.item() == pytest.approx(size * (logged["benign_weight"] + 2 * logged["harmful_weight"]).item())
    return logged["benign_weight"].item(), logged["harmful_weight"].item(), logged


def run(weighting, divergences):
    for step, divergence in enumerate([*divergences, 0.0]):
        weighting.observe(torch.tensor(divergence), step)
    return weighting.factor.item()


# ---- the multiplier ----


def test_the_multiplier_grows_within_the_budget_falls_beyond_it_and_changes_less_near_it():
    within, beyond, near = ([run(budgeted(), [part] * count) for count in (2, 5)] for part in (0.1, 2.0, 1.05))
    assert within[0] < within[1] and beyond[0] > beyond[1] and abs(near[1] - 0.02) < abs(beyond[1] - 0.02)
    # A loss may have fallen, which leaves it finite.
    assert run(budgeted(), [-0.5] * 3) == run(budgeted(), [0.0] * 3)


def test_the_multiplier_holds_a_quantity_that_it_drives_at_the_budget():
    weighting, driven = budgeted(budget=0.5), []
    for step in range(2000):
        driven.append(10 * weighting.factor.item())
        weighting.observe(torch.tensor(driven[-1]), step)
    assert sum(driven[-500:]) / 500 == pytest.approx(0.5, rel=0.1)


@given(st.lists(st.floats(0, 3), min_size=1, max_size=6), st.integers(1, 5))
def test_micro_batches_count_by_their_mean_and_share_one_multiplier(divergences, parts):
    whole, parted = budgeted(2)
    for step, divergence in enumerate(divergences):
        whole.observe(torch.tensor(divergence, dtype=torch.float64), step)
        factors = set()
        for part in range(parts):
            shift = part - (parts - 1) / 2
            parted.observe(torch.tensor(divergence + shift, dtype=torch.float64), step)
            factors.add(parted.factor.item())
        assert len(factors) == 1
    assert run(whole, []) == pytest.approx(run(parted, []), rel=1e-5)


# ---- the weights ----


def test_automatic_weights_are_inverse_to_gradient_norms_and_numbers_are_used_as_given():
    found = weights(ruled(ratio=0.6), scale=2.0)
    assert found[:2] == pytest.approx((0.6 * 2 / 3, 0.6 * 2 / 6)) and "multiplier" not in found[2]
    assert weights(ruled(benign=0.5, harmful=2.0))[:2] == (0.5, 2.0)
    assert weights(ruled(benign=0.5, ratio=0.6), scale=2.0)[:2] == pytest.approx((0.5, 0.2))


def test_a_multiplier_scales_fixed_weights_too():
    benign, harmful, logged = weights(ruled(benign=5.0, harmful=7.0, budget=1.0))
    assert (benign, harmful) == pytest.approx((5 * logged["multiplier"].item(), 7 * logged["multiplier"].item()))


def test_the_benign_scale_is_a_running_mean_and_is_bounded_where_it_runs_away():
    weighting = ruled(averaging=0.5, bound=100.0)
    found = [weighting.benign_scale(torch.tensor(value)).item() for value in (4.0, 4.0, 8.0)]
    assert found == pytest.approx([4.0, 4.0, (0.125 * 4 + 0.25 * 4 + 0.5 * 8) / 0.875])
    weighting = ruled(averaging=0.0, bound=3.0)
    assert [weighting.benign_scale(torch.tensor(value)).item() for value in (2.0, 1.0, 50.0)] == [2.0, 1.0, 3.0]


@given(st.integers(0, 50), st.integers(1, 20))
def test_warmup_rises_to_one_and_stays(step, length):
    assert warmup_factor(step, length) <= warmup_factor(step + 1, length) <= 1.0
    assert warmup_factor(length + step, length) == 1.0 and warmup_factor(0, length) > 0


def test_warmup_scales_all_weights():
    assert weights(ruled(benign=8.0, harmful=4.0, warmup_steps=4))[:2] == (2.0, 1.0)


# ---- inner terms, which say how much of their work is left ----


def weigh(weighting, left, step=0):
    """The weights of an inner term with so much left and of a benign one, both of gradient norm 1."""
    features, inner, one = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True), torch.tensor(1.0)
    left = None if left is None else torch.tensor(left)
    terms = Terms({"spread": features[0]}, inner={"activity": InnerTerm(inner[0], one, one, left)})
    loss, logged = weighting.weigh(torch.zeros(()), terms, {"benign": features}, lambda: one, step)
    return torch.autograd.grad(loss, inner)[0].norm().item(), logged["benign_weight"].item()


@pytest.mark.parametrize(
    ("rule", "left", "expected"),
    [
        ({"ratio": 0.3}, 1.0, (0.3, 0.3)),
        ({"ratio": 0.3}, 0.5, (0.15, 0.15)),
        ({"ratio": 0.3}, None, (0.3, 0.3)),
        ({"benign": 2.0, "harmful": 3.0}, 0.0, (3.0, 2.0)),
    ],
)
def test_both_weights_fall_with_what_is_left_unless_they_are_numbers(rule, left, expected):
    assert weigh(ruled(**rule), left) == pytest.approx(expected)


@pytest.mark.parametrize(("divergence", "sign"), [(0.1, 0), (2.0, -1)])
def test_where_nothing_is_left_the_multiplier_no_longer_rises_and_falls_as_ever(divergence, sign):
    weighting = budgeted()
    before = weighting.factor.item()
    for step in range(6):
        weighting.observe(torch.tensor(divergence), step)
        weigh(weighting, 0.0, step)
    assert (weighting.factor.item() > before) - (weighting.factor.item() < before) == sign


def test_what_is_left_counts_by_its_mean_over_micro_batches():
    whole, parted = budgeted(2)
    for step in range(4):
        for weighting, lefts in ((whole, [0.5]), (parted, [0.25, 0.75])):
            for left in lefts:
                weighting.observe(torch.tensor(0.1), step)
                weigh(weighting, left, step)
    assert parted.factor.item() == pytest.approx(whole.factor.item())


def test_a_restored_weighting_goes_on_alike():
    straight, restored = budgeted(2)
    for step in range(3):
        straight.observe(torch.tensor(0.5 * step), step)
        straight.benign_scale(torch.tensor(1.0 + step))
        weigh(straight, 0.25, step)
    restored.load_state_dict(straight.state_dict())
    assert run(straight, [3.0]) == run(restored, [3.0])
    assert restored.benign_scale(torch.tensor(9.0)).item() == straight.benign_scale(torch.tensor(9.0)).item()
