"""Solvers in the eigenbasis, and closed forms, are what their names say."""

import pytest
import torch
from attacked import CLASSES, clusters
from sklearn.linear_model import LogisticRegression, Ridge

from hf_immunize.attacks.attacker import Part, ProbeData, decompose, stratified_split
from hf_immunize.attacks.probes import (
    descent_weights,
    filter_accuracies,
    softmax_path,
)
from hf_immunize.errors import NonFiniteError


def whole():
    return ProbeData(*clusters(120, 0), *clusters(80, 1), CLASSES).whole()


@pytest.mark.parametrize("kappa", [4.0, 100.0, 1e4])
def test_descent_in_the_eigenbasis_is_that_on_the_features(kappa):
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 8, generator=generator, dtype=torch.float64)).Q for n in (40, 8))
    Z = U @ torch.diag(torch.logspace(0, -0.5 * torch.tensor(kappa).log10().item(), 8).double()) @ V.T
    part = Part(Z, torch.arange(40) % 3, Z, torch.arange(40) % 3, 3)
    W, Y = torch.zeros(8, 3, dtype=torch.float64), part.targets
    direct = []
    for _ in range(50):
        gradient = Z.T @ (Z @ W - Y)
        W = W - gradient.square().sum() / (Z @ gradient).square().sum() * gradient
        direct.append(W)
    ours = [part.spectrum.V @ weights for weights in descent_weights(part, list(range(1, 51)))]
    assert max(float((a - b).abs().max()) for a, b in zip(direct, ours, strict=True)) < 1e-10


def test_ridge_with_an_intercept_is_scikit_learns():
    part, strength = whole(), 5.0
    h = part.spectrum.s.square() / (part.spectrum.s.square() + strength)
    theirs = Ridge(alpha=strength).fit(part.Z.numpy(), part.targets.numpy()).predict(part.Z_test.numpy()).argmax(1)
    # Accuracy against their answers: 1 means that every answer is the same.
    assert filter_accuracies(Part(part.Z, part.y, part.Z_test, torch.from_numpy(theirs), 4), [h]) == [1.0]


def test_softmax_regression_with_a_penalty_is_scikit_learns():
    part, penalty = whole(), 0.1  # the mean loss plus penalty/2D · ‖W‖², where theirs is C times the sum plus ‖W‖²/2
    strength = part.Z.shape[1] / (len(part.Z) * penalty)
    model = LogisticRegression(C=strength, max_iter=1000, tol=1e-8).fit(part.Z.numpy(), part.y.numpy())
    theirs = torch.from_numpy(model.predict(part.Z_test.numpy()))
    assert softmax_path(Part(part.Z, part.y, part.Z_test, theirs, 4), [penalty], 1000) == [1.0]


@pytest.mark.parametrize("shape", [(40, 8), (9, 8), (8, 8), (8, 9), (8, 40), (0, 3), (3, 0)])
def test_a_decomposition_of_any_shape_has_orthonormal_sides_and_gives_the_matrix(shape):
    Z = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, s, V = decompose(Z)
    eye = torch.eye(min(shape), dtype=torch.float64)
    assert all(torch.allclose(side.mT @ side, eye) for side in (U, V)) and torch.allclose(U * s @ V.mT, Z)
    assert s.tolist() == pytest.approx(torch.linalg.svdvals(Z).tolist())


def test_a_constant_feature_is_standardized_to_zero_and_decomposition_leaves_out_what_is_none():
    Z = torch.tensor([[1.0, 7.0], [3.0, 7.0]])
    assert Part(Z, torch.tensor([0, 1]), Z, torch.tensor([0, 1]), 2).standardized().Z[:, 1].tolist() == [0.0, 0.0]
    Z = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    Z[:, 4] = Z[:, 0]
    U, s, V = decompose(Z)
    assert len(s) == 4 and torch.allclose(U @ torch.diag(s) @ V.T, Z)


@pytest.mark.parametrize(
    ("labels", "chosen"), [([0] * 10 + [1] * 2 + [2], [0, 0, 1]), ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])]
)
def test_the_split_takes_from_every_class_with_two_images_else_all(labels, chosen):
    labels = torch.tensor(labels)
    fit, validation = stratified_split(labels, 0.2, seed=0)
    assert sorted(labels[validation].tolist()) == chosen
    assert torch.equal(stratified_split(labels, 0.2, seed=0)[0], fit)


def test_features_that_are_not_finite_are_refused():
    Z, y = torch.full((4, 2), torch.nan), torch.arange(4) % 2
    with pytest.raises(NonFiniteError):
        ProbeData(Z, y, Z, y, 2)
