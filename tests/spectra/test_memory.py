"""How much memory the functions of features take beside them."""

import re
from pathlib import Path

import pytest
import torch

from hf_immunize.spectra.hessian_functions import Hessian
from hf_immunize.spectra.regularizers import hessian_log_kappa, hessian_r_ill, hessian_r_well, spectral_concentration


DIM = 64


def resident_bytes(name):
    """ "VmRSS", what the process holds, or "VmHWM", the most it held since `reset_peak`."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def reset_peak():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("resetting the peak of resident memory needs Linux")


def features_of(rows, dtype):
    return (torch.randn(rows, DIM) * torch.linspace(1.0, 3.0, DIM)).to(dtype).requires_grad_()


def by_the_hessian(z):
    return hessian_r_well(Hessian.of(z))


@pytest.mark.parametrize("function", [hessian_r_ill, spectral_concentration, hessian_log_kappa, by_the_hessian])
# float32: the gradient, and the same scaled by what comes from above; bfloat16: the first in float32, twice as large
@pytest.mark.parametrize(("dtype", "multiple"), [(torch.float32, 2.0), (torch.bfloat16, 3.0)])
@pytest.mark.parametrize("rows", [50_000, 200_000])
def test_many_rows_take_two_or_three_times_their_own_memory_and_no_more(function, dtype, multiple, rows):
    torch.autograd.grad(function(small := features_of(600, dtype)), small)  # what is loaded once is loaded
    features = features_of(rows, dtype)
    reset_peak()
    before = resident_bytes("VmRSS")
    torch.autograd.grad(function(features), features)
    extra = resident_bytes("VmHWM") - before
    assert extra < multiple * features.nbytes + 4 * 2**20
