"""Public functions of numbers on whatever a caller may pass: a named error, or a right and finite number."""

import math
from dataclasses import astuple, is_dataclass

import numpy as np
import pytest
import torch

import hf_immunize as hf
from hf_immunize.errors import ImmunizationError, NonFiniteError
from hf_immunize.linear.definition import check_definition
from hf_immunize.linear.inputs import standardize
from hf_immunize.linear.optimum import optimal_map, principal_angles, proposition_diagonal
from hf_immunize.linear.probe import least_squares_probe, probe_accuracy, probe_loss_curve, probe_path
from hf_immunize.spectra.ratio import reference_condition_number
from hf_immunize.spectra.regularizers import hessian_log_kappa, kappa_floor


def matrix(seed, rows=8, columns=3):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)[:columns]
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * spread


Z, P, H, Y = matrix(0), matrix(1), matrix(2), matrix(3, columns=2)
LABELS = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0])
THETA = matrix(4, rows=3)


def of_factor(features, **options):
    return hf.FeatureFactor(options.pop("block_rows", None)).update(features, **options).conditioning()


def ratio(**options):
    tasks = {"harmful": 2 * H, "harmful_reference": H, "benign": P, "benign_reference": P}
    return hf.relative_immunization_ratio(**(tasks | options))


def last_of_path(**options):
    return list(probe_path(**options))[-1]


def gradient_of(function):
    def gradient(features, **options):
        if not isinstance(features, torch.Tensor) or not features.is_floating_point():
            return function(features, **options)
        leaf = features.clone().requires_grad_()
        function(leaf, **options).backward()
        return leaf.grad

    return gradient


