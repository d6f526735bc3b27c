"""Functions of numbers on whatever a caller may pass: a named error, or a right and finite number."""

import math
from dataclasses import astuple, is_dataclass

import numpy as np
import pytest
import torch

import hf_immunize as hf
from hf_immunize.errors import ImmunizationError, NonFiniteError
from hf_immunize.linear.optimum import optimal_map
from hf_immunize.linear.probe import least_squares_probe, probe_accuracy
from hf_immunize.linear.time import time_map
from hf_immunize.spectra.hessian_functions import hessian_log_kappa
from hf_immunize.spectra.ratio import reference_condition_number


def matrix(seed, rows=8, columns=3):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)[:columns]
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * spread


Z, P, H, Y = matrix(0), matrix(1), matrix(2), matrix(3, columns=2)
LABELS = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0])
TASKS = {"X_benign": P, "X_harmful": H}


def of_factor(features, **options):
    return hf.FeatureFactor(options.pop("block_rows", None)).update(features, **options).conditioning()


def ratio(**options):
    tasks = {"harmful": 2 * H, "harmful_reference": H, "benign": P, "benign_reference": P}
    return hf.relative_immunization_ratio(**(tasks | options))


def gradient_of(function):
    def gradient(features, **options):
        if not isinstance(features, torch.Tensor) or not features.is_floating_point():
            return function(features, **options)
        leaf = features.clone().requires_grad_()
        function(leaf, **options).backward()
        return leaf.grad

    return gradient


REGULARIZERS = {
    hf.r_well: 2,
    hf.r_ill: -2,
    hf.hessian_r_well: 4,
    hf.hessian_r_ill: -4,
    hf.spectral_concentration: 0,
    hessian_log_kappa: 0,
}
# Function, good arguments, and the degree in each matrix of which the result is homogeneous, where it is.
CASES = {
    "condition_number": (hf.condition_number, {"matrix": Z}, {"matrix": 0}),
    "feature_conditioning": (hf.feature_conditioning, {"features": Z, "reference": P, "produced_dtype": None}, {}),
    "FeatureFactor": (of_factor, {"features": Z, "produced_dtype": None, "block_rows": 9}, {}),
    **{f.__name__: (f, {next(iter(f.__annotations__)): Z}, {next(iter(f.__annotations__)): d})
       for f, d in REGULARIZERS.items()},
    **{f"gradient of {f.__name__}": (gradient_of(f), {"features": Z}, {"features": d - 1})
       for f, d in REGULARIZERS.items()},
    "ratio": (ratio, {"harmful": H, "harmful_reference": P, "benign": Z, "benign_reference": P, "seed": 0}, {}),
    "ratio of groups": (ratio, {"harmful": H, "protocol": "groups", "group_size": 4, "num_groups": 2, "seed": 0}, {}),
    "ratio by the reference": (ratio, {"harmful": H, "protocol": "reference"}, {}),
    "reference_condition_number": (reference_condition_number, {"features": Z}, {}),
    "rir_ceiling": (
        hf.rir_ceiling, TASKS | {"tolerance": 1e-6, "produced_dtype": None}, {"X_benign": 0, "X_harmful": 0},
    ),
    "frontier": (lambda points: hf.rir_ceiling(P, H).frontier(points), {"points": 3}, {}),
    "optimal_map": (optimal_map, TASKS | {"t": 2.0}, {"X_benign": -1, "X_harmful": 0}),
    **{
        f"immunize_linear, {method}": (
            lambda **options: hf.immunize_linear(**options).history[-1]["rir"],
            TASKS | {"y_benign": LABELS, "method": method, "y_harmful": LABELS, "epochs": 2, "lr": 1e-3}
            | {"batch_size": 4, "seed": 0, "inner_steps": 2},
            {},
        )
        for method in ("kappa", "r_ill", "imma", "opt_kappa")
    },
    "probe_convergence": (
        hf.probe_convergence, {"Z": Z, "y": Y, "steps": 3, "produced_dtype": None}, {"Z": 0, "y": 0},
    ),
    "probe_accuracy": (
        probe_accuracy, {"Z": Z, "labels": LABELS, "Z_test": P, "labels_test": LABELS, "steps": 2}, {},
    ),
    "least_squares_probe": (least_squares_probe, {"Z": Z, "y": Y, "ridge": 0.0, "intercept": True}, {"y": 1}),
    "probing_time": (
        lambda **options: hf.probing_time(**options).curve,
        {"Z": Z, "Y": Y, "fractions": (0.5,), "attainable": None, "max_steps": 9, "produced_dtype": None},
        {"Z": 0, "Y": 0},
    ),
    "fitted_fraction": (hf.fitted_fraction, {"Z": Z, "Y": Y, "steps": 3}, {"Z": 0, "Y": 0}),
    "time_map": (
        time_map, {"X_benign": P, "y_benign": Y, "delta": 0.1, "shrinkage": 0.0, "keep": 1}, {"X_benign": -1},
    ),
}  # fmt: skip


def numbers(result):
    """All numbers of a result as one float64 vector; flags and names are left out."""
    if isinstance(result, torch.Tensor):
        return result.detach().to(torch.float64).flatten()
    if is_dataclass(result):
        result = astuple(result)
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, list | tuple):
        return torch.cat([torch.zeros(0, dtype=torch.float64), *map(numbers, result)])
    of_number = isinstance(result, int | float) and not isinstance(result, bool)
    return torch.tensor([float(result)] if of_number else [], dtype=torch.float64)


