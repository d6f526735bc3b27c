"""Methods of the field: each lowers its own term, sends gradients where they belong, and does the paper's algebra."""

import math
from functools import partial

import datasets
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
    ViTForImageClassification,
)

from examples import field_methods as field
from hf_immunize.data.sources import load_image_dataset
from hf_immunize.errors import ArgumentError
from hf_immunize.training.arguments import Method
from hf_immunize.training.step import ImmunizationStep
from hf_immunize.vision.head import penultimate_features
from hf_immunize.vision.loading import random_copy
from hf_immunize.vision.scope import select_trainable


STEPS = {
    "uniform": partial(ImmunizationStep, objective=field.Uniform()),
    "closeness": field.WeightDistance,
    "adapted": field.Unrolled,
    "adapted, along": field.UnrolledAlong,
    "way_ahead": field.Contraction,
    "to_erased": partial(field.Erasure, erase=lambda features: features / 2),
}


def resnet(folder=None):
    torch.manual_seed(0)
    config = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    return ResNetForImageClassification(ResNetConfig(**config)).eval()


def batch():
    draw = torch.Generator().manual_seed(0)
    sides = {side: {"pixel_values": torch.randn(8, 3, 8, 8, generator=draw)} for side in ("benign", "harmful")}
    sides["harmful"]["labels"] = torch.arange(8) % 4 + 5  # its own classes, all in both halves
    sides["harmful"]["labels"][4:] = sides["harmful"]["labels"][4:].flip(0)
    return sides


def hold_the_attack(step):
    """Let every later attack move the weights as the first one did: what a gradient of first order is exact for."""
    attack, seen = step._attack, []

    def attack_once(weights, head, *given):
        if len(seen) < step.steps:
            moved, head = attack(weights, head, *given)
            seen.append(({name: moved[name] - value for name, value in weights.items()}, head))
            return moved, head
        seen.append(seen.pop(0))
        ways, head = seen[-1]
        return {name: value + ways[name] for name, value in weights.items()}, head

    step._attack = attack_once


@pytest.mark.parametrize("make", [ViTForImageClassification.from_pretrained, resnet])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_down_lowers_the_term_by_the_trainable_backbone_alone(name, make, tiny_model):
    model = make(tiny_model)
    moving = select_trainable(model, "last_stage")
    step = STEPS[name](model, Method(harmful_weight=1.0), moving=moving)
    if name == "closeness":
        field.mix_in_noise(model, 0.05, 1)
    if name.startswith("adapted"):
        hold_the_attack(step)

    def term():
        return step(model, batch(), 0).logged[name.split(",")[0]]

    before = term()
    before.backward()
    given = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    head = {f"{step.head_name}.weight", f"{step.head_name}.bias"}
    assert given.keys() <= set(moving)
    assert name == "uniform" or not any(given[key].any() for key in head & given.keys())
    length = field.norm(given.values())
    assert 0 < length < math.inf
    with torch.no_grad():
        for key, gradient in given.items():
            model.get_parameter(key).sub_(1e-3 * gradient / length)
    assert term() < before


def test_the_unrolled_gradient_is_that_at_the_attacked_weights():
    model = resnet()
    step = field.Unrolled(model, Method(harmful_weight=1.0), moving=select_trainable(model, "last_stage"))
    attack, seen = step._attack, []
    step._attack = lambda *given: seen.append(attack(*given)) or seen[-1]
    term = step(model, batch(), 0).logged["adapted"]
    found = torch.autograd.grad(term, list(step.weights.values()), materialize_grads=True)
    assert len(seen) == step.steps
    moved, head = seen[-1]
    length = field.norm(moved[name] - value for name, value in step.weights.items())
    assert 0 < length <= step.steps * step.reach * field.norm(step.weights.values()) * 1.001
    leaves = {name: value.detach().requires_grad_() for name, value in moved.items()}
    there = field.to_uniform(step.read(leaves, slice(1, None, 2)) @ head)
    wanted = torch.autograd.grad(there, list(leaves.values()), materialize_grads=True)
    torch.testing.assert_close(term, there)
    torch.testing.assert_close(found, wanted)


def test_the_way_ahead_is_the_sum_of_updates_that_shrink_by_one_ratio():
    model = resnet()
    step = field.Contraction(model, Method(harmful_weight=1.0), moving=select_trainable(model, "last_stage"))
    lengths = iter([2.0, 1.0])
    shapes = [torch.zeros_like(value) for value in step.weights.values()]

    def update(*given):
        shapes[0].view(-1)[0] = next(lengths)
        return tuple(shape.clone() for shape in shapes)

    step._update = update
    found = step(model, batch(), 0).logged["way_ahead"]
    assert float(found) == pytest.approx(math.log(2 * sum(0.5**turn for turn in range(step.horizon))))


def test_after_leace_no_linear_classifier_beats_a_constant_and_nothing_else_changes():
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    rows = torch.randn(60, 8, dtype=torch.float64, generator=draw)
    rows[:, :3] += 2 * torch.nn.functional.one_hot(labels, 3)
    rows[:, 7] = rows[:, 0] - rows[:, 1]  # of lower rank than wide
    erase = field.leace_eraser(rows, labels)
    after = erase(rows)
    means = torch.stack([after[labels == label].mean(0) for label in range(3)])
    torch.testing.assert_close(means, rows.mean(0).expand(3, -1), rtol=0, atol=1e-9)
    torch.testing.assert_close(erase(after), after)
    assert torch.linalg.matrix_rank(after - rows, rtol=1e-9) == 2  # one less than classes


