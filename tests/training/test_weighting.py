"""Weights by gradient norm, by a multiplier, and their warm-up."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_immunize.training.objectives import InnerTerm, Terms
from hf_immunize.training.weighting import Weighting, WeightRule, warmup_factor


def weights(weighting, scale=1.0, step=0, size=3.0):
    """Weights of a benign term of gradient norm `size` and a harmful one of 2·size."""
    features = {side: torch.ones(4, requires_grad=True) for side in ("benign", "harmful")}
    terms = Terms({"r": features["benign"][0] * size}, {"q": features["harmful"][0] * 2 * size})
    _, logged = weighting.weigh(torch.zeros(()), terms, features, lambda: torch.tensor(scale), step)
    return logged["benign_weight"].item(), logged["harmful_weight"].item(), logged


def run(weighting, divergences):
    for step, divergence in enumerate(divergences):
        weighting.observe(torch.tensor(divergence), step)
    weighting.observe(torch.tensor(0.0), len(divergences))
    return weighting.factor.item()


def test_the_multiplier_grows_while_the_benign_side_is_within_the_budget():
    assert run(Weighting(WeightRule(budget=1.0)), [0.1] * 5) > run(Weighting(WeightRule(budget=1.0)), [0.1] * 2)


def test_the_multiplier_falls_while_the_benign_side_is_beyond_the_budget():
    assert run(Weighting(WeightRule(budget=1.0)), [2.0] * 5) < run(Weighting(WeightRule(budget=1.0)), [2.0] * 2)


def test_the_multiplier_holds_a_quantity_that_it_drives_at_the_budget():
    weighting = Weighting(WeightRule(budget=0.5))
    driven = []
    for step in range(2000):
        driven.append(10 * weighting.factor.item())
        weighting.observe(torch.tensor(driven[-1]), step)
    assert sum(driven[-500:]) / 500 == pytest.approx(0.5, rel=0.1)


@given(st.lists(st.floats(0, 3), min_size=1, max_size=6), st.integers(1, 5))
def test_micro_batches_count_by_their_mean(divergences, parts):
    whole, parted = (Weighting(WeightRule(budget=1.0)) for _ in range(2))
    for step, divergence in enumerate(divergences):
        whole.observe(torch.tensor(divergence, dtype=torch.float64), step)
        for part in range(parts):
            shift = part - (parts - 1) / 2
            parted.observe(torch.tensor(divergence + shift, dtype=torch.float64), step)
    assert run(whole, []) == pytest.approx(run(parted, []), rel=1e-5)


def test_all_micro_batches_of_a_step_share_one_multiplier():
    weighting = Weighting(WeightRule(budget=1.0))
    weighting.observe(torch.tensor(0.1), 0)
    first = weighting.factor.item()
    weighting.observe(torch.tensor(9.0), 0)
    assert weighting.factor.item() == first


def test_automatic_weights_are_inverse_to_gradient_norms():
    benign, harmful, _ = weights(Weighting(WeightRule(ratio=0.6)), scale=2.0)
    assert (benign, harmful) == (pytest.approx(0.6 * 2 / 3), pytest.approx(0.6 * 2 / 6))


def test_a_multiplier_scales_fixed_weights_too():
    weighting = Weighting(WeightRule(benign=5.0, harmful=7.0, budget=1.0))
    benign, harmful, logged = weights(weighting)
    assert (benign, harmful) == (
        pytest.approx(5 * logged["multiplier"].item()),
        pytest.approx(7 * logged["multiplier"].item()),
    )


def test_without_a_budget_there_is_no_multiplier():
    assert "multiplier" not in weights(Weighting(WeightRule()))[2]


def test_the_benign_scale_is_a_running_mean_that_starts_at_its_first_value():
    weighting = Weighting(WeightRule(averaging=0.5, bound=100.0))
    found = [weighting.benign_scale(torch.tensor(value)).item() for value in (4.0, 4.0, 8.0)]
    assert found == [pytest.approx(4.0), pytest.approx(4.0), pytest.approx((0.125 * 4 + 0.25 * 4 + 0.5 * 8) / 0.875)]


def test_a_benign_gradient_that_runs_away_is_bounded():
    weighting = Weighting(WeightRule(averaging=0.0, bound=3.0))
    assert [weighting.benign_scale(torch.tensor(value)).item() for value in (2.0, 1.0, 50.0)] == [2.0, 1.0, 3.0]


@given(st.integers(0, 50), st.integers(1, 20))
def test_warmup_rises_to_one_and_stays(step, length):
    assert warmup_factor(step, length) <= warmup_factor(step + 1, length) <= 1.0
    assert warmup_factor(length + step, length) == 1.0 and warmup_factor(0, length) > 0


def test_warmup_scales_all_weights():
    rule = WeightRule(benign=8.0, harmful=4.0, warmup_steps=4)
    assert weights(Weighting(rule), step=0)[:2] == (2.0, 1.0)


def test_a_restored_weighting_goes_on_alike():
    rule = WeightRule(budget=1.0)
    straight, stopped = Weighting(rule), Weighting(rule)
    for weighting in (straight, stopped):
        for step in range(3):
            weighting.observe(torch.tensor(0.5 * step), step)
            weighting.benign_scale(torch.tensor(1.0 + step))
    restored = Weighting(rule)
    restored.load_state_dict(stopped.state_dict())
    for weighting in (straight, restored):
        weighting.observe(torch.tensor(3.0), 3)
    assert restored.factor.item() == straight.factor.item()
    assert restored.benign_scale(torch.tensor(9.0)).item() == straight.benign_scale(torch.tensor(9.0)).item()


def test_a_benign_loss_that_fell_leaves_a_finite_multiplier():
    assert run(Weighting(WeightRule(budget=1.0)), [-0.5] * 3) == run(Weighting(WeightRule(budget=1.0)), [0.0] * 3)


def test_the_multiplier_changes_the_less_the_nearer_the_budget_is():
    near, far = (abs(run(Weighting(WeightRule(budget=1.0)), [part] * 3) - 0.02) for part in (1.05, 2.0))
    assert near < far


class TestWorkThatIsNearlyDone:
    """An inner term tells how much of its work is left; nothing is spent where there is nothing to gain."""

    @staticmethod
    def weigh(weighting, left, step=0):
        features = torch.ones(4, requires_grad=True)
        inner = torch.ones(4, requires_grad=True)
        one = torch.tensor(1.0)
        terms = Terms({"spread": features[0]}, inner={"activity": InnerTerm(inner[0], one, one, torch.tensor(left))})
        loss, logged = weighting.weigh(torch.zeros(()), terms, {"benign": features}, lambda: one, step)
        return torch.autograd.grad(loss, inner)[0].norm().item(), logged["benign_weight"].item()

    def test_both_weights_fall_with_what_is_left(self):
        weighting = Weighting(WeightRule(ratio=0.3))
        assert self.weigh(weighting, 1.0) == pytest.approx((0.3, 0.3))
        assert self.weigh(weighting, 0.5) == pytest.approx((0.15, 0.15))

    def test_a_number_is_used_as_given(self):
        weighting = Weighting(WeightRule(benign=2.0, harmful=3.0))
        assert self.weigh(weighting, 0.0) == pytest.approx((3.0, 2.0))

    @pytest.mark.parametrize(("divergence", "sign"), [(0.1, 0), (2.0, -1)])
    def test_the_multiplier_no_longer_rises_and_falls_as_ever(self, divergence, sign):
        weighting = Weighting(WeightRule(budget=1.0))
        before = weighting.factor.item()
        for step in range(5):
            weighting.observe(torch.tensor(divergence), step)
            self.weigh(weighting, 0.0, step)
        weighting.observe(torch.tensor(divergence), 5)
        assert (weighting.factor.item() > before) - (weighting.factor.item() < before) == sign

    def test_micro_batches_count_by_their_mean(self):
        whole, parted = (Weighting(WeightRule(budget=1.0)) for _ in range(2))
        for step in range(3):
            for weighting, lefts in ((whole, [0.5]), (parted, [0.25, 0.75])):
                for left in lefts:
                    weighting.observe(torch.tensor(0.1), step)
                    self.weigh(weighting, left, step)
        for weighting in (whole, parted):
            weighting.observe(torch.tensor(0.1), 3)
        assert parted.factor.item() == pytest.approx(whole.factor.item())

    def test_a_term_that_does_not_tell_weighs_as_ever(self):
        one, features = torch.tensor(1.0), torch.ones(4, requires_grad=True)
        terms = Terms({"spread": features[0]}, inner={"own": InnerTerm(features[1], one, one)})
        _, logged = Weighting(WeightRule(ratio=0.3)).weigh(one, terms, {"benign": features}, lambda: one, 0)
        assert logged["benign_weight"].item() == pytest.approx(0.3)

    def test_a_restored_weighting_knows_what_is_left(self):
        weighting, other = (Weighting(WeightRule(budget=1.0)) for _ in range(2))
        weighting.observe(torch.tensor(0.1), 0)
        self.weigh(weighting, 0.25)
        other.load_state_dict(weighting.state_dict())
        for one in (weighting, other):
            one.observe(torch.tensor(0.1), 1)
        assert other.factor.item() == weighting.factor.item()
