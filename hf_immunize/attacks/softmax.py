"""Softmax regression by L-BFGS: our own, and scikit-learn's."""

from __future__ import annotations

import warnings

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from hf_immunize.attacks.first_order import standardize_part
from hf_immunize.attacks.presets import ProbeBudget
from hf_immunize.attacks.probe_data import Finding, Part, ProbeData, accuracy, best_index


# Inverse strengths of scikit-learn's logistic regression, on features scaled to a mean square of 1.
_INVERSE_STRENGTHS = (1e-2, 1e-1, 1.0)


def lbfgs(data: ProbeData, seed: int, dtype: torch.dtype, budget: ProbeBudget) -> Finding:
    """Softmax regression by L-BFGS on standardized features, over penalties, each from the last one's weights.

    Args:
        data: Features and labels.
        seed: Draws the rows that the penalty is chosen on.
        dtype: Precision of all arithmetic.
        budget: `ProbeBudget.iterations`.

    Returns:
        The finding, without a curve.
    """
    penalties = (1e-1, 1e-2, 1e-3)
    iterations = max(1, budget.iterations // 3)

    def tune() -> list[float]:
        # The penalty in float32, whatever the precision of the attack: this is most of the cost.
        part = standardize_part(data.tuning(seed, budget.validation_fraction, torch.float32))
        return softmax_path(part, penalties, data.num_classes, iterations)

    best = best_index(data.keep(seed, "lbfgs", tune))

    def run() -> float:
        whole = standardize_part(data.whole(dtype))
        return softmax_path(whole, penalties[: best + 1], data.num_classes, iterations)[-1]

    value = data.keep(None, ("lbfgs", dtype, best), run)
    return Finding(value, settings={"penalty": penalties[best]}, trials=len(penalties))


def logistic_regression(data: ProbeData, seed: int, dtype: torch.dtype, budget: ProbeBudget) -> Finding:
    """scikit-learn's `LogisticRegression` on the features as they are but for one factor, over its ``C``.

    Args:
        data: Features and labels.
        seed: Draws the rows that ``C`` is chosen on.
        dtype: Precision of all arithmetic.
        budget: `ProbeBudget.iterations`.

    Returns:
        The finding, without a curve.
    """
    iterations = max(1, budget.iterations // 3)

    def tune() -> list[float]:
        part = data.tuning(seed, budget.validation_fraction, torch.float32)
        return _logistic_path(part, _INVERSE_STRENGTHS, iterations)

    best = best_index(data.keep(seed, "logistic_regression", tune))
    value = data.keep(
        None,
        ("logistic_regression", dtype, best),
        lambda: _logistic_path(data.whole(dtype), _INVERSE_STRENGTHS[: best + 1], iterations)[-1],
    )
    settings = {"C": _INVERSE_STRENGTHS[best], "scaled_to_mean_square": 1.0}
    return Finding(value, settings=settings, trials=len(_INVERSE_STRENGTHS))


def softmax_path(part: Part, penalties: tuple[float, ...], num_classes: int, iterations: int) -> list[float]:
    """Accuracy of softmax regression with the mean loss plus ``penalty/2D · ‖W‖²``, for falling penalties.

    Args:
        part: Rows to fit and to measure.
        penalties: Strengths, the largest first; each starts where the last one ended.
        num_classes: Number of classes.
        iterations: Of L-BFGS, for each.

    Returns:
        One accuracy a penalty.
    """
    d = part.Z.shape[1]
    weight = part.Z.new_zeros(d, num_classes, requires_grad=True)
    bias = part.Z.new_zeros(num_classes, requires_grad=True)
    values = []
    for penalty in penalties:
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=1e-5
        )

        def loss(penalty: float = penalty, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(part.Z @ weight + bias, part.y)
            value = value + penalty / (2 * d) * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        with torch.no_grad():
            values.append(accuracy(part.Z_test @ weight + bias, part.y_test))
    return values


def _logistic_path(part: Part, strengths: tuple[float, ...], iterations: int) -> list[float]:
    size = float(part.Z.square().mean().sqrt()) or 1.0
    Z, Z_test = (part.Z / size).numpy(), (part.Z_test / size).numpy()
    values = []
    model = LogisticRegression(max_iter=iterations, warm_start=True, tol=1e-4)
    for strength in strengths:
        model.set_params(C=strength)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the budget is the budget
            model.fit(Z, part.y.numpy())
        values.append(float((model.predict(Z_test) == part.y_test.numpy()).mean()))
    return values
