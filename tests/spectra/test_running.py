"""The mean log eigenvalue of the latest rows, against float64 references."""

import pytest
import torch
from matrices import gaussian

from hf_immunize.spectra.running import FLOOR, RunningCovariance


def rows(count, dim, seed=0):
    """Centred, with standard deviations from 1 down to 1e-3."""
    found = gaussian(count, dim, seed=seed) * torch.logspace(0, -3, dim, dtype=torch.float64)
    return found - found.mean(dim=0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_of_one_batch_value_and_gradient_are_those_of_the_eigenvalues(scale):
    given = rows(64, 8).requires_grad_()
    found = RunningCovariance().mean_log_eigenvalue(given, torch.tensor(scale))
    covariance = given.mT @ given / 63 / scale
    wanted = torch.linalg.eigvalsh(covariance + FLOOR * torch.eye(8)).log().mean()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(value, given)[0] for value in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_batches_of_fewer_rows_than_dimensions_show_the_smallest_eigenvalues_together():
    running, dim = RunningCovariance(), 24
    batches = rows(4000, dim).split(12)
    values = [float(running.mean_log_eigenvalue(batch, torch.tensor(1.0))) for batch in batches]
    wanted = float(torch.linalg.eigvalsh(torch.cov(rows(4000, dim).mT)).log().mean())
    alone = float(RunningCovariance().mean_log_eigenvalue(batches[0], torch.tensor(1.0)))
    mean = sum(values[20:]) / len(values[20:])
    # Of about 2D rows a sample's log determinant lies lower by about D/2N; of one batch it is the floor's.
    assert abs(mean - wanted) < 1.0 < 3.0 < wanted - alone


@pytest.mark.parametrize("dim", [8, 200])
def test_rows_in_a_direction_never_seen_pull_no_harder_than_their_share(dim):
    running = RunningCovariance()
    flat = torch.zeros(dim, dtype=torch.float64)
    flat[0] = 1.0
    for batch in rows(640, dim, seed=1).split(64):
        running.mean_log_eigenvalue(batch * flat, torch.tensor(1.0))
    given = rows(64, dim, seed=2).requires_grad_()
    (gradient,) = torch.autograd.grad(running.mean_log_eigenvalue(given, torch.tensor(1.0)), given)
    # Σ z·∂/∂z = 2·tr(S⁻¹C)/D, and S holds at least its share of C.
    assert 0 < float((gradient * given.detach()).sum()) <= 2 * min(64, dim) / dim / min(1.0, 64 / dim) + 1e-6


def test_what_was_saved_goes_on_to_the_bit_and_what_is_not_finite_is_nan():
    batches = rows(96, 24).split(12)
    first, second = RunningCovariance(), RunningCovariance()
    for batch in batches[:4]:
        first.mean_log_eigenvalue(batch, torch.tensor(1.0))
    second.load_state_dict(first.state_dict())
    for batch in batches[4:]:
        some, wanted = (one.mean_log_eigenvalue(batch, torch.tensor(1.0)) for one in (second, first))
        assert torch.equal(some, wanted)
    assert first.mean_log_eigenvalue(torch.full((12, 24), torch.nan), torch.tensor(1.0)).isnan()


@pytest.mark.parametrize("size", [0.0, 1e-4, 1e4])
def test_a_batch_that_varies_far_less_or_more_than_those_before_has_a_finite_value_and_gradient(size):
    running = RunningCovariance()
    for batch in rows(96, 512, seed=1).split(32):
        running.mean_log_eigenvalue(batch, batch.square().sum() / 31)
    given = (size * rows(32, 512, seed=2)).requires_grad_()
    scale = (given.detach().square().sum() / 31).clamp_min(torch.finfo(torch.float64).tiny)
    value = running.mean_log_eigenvalue(given, scale)
    (gradient,) = torch.autograd.grad(value, given)
    assert value.isfinite() and gradient.isfinite().all()