ENDLESS = []
ENDLESS.append(ENDLESS)
# No numbers, another shape, values that are not finite or of no use, other dtypes and layouts, the ends of the range.
ODD_MATRICES = [
    None, "abc", {"a": 1}, object(), torch.nn.Linear, [], [[1.0, 2.0], [3.0]], [["a", "b"]], [[None, 1.0, 2.0]] * 8,
    ENDLESS, [[10**400, 1, 2]] * 8, np.array([["2020-01-01"] * 3] * 8, dtype="datetime64[D]"),
    torch.tensor(1.0), torch.ones(8), torch.ones(8, 3, 2), torch.ones(0, 3), torch.ones(8, 0), torch.ones(1, 3),
    torch.zeros(8, 3), torch.ones(8, 3), torch.full((8, 3), math.nan), torch.full((8, 3), -math.inf),
    torch.arange(24).reshape(8, 3), Z > 0, Z.to(torch.complex64), Z.half(), Z.bfloat16(),
    Z.float().to(torch.float8_e4m3fn), torch.ones(8, 3, device="meta"), Z.to_sparse(),
    torch.quantize_per_tensor(Z.float(), 0.1, 0, torch.qint8), matrix(5, columns=2).repeat(1, 3), matrix(5, rows=5),
    Z.numpy()[::-1], Z.numpy().astype(np.longdouble), Z.tolist(), LABELS,
    torch.full((8, 3), torch.finfo(torch.float64).max, dtype=torch.float64),
    torch.full((8, 3), 5e-324, dtype=torch.float64), Z * torch.tensor([1e300, 1.0, 1e-300], dtype=torch.float64),
]  # fmt: skip
ODD_NUMBERS = [
    None, "abc", "3", [1], True, -1, 0, 1.5, math.nan, math.inf, 10**12, 10**400, 1j, torch.ones(3), torch.tensor(2),
    np.float32(2.0), np.int64(2), object(),
]  # fmt: skip
ODD_LABELS = [
    None, "abc", {"a": 1}, [], torch.tensor(1.0), torch.ones(8, 3, 2), torch.ones(8, device="meta"), LABELS - 1,
    LABELS + 0.5, LABELS.float(), LABELS > 0, LABELS.to(torch.complex64), LABELS[:5], torch.zeros(8, dtype=torch.long),
    torch.full((8,), math.nan), torch.full((8,), math.inf), LABELS * 10**12, ["a", "b"] * 4,
]  # fmt: skip
ODD_DTYPES = [None, "float32", torch.int64, torch.complex64, float]


def odd(name, good):
    if isinstance(good, torch.Tensor):
        return ODD_LABELS if good.dtype == torch.int64 else ODD_MATRICES
    if name in ("method", "protocol", "intercept"):
        return [None, "nonsense", ["kappa"], 3]
    return ODD_DTYPES if name == "produced_dtype" else ODD_NUMBERS


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("case", "name"), [(case, name) for case in CASES for name in CASES[case][1]])
def test_any_input_gives_a_named_error_or_a_finite_number(case, name):
    function, arguments, _ = CASES[case]
    for value in odd(name, arguments[name]):
        try:
            found = function(**(arguments | {name: value}))
        except ImmunizationError as error:
            assert str(error)
            continue
        if getattr(found, "bound", None) == "undetermined" or getattr(found, "is_meta", False):
            continue  # which NaN stands for, or which claims no number
        if isinstance(found, hf.Ceiling):
            found = (found.benign_kappa, found.harmful_kappa)  # a ceiling may be infinite
        assert torch.isfinite(numbers(found)).all(), value


SIZES = [(torch.float32, e) for e in (-133, -60, 120)] + [(torch.float64, e) for e in (-1000, -300, 500, 1000)]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("case", "name", "degree"), [(case, *item) for case in CASES for item in CASES[case][2].items()]
)
@pytest.mark.parametrize(("dtype", "exponent"), SIZES)
def test_any_size_gives_the_number_of_float64_and_ordinary_size(case, name, degree, dtype, exponent):
    function, arguments, _ = CASES[case]
    scaled = torch.ldexp(arguments[name], torch.tensor(exponent)).to(dtype)
    # The same values, as they were rounded, of ordinary size.
    ordinary = torch.ldexp(scaled.to(torch.float64), torch.tensor(-exponent))
    wanted = numbers(function(**(arguments | {name: ordinary.to(dtype)})))
    in_dtype = case.removeprefix("gradient of ") in {f.__name__ for f in REGULARIZERS}
    result_dtype = dtype if in_dtype else torch.float64
    for _ in range(abs(degree)):
        wanted = torch.ldexp(wanted, torch.tensor(int(math.copysign(exponent, degree * exponent))))
    held = wanted.to(result_dtype)
    try:
        found = numbers(function(**(arguments | {name: scaled})))
    except NonFiniteError:
        # The regularizers take numbers between 1e-30 and 1e30.
        assert not torch.isfinite(held).all() or (in_dtype and abs(exponent) > 90)
        return
    except ImmunizationError:
        assert exponent == -133  # below the normal numbers of float32: rounding noise may be all there is
        return
    # A gradient beyond its dtype is infinite.
    assert torch.isfinite(found).all() or (case.startswith("gradient") and not torch.isfinite(held).all())
    if exponent != -133 or degree:
        atol = torch.finfo(result_dtype).smallest_normal
        torch.testing.assert_close(found, held.to(torch.float64), rtol=1e-5, atol=atol)
