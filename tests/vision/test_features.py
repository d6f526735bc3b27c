"""The classifier is found, and its input is recorded."""

import pytest
import torch
import transformers as hf
from torch import nn

from hf_immunize.errors import HeadError, ImmunizationError
from hf_immunize.vision.head import HeadInput, find_head, penultimate_features


TINY_VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TINY_VIT |= {"image_size": 32, "patch_size": 16}


@pytest.mark.parametrize(
    "name, head",
    [("vit", "classifier"), ("resnet", "classifier.1"), ("clip", "classifier"), ("mobilenet_v2", "classifier")],
)
def test_head_is_found_by_name(tiny, name, head):
    assert find_head(tiny(name))[0] == head


def test_a_block_as_wide_as_the_labels_is_not_the_head():
    config = hf.ViTConfig(**TINY_VIT, num_labels=16)
    assert find_head(hf.ViTForImageClassification(config))[0] == "classifier"


@pytest.mark.parametrize(
    ("head", "single"),
    [
        (lambda: nn.Sequential(nn.Dropout(), nn.Linear(16, 5)), True),
        (lambda: nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 5)), True),
        (lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5)), False),
        (lambda: nn.Sequential(nn.Sequential(nn.Linear(16, 5), nn.Tanh()), nn.Linear(5, 5)), False),
    ],
)
def test_a_head_of_several_layers_is_refused_unless_it_is_named(head, single, pixels):
    model = hf.ViTForImageClassification(hf.ViTConfig(**TINY_VIT, num_labels=5))
    model.classifier = head()
    last = f"classifier.{len(model.classifier) - 1}"
    if single:
        assert find_head(model)[0] == last
    else:
        with pytest.raises(HeadError):
            find_head(model)
    width = model.classifier[-1].in_features
    assert penultimate_features(model, pixels, last).shape == (2, width)


@pytest.mark.parametrize("training", [True, False])
def test_mode_stays_as_it_is(tiny, pixels, training):
    model = tiny("resnet").train(training)
    penultimate_features(model, pixels)
    assert all(module.training == training for module in model.modules())


def test_grad_mode_stays_as_it_is(tiny, pixels):
    with torch.no_grad():
        assert not penultimate_features(tiny("vit"), pixels).requires_grad


def test_no_hook_is_left_after_a_forward_pass(tiny, pixels):
    model = tiny("vit")
    penultimate_features(model, pixels)
    assert not model.classifier._forward_pre_hooks


def test_no_hook_is_left_after_an_error(tiny):
    model = tiny("vit")
    with pytest.raises(ZeroDivisionError), HeadInput(model.classifier):
        raise ZeroDivisionError
    assert not model.classifier._forward_pre_hooks


def test_a_recorder_can_be_used_again(tiny, pixels):
    model = tiny("vit")
    captured = HeadInput(model.classifier)
    for _ in range(2):
        with captured:
            model(pixel_values=pixels)
    torch.testing.assert_close(captured.features, penultimate_features(model, pixels))


def test_a_recorder_is_not_entered_twice():
    captured = HeadInput(nn.Linear(2, 2))
    with captured, pytest.raises(HeadError, match="recording"), captured:
        pass
    assert not captured.head._forward_pre_hooks


def test_a_backbone_without_head_is_refused():
    config = hf.ViTConfig(**TINY_VIT, num_labels=3)
    with pytest.raises(HeadError, match="AutoModelForImageClassification"):
        find_head(hf.ViTModel(config))


def test_zero_labels_are_refused():
    with pytest.raises(HeadError, match="num_labels >= 1"):
        find_head(hf.ViTForImageClassification(hf.ViTConfig(**TINY_VIT, num_labels=0)))


def test_two_heads_are_refused_by_name_and_one_can_be_chosen():
    model = hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**TINY_VIT, num_labels=3))
    with pytest.raises(HeadError, match=r"'cls_classifier', 'distillation_classifier'.*head_module="):
        find_head(model)
    assert find_head(model, "cls_classifier") == ("cls_classifier", model.cls_classifier)


@pytest.mark.parametrize(
    "head_module, found", [("nowhere", "no module of that name"), ("vit.layernorm", "a LayerNorm")]
)
def test_a_wrong_head_module_is_refused(tiny, head_module, found):
    with pytest.raises(HeadError, match=f"{found}.*'classifier'"):
        find_head(tiny("vit"), head_module)


def test_a_head_that_did_not_run_is_an_error(tiny, pixels):
    model = tiny("vit")
    with HeadInput(model.classifier) as captured:
        model.base_model(pixel_values=pixels)
    with pytest.raises(HeadError, match="did not"):
        _ = captured.features


def test_a_head_that_runs_twice_is_an_error():
    head = nn.Linear(2, 2)
    with pytest.raises(HeadError, match="second time"), HeadInput(head):
        head(head(torch.ones(1, 2)))


def test_an_input_with_tokens_is_an_error(tiny, pixels):
    with pytest.raises(HeadError, match=r"\(2, 5, 16\)"):
        penultimate_features(tiny("vit"), pixels, head_module="vit.layers.0.attention.q_proj")


@pytest.mark.parametrize("other", ["second", "vit.extra", "vit.prototypes.weight"])
def test_a_head_that_is_another_part_too_is_refused(tiny, other):
    model = tiny("vit")
    if other == "second":
        model.second = model.classifier
    elif other == "vit.extra":
        model.vit.extra = model.classifier
    else:
        model.vit.prototypes = nn.Linear(16, 3, bias=False)
        model.vit.prototypes.weight = model.classifier.weight
    with pytest.raises(HeadError, match=other):
        find_head(model, "classifier")


@pytest.mark.parametrize("name", ["ViT", "Dinov2", "ResNet", "CLIPVision", "ConvNext"])
def test_a_bare_backbone_is_told_from_a_missing_head(name):
    config = getattr(hf, f"{name}Config")()
    with torch.device("meta"):
        backbone = getattr(hf, f"{name}Model")(config)
    with pytest.raises(HeadError, match=f"bare backbone {name}Model"):
        find_head(backbone)


@pytest.mark.parametrize(
    "images",
    [
        *(None, "abc", [], [[1.0]], torch.ones(3, 8, 8), torch.ones(0, 3, 32, 32), torch.ones(1, 5, 32, 32)),
        *(torch.ones(1, 3, 7, 9), torch.full((1, 3, 32, 32), torch.nan), torch.ones(1, 3, 32, 32, dtype=torch.long)),
        *(torch.ones(1, 3, 32, 32, dtype=torch.complex64), torch.ones(1, 3, 32, 32, device="meta")),
    ],
    ids=str,
)
def test_what_are_no_images_is_a_named_error(images):
    config = hf.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32
    )
    with pytest.raises(ImmunizationError):
        penultimate_features(hf.ViTForImageClassification(config), images)


def kind(given):
    return type(given).__name__


@pytest.mark.parametrize("model", [None, "name", object(), torch.nn.Linear(2, 2)], ids=kind)
def test_what_is_no_classifier_is_a_named_error(model):
    with pytest.raises(HeadError):
        penultimate_features(model, torch.ones(1, 3, 8, 8))