# Function, good arguments, and the degree in each matrix of which the result is homogeneous; None of a few numbers
# that are not, for which finite is all that is asked. "numbers", "counts", "labels" and "dtypes" are other arguments.
CASES = {
    "condition_number": (hf.condition_number, {"matrix": Z}, {"matrix": 0}),
    "feature_conditioning": (
        hf.feature_conditioning,
        {"features": Z, "reference": P, "produced_dtype": None},
        {"features": None, "reference": None},
    ),
    "FeatureFactor": (of_factor, {"features": Z, "produced_dtype": None, "block_rows": 9}, {"features": None}),
    "r_well": (hf.r_well, {"matrix": Z}, {"matrix": 2}),
    "r_ill": (hf.r_ill, {"matrix": Z}, {"matrix": -2}),
    "hessian_r_well": (hf.hessian_r_well, {"features": Z}, {"features": 4}),
    "hessian_r_ill": (hf.hessian_r_ill, {"features": Z}, {"features": -4}),
    "spectral_concentration": (hf.spectral_concentration, {"features": Z}, {"features": 0}),
    "hessian_log_kappa": (hessian_log_kappa, {"features": Z}, {"features": 0}),
    "gradient of r_well": (gradient_of(hf.r_well), {"features": Z}, {"features": 1}),
    "gradient of r_ill": (gradient_of(hf.r_ill), {"features": Z}, {"features": -3}),
    "gradient of hessian_r_well": (gradient_of(hf.hessian_r_well), {"features": Z}, {"features": 3}),
    "gradient of hessian_r_ill": (gradient_of(hf.hessian_r_ill), {"features": Z}, {"features": -5}),
    "gradient of concentration": (gradient_of(hf.spectral_concentration), {"features": Z}, {"features": -1}),
    "kappa_floor": (kappa_floor, {"concentration": -1.0, "rank": 3}, {}),
    "ratio": (
        ratio,
        {"harmful": H, "harmful_reference": P, "benign": Z, "benign_reference": P, "seed": 0},
        {"harmful": None, "harmful_reference": None, "benign": None, "benign_reference": None},
    ),
    "ratio of groups": (
        ratio,
        {"harmful": H, "harmful_reference": P, "protocol": "groups", "group_size": 4, "num_groups": 2, "seed": 0},
        {"harmful": None},
    ),
    "ratio by the reference": (ratio, {"harmful": H, "protocol": "reference"}, {"harmful": None}),
    "reference_condition_number": (reference_condition_number, {"features": Z}, {"features": None}),
    "rir_ceiling": (
        hf.rir_ceiling,
        {"X_benign": P, "X_harmful": H, "tolerance": 1e-6, "produced_dtype": None},
        {"X_benign": 0, "X_harmful": 0},
    ),
    "frontier": (lambda points: hf.rir_ceiling(P, H).frontier(points), {"points": 3}, {}),
    "optimal_map": (
        optimal_map,
        {"X_benign": P, "X_harmful": H, "t": 2.0, "harmful_gain": 10.0, "tolerance": 1e-6},
        {"X_benign": -1, "X_harmful": 0},
    ),
    "immunize_linear": (
        lambda **options: hf.immunize_linear(y_benign=None, **options).theta,
        {"X_benign": P, "X_harmful": H, "method": "optimum", "t": 2.0},
        {"X_benign": -1, "X_harmful": 0},
    ),
    **{
        f"immunize_linear, {method}": (
            lambda **options: hf.immunize_linear(**options).history[-1]["rir"],
            {"X_benign": P, "y_benign": LABELS, "X_harmful": H, "method": method, "y_harmful": LABELS}
            | {"epochs": 2, "lr": 1e-3, "batch_size": 4, "seed": 0, "inner_steps": 2, "theta_init": THETA},
            {"X_benign": None, "X_harmful": None, "theta_init": None},
        )
        for method in ("kappa", "r_ill", "imma", "opt_kappa")
    },
    "probe_convergence": (
        hf.probe_convergence,
        {"Z": Z, "y": Y, "steps": 3, "intercept": False, "produced_dtype": None},
        {"Z": 0, "y": 0},
    ),
    "probe_convergence, intercept": (
        hf.probe_convergence,
        {"Z": Z, "y": Y, "steps": 3, "intercept": True},
        {"Z": None, "y": 0},
    ),
    "probe_path": (last_of_path, {"Z": Z, "y": Y, "steps": 3}, {"Z": -1, "y": 1}),
    "probe_path, logistic": (
        last_of_path,
        {"Z": Z, "y": LABELS, "steps": 3, "loss": "logistic"},
        {"Z": -1},
    ),
    "probe_loss_curve": (probe_loss_curve, {"Z": Z, "y": Y, "steps": 3}, {"Z": 0, "y": 2}),
    "probe_loss_curve, logistic": (
        probe_loss_curve,
        {"Z": Z, "y": LABELS, "steps": 3, "loss": "logistic"},
        {"Z": 0},
    ),
    "probe_accuracy": (
        probe_accuracy,
        {"Z": Z, "labels": LABELS, "Z_test": P, "labels_test": LABELS, "steps": 2},
        {"Z": None, "Z_test": None},
    ),
    "least_squares_probe": (
        least_squares_probe,
        {"Z": Z, "y": Y, "ridge": 0.0, "intercept": True},
        {"Z": None, "y": 1},
    ),
    "principal_angles": (
        principal_angles,
        {"X_benign": P, "X_harmful": H, "leading": 2},
        {"X_benign": 0, "X_harmful": 0},
    ),
    "proposition_diagonal": (proposition_diagonal, {"X": Z, "theta": THETA}, {"X": 2, "theta": 2}),
    "check_definition": (
        check_definition,
        {"X_benign": P, "X_harmful": H, "theta": THETA, "y_benign": Y, "much_larger": 2.0, "utility_tolerance": 0.1},
        {"X_benign": 0, "X_harmful": 0, "theta": 0},
    ),
    "standardize": (standardize, {"X": Z}, {"X": 0}),
}


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


