"""Every method is valid; objectives that are not in the library do what they say."""

import pytest
import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification

from examples.experiments.methods import METHODS, TRIALS, ClassCollapse, known, ridge_resistance
from hf_immunize.errors import ArgumentError, DataError
from hf_immunize.training.arguments import ImmunizationArguments, Method
from hf_immunize.training.objectives import OBJECTIVES, Side
from hf_immunize.training.step import ImmunizationStep


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_valid(method, tmp_path):
    with known():
        args = ImmunizationArguments(str(tmp_path), report_to="none", use_cpu=True, **METHODS[method])
        assert Method.of(args).objective == METHODS[method].get("objective", Method.objective)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_ridge_reads_between_nothing_and_all_whatever_the_scale(scale):
    labels = torch.arange(16) % 2
    rows = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    assert 0 <= ridge_resistance(scale * rows, labels).item() <= 1
    assert ridge_resistance(scale * torch.ones(16, 4), labels).item() < 1e-6
    assert ridge_resistance(scale * F.one_hot(labels, 2).float(), labels).item() > 0.999


def side(seed, labels=True):
    draw = torch.Generator().manual_seed(seed)
    classes = torch.arange(24) % 3
    rows = torch.randn(24, 6, dtype=torch.float64, generator=draw) + 4 * F.one_hot(classes, 6)
    return Side(rows.requires_grad_(), labels=classes if labels else None)


def nearest_mean_accuracy(rows, labels):
    """Of the second half of the rows, by the class means of the first."""
    half = len(rows) // 2
    means = torch.stack([rows[:half][labels[:half] == one].mean(0) for one in range(3)])
    return (torch.cdist(rows[half:], means).argmin(1) == labels[half:]).double().mean().item()


@pytest.mark.parametrize("name", TRIALS)
def test_descent_on_the_harmful_term_takes_the_classes_from_a_nearest_mean(name):
    harmful = side(1)
    features, labels = harmful.features, harmful.labels
    before = nearest_mean_accuracy(features.detach(), labels)
    for _ in range(60):
        (term,) = TRIALS[name]()(side(0), Side(features, labels=labels)).harmful.values()
        (gradient,) = torch.autograd.grad(term, features)
        features = (features - 0.05 * gradient / gradient.norm() * features.norm()).detach().requires_grad_()
    assert nearest_mean_accuracy(features.detach(), labels) < before - 0.2


@pytest.mark.parametrize("name", TRIALS)
def test_labels_are_needed(name):
    with pytest.raises(DataError, match="Expected labels of the harmful images"):
        TRIALS[name]()(side(0), side(1, labels=False))


def test_collapse_of_classes_of_one_image_each_is_finite():
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (term,) = ClassCollapse()(side(0), Side(features, labels=torch.arange(4))).harmful.values()
    term.backward()
    assert term.isfinite() and features.grad.isfinite().all()


def test_the_library_knows_them_for_the_time_of_a_run_alone():
    with known():
        assert Method(objective="inner_ridge").needs_harmful_labels
    with pytest.raises(ArgumentError, match="Expected objective="):
        Method(objective="inner_ridge")
    assert not set(TRIALS) & {*OBJECTIVES}


@pytest.mark.parametrize("name", TRIALS)
def test_a_step_hands_them_the_harmful_labels(name):
    draw = torch.Generator().manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    model = ViTForImageClassification(config)
    batch = {
        key: {"pixel_values": torch.randn(8, 3, 16, 16, generator=draw), "labels": torch.arange(8) % 2}
        for key in ("benign", "harmful")
    }
    with known():
        logged = ImmunizationStep(model, Method(objective=name))(model, batch, step=0).logged
    terms = [value for key, value in logged.items() if key in ("readable", "between_classes")]
    assert len(terms) == 1 and terms[0].isfinite()