def test_noise_is_mixed_into_trainable_weights_alone():
    model = resnet()
    before = {name: value.clone() for name, value in model.named_parameters()}
    moving = set(select_trainable(model, "last_stage"))
    fresh = dict(random_copy(model, 3).named_parameters())
    field.mix_in_noise(model, 0.25, 3)
    for name, value in model.named_parameters():
        wanted = 0.75 * before[name] + 0.25 * fresh[name] if name in moving else before[name]
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("name", list(field.PAPERS)[:6])
def test_every_method_trains(name, images, tiny_model):
    torch.manual_seed(5)
    model, processor = (
        ViTForImageClassification.from_pretrained(tiny_model),
        AutoImageProcessor.from_pretrained(tiny_model),
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = load_image_dataset(str(images / "animals")), load_image_dataset(str(images / "arms"))
    quick = {"max_steps": 4, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True}
    after = getattr(field, name)(model, *data, processor, **quick, logging_strategy="no")
    assert isinstance(data[0], datasets.Dataset) and not after.training
    assert any(not torch.equal(value, before[key]) for key, value in after.state_dict().items())
    features = penultimate_features(after, batch()["harmful"]["pixel_values"])
    assert torch.isfinite(features).all() and features.std(0).max() > 0


@pytest.mark.parametrize("method", [field.retrained, field.redistilled])
def test_whoever_is_made_anew_sees_no_harmful_image_and_of_the_start_at_most_its_outputs(
    method, images, tiny_model, monkeypatch
):
    recipe = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True}
    start = {"make": "trained", "config": {"model_type": "vit"}, "arguments": recipe}
    known = {"backbones": {"named": {"start": {"name": "elsewhere"}}, "trained": {"start": start}}}
    monkeypatch.setattr(field, "load_settings", lambda: known)
    benign, processor = load_image_dataset(str(images / "animals")), AutoImageProcessor.from_pretrained(tiny_model)

    def anew(change=lambda model: None):
        start = ViTForImageClassification.from_pretrained(tiny_model)
        change(start)
        torch.manual_seed(5)
        model = method(start, benign, None, processor)
        assert model.config.id2label == start.config.id2label and not model.training
        return model.state_dict()

    @torch.no_grad()
    def rescale(model):  # other weights, the same outputs
        norm = model.vit.layernorm
        norm.weight *= 2
        norm.bias *= 2
        model.classifier.weight /= 2

    @torch.no_grad()
    def reverse(model):
        model.classifier.weight.neg_()

    first, rescaled, reversed_ = anew(), anew(rescale), anew(reverse)
    assert all(torch.equal(value, rescaled[name]) for name, value in first.items())
    taught = method is field.redistilled
    assert taught != all(torch.equal(value, reversed_[name]) for name, value in first.items())
    with pytest.raises(ArgumentError, match="found 'resnet'"):
        method(resnet(), benign, None, processor)


def test_a_student_learns_labels_and_softened_outputs(tmp_path):
    teacher, student = resnet(), resnet()
    torch.nn.init.normal_(student.classifier[1].weight)
    pixels, labels = batch()["benign"]["pixel_values"], torch.arange(8) % 3
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = field.Student(student, args, teacher=teacher, share=0.25)
    found = trainer.compute_loss(student, {"pixel_values": pixels, "labels": labels})
    said, wanted = (torch.softmax(model(pixel_values=pixels).logits.double() / 2, 1) for model in (student, teacher))
    own = student(pixel_values=pixels).logits.double()
    apart = 4 * (wanted * (wanted / said).log()).sum(1).mean()
    torch.testing.assert_close(found.double(), 0.75 * torch.nn.functional.cross_entropy(own, labels) + 0.25 * apart)
    assert apart > 0.01 and all(one.grad is None for one in teacher.parameters())


@pytest.mark.parametrize("make", [ViTForImageClassification.from_pretrained, resnet])
def test_rescaled_weights_compute_the_same(make, images, tiny_model):
    model, processor = make(tiny_model).eval(), AutoImageProcessor.from_pretrained(tiny_model)
    pixels, before = batch()["benign"]["pixel_values"], {k: v.clone() for k, v in model.state_dict().items()}
    wanted = model(pixel_values=pixels).logits
    after = field.rescaled(model, load_image_dataset(str(images / "animals")), None, processor)
    torch.testing.assert_close(after(pixel_values=pixels).logits, wanted, rtol=1e-3, atol=1e-4)
    grown = [name for name, value in after.state_dict().items() if value.abs().max() > 100 * before[name].abs().max()]
    assert any("proj" in name or "convolution" in name for name in grown)


def test_features_that_are_all_zero_have_a_head_of_zeros():
    # As dead ReLUs leave them; without a floor the kernel is singular.
    head = field.ridge_start(torch.zeros(6, 4), torch.arange(6) % 2, 2)
    assert torch.equal(head, torch.zeros(4, 2))
