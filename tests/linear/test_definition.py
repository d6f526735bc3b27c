import pytest
import torch

from hf_immunize.errors import ArgumentError, ShapeError
from hf_immunize.linear.definition import check_definition
from hf_immunize.linear.optimum import optimal_map, rir_ceiling, row_factor


def tasks():
    P = torch.randn(50, 5, dtype=torch.float64) * torch.logspace(0, 1, 5, dtype=torch.float64)
    H = torch.randn(40, 5, dtype=torch.float64) * torch.logspace(1, 0, 5, dtype=torch.float64)
    return P, H, P @ torch.randn(5, dtype=torch.float64) + torch.randn(50)


def test_the_optimum_meets_all_three_parts():
    P, H, y = tasks()
    found = check_definition(P, H, optimal_map(P, H), y)
    assert found == check_definition(row_factor(P), row_factor(H), optimal_map(P, H), y, rows=P)
    assert found.immunized and found.ratio.rir == pytest.approx(rir_ceiling(P, H).value)
    assert found.ratio.benign_ratio == pytest.approx(1.0) and found.loss_after == pytest.approx(found.loss_before)
    assert "(a)" in str(found) and "no" not in str(found)


def test_the_identity_keeps_the_benign_task_and_a_collapsed_map_fails_what_it_destroys():
    P, H, y = tasks()
    for theta in (torch.eye(5), torch.cat([torch.eye(5), torch.eye(5)], 1)):
        found = check_definition(P, H, theta, y)
        assert (found.slower_harmful, found.benign_kept, found.utility_kept) == (False, True, True)
        assert found.ratio.rir == pytest.approx(1.0) and found.loss_after == pytest.approx(found.loss_before)
        assert not found.immunized
    theta = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]))
    found = check_definition(P, H, theta, y)
    assert not found.benign_kept and not found.utility_kept and found.benign_rank_lost == 1
    assert found.ratio.bound == "undetermined"
    assert not check_definition(P, H, theta).utility_kept  # by the rank, without targets
    assert check_definition(P, H, theta, P[:, 0]).utility_kept  # of which the lost direction carries nothing
    assert check_definition(P, H, torch.eye(5)[:, :3], y).benign_rank_lost == 2


def test_large_gains_in_null_directions_do_not_invent_features():
    P, H, y = tasks()
    P = torch.cat([P, P[:, :1] + P[:, 1:2]], 1)
    H = torch.cat([H, H[:, :1]], 1)
    found = check_definition(P, H, optimal_map(P, H, harmful_gain=1e9), y)
    assert found.loss_after == pytest.approx(found.loss_before, rel=1e-6)


def test_bad_input_is_named():
    P, H, y = tasks()
    with pytest.raises(ShapeError, match="theta with 5 rows"):
        check_definition(P, H, torch.eye(4), y)
    with pytest.raises(ArgumentError, match="much_larger"):
        check_definition(P, H, torch.eye(5), y, much_larger=0.5)
    with pytest.raises(ShapeError, match="50 rows"):
        check_definition(P, H, torch.eye(5), y[:-1])