class Odd:
    """Has a length and items, and none of them a number."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self


ENDLESS = []
ENDLESS.append(ENDLESS)
ODD_MATRICES = {
    "None": None,
    "text": "abc",
    "empty text": "",
    "bytes": b"abc",
    "a number": 1.5,
    "dict": {"a": 1},
    "set": {1.0, 2.0},
    "object": object(),
    "Odd": Odd(),
    "class": torch.nn.Linear,
    "function": len,
    "empty list": [],
    "nested empty": [[]],
    "ragged": [[1.0, 2.0], [3.0]],
    "texts": [["a", "b"], ["c", "d"]],
    "Nones": [[None, 1.0, 2.0]] * 8,
    "endless": ENDLESS,
    "huge whole numbers": [[10**400, 1, 2]] * 8,
    "objects": np.array([[object()] * 3] * 8),
    "dates": np.array([["2020-01-01"] * 3] * 8, dtype="datetime64[D]"),
    "0-d": torch.tensor(1.0),
    "1-d": torch.ones(8),
    "3-d": torch.ones(8, 3, 2),
    "no rows": torch.ones(0, 3),
    "no columns": torch.ones(8, 0),
    "one row": torch.ones(1, 3),
    "zeros": torch.zeros(8, 3),
    "ones": torch.ones(8, 3),
    "NaN": torch.full((8, 3), math.nan),
    "one NaN": torch.cat([Z[:7], torch.tensor([[1.0, math.nan, 1.0]])]),
    "inf": torch.full((8, 3), math.inf),
    "one -inf": torch.cat([Z[:7], torch.tensor([[1.0, -math.inf, 1.0]])]),
    "whole": torch.arange(24).reshape(8, 3),
    "uint8": (10 * Z).to(torch.uint8),
    "bool": Z > 0,
    "complex": Z.to(torch.complex64),
    "half": Z.half(),
    "bfloat16": Z.bfloat16(),
    "float8": Z.float().to(torch.float8_e4m3fn),
    "meta": torch.ones(8, 3, device="meta"),
    "sparse": Z.to_sparse(),
    "quantized": torch.quantize_per_tensor(Z.float(), 0.1, 0, torch.qint8),
    "wide": matrix(5, columns=2).repeat(1, 3),
    "few rows": matrix(5, rows=5),
    "array": Z.numpy(),
    "reversed array": Z.numpy()[::-1],
    "long double": Z.numpy().astype(np.longdouble),
    "list": Z.tolist(),
    "labels": LABELS,
    "largest": torch.full((8, 3), torch.finfo(torch.float64).max, dtype=torch.float64),
    "smallest": torch.full((8, 3), 5e-324, dtype=torch.float64),
    "mixed sizes": Z * torch.tensor([1e300, 1.0, 1e-300], dtype=torch.float64),
}
ODD_NUMBERS = {
    "None": None,
    "text": "abc",
    "digits": "3",
    "list": [1],
    "True": True,
    "negative": -1,
    "zero": 0,
    "fraction": 1.5,
    "NaN": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "endless": 10**12,
    "huge": 10**400,
    "complex": 1j,
    "tensor": torch.ones(3),
    "0-d": torch.tensor(2),
    "float32": np.float32(2.0),
    "int64": np.int64(2),
    "object": object(),
}
ODD_LABELS = {
    **{
        name: ODD_MATRICES[name]
        for name in ("None", "text", "dict", "object", "empty list", "0-d", "3-d", "NaN", "meta")
    },
    "negative": LABELS - 1,
    "fractions": LABELS + 0.5,
    "floats": LABELS.float(),
    "bool": LABELS > 0,
    "complex": LABELS.to(torch.complex64),
    "few": LABELS[:5],
    "one class": torch.zeros(8, dtype=torch.long),
    "NaNs": torch.full((8,), math.nan),
    "infs": torch.full((8,), math.inf),
    "endless": LABELS * 10**12,
    "names": ["a", "b"] * 4,
}
ODD_DTYPES = {"None": None, "text": "float32", "whole": torch.int64, "complex": torch.complex64, "class": float}
SAME = {"method", "loss", "protocol", "intercept"}


def draws():
    for case, (_, arguments, _) in CASES.items():
        for name, good in arguments.items():
            if isinstance(good, torch.Tensor) and good.dtype == torch.int64:
                odd = ODD_LABELS
            elif isinstance(good, torch.Tensor):
                odd = ODD_MATRICES
            elif name == "produced_dtype":
                odd = ODD_DTYPES
            elif name not in SAME:
                odd = ODD_NUMBERS
            else:
                odd = {"None": None, "text": "nonsense", "list": ["kappa"], "number": 3}
            yield from (pytest.param(case, name, value, id=f"{case}, {name}={kind}") for kind, value in odd.items())


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("case", "name", "value"), draws())
def test_any_input_gives_a_named_error_or_a_finite_number(case, name, value):
    function, arguments, _ = CASES[case]
    try:
        found = function(**(arguments | {name: value}))
    except ImmunizationError as error:
        assert str(error)
        return
    if getattr(found, "bound", None) == "undetermined":
        return  # which NaN stands for
    if getattr(found, "is_meta", False) or (name == "y_benign" and value is None):
        return  # which claim no number
    if isinstance(found, hf.Ceiling):
        found = (found.benign_kappa, found.harmful_kappa)  # a ceiling may be infinite
    assert torch.isfinite(numbers(found)).all()


def sized():
    for case, (_, _, degrees) in CASES.items():
        for name, degree in degrees.items():
            if degree is not None:
                for dtype, exponents in (
                    (torch.float32, (-133, -100, -60, 60, 100, 120)),
                    (torch.float64, (-1000, -500, -300, 300, 500, 1000)),
                ):
                    for exponent in exponents:
                        yield pytest.param(
                            case, name, degree, dtype, exponent, id=f"{case}, {name}·2^{exponent}, {dtype}"
                        )


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("case", "name", "degree", "dtype", "exponent"), sized())
def test_any_size_gives_the_number_of_float64_and_ordinary_size(case, name, degree, dtype, exponent):
    function, arguments, _ = CASES[case]
    scaled = torch.ldexp(arguments[name], torch.tensor(exponent)).to(dtype)
    # The same values, as they were rounded, of ordinary size.
    ordinary = torch.ldexp(scaled.to(torch.float64), torch.tensor(-exponent))
    wanted = numbers(function(**(arguments | {name: ordinary.to(dtype)})))
    result_dtype = (
        torch.float32 if dtype == torch.float32 and case.removeprefix("gradient of ") in _IN_DTYPE else torch.float64
    )
    for _ in range(abs(degree)):
        wanted = torch.ldexp(wanted, torch.tensor(int(math.copysign(exponent, degree * exponent))))
    held = wanted.to(result_dtype)
    try:
        found = function(**(arguments | {name: scaled}))
    except NonFiniteError:
        # Of a gradient the value may be out of range though it is not.
        value_degree = degree + 1 if case.startswith("gradient") else degree
        limit = math.log2(torch.finfo(result_dtype).max)
        assert not torch.isfinite(held).all() or value_degree * exponent > limit - 16
        return
    except ImmunizationError:
        assert exponent == -133  # below the normal numbers of float32: rounding noise may be all there is
        return
    assert torch.isfinite(numbers(found)).all()
    if exponent != -133 or degree:
        # Angles of 0 are rounding.
        atol = torch.finfo(result_dtype).smallest_normal + (1e-9 if case == "principal_angles" else 0)
        torch.testing.assert_close(numbers(found), held.to(torch.float64), rtol=1e-5, atol=atol)


_IN_DTYPE = {
    "r_well",
    "r_ill",
    "hessian_r_well",
    "hessian_r_ill",
    "concentration",
    "spectral_concentration",
    "hessian_log_kappa",
}
