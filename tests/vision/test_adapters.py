"""Models wrapped by PEFT: the head, the last stage, what is trainable."""

import peft
import pytest
import torch

from hf_immunize.errors import ScopeError
from hf_immunize.vision.head import (
    adapter_parameters,
    find_head,
    penultimate_features,
    running_modules,
    without_wrapper,
)
from hf_immunize.vision.scope import last_stage, modules_in_eval, select_trainable


# Linear modules or convolutions that get an adapter, for each family.
TARGETS = {
    "vit": ["q_proj", "v_proj"],
    "dinov2": ["q_proj", "v_proj"],
    "clip": ["q_proj", "v_proj"],
    "swin": ["q_proj", "v_proj"],
    "resnet": ["convolution"],
    "convnext": ["pwconv1", "pwconv2"],
}


@pytest.fixture
def wrapped(tiny):
    """Wrap a tiny classifier by LoRA of rank 3, which is also its number of labels."""

    def wrap(name="vit", **options):
        given = {"r": 3, "target_modules": TARGETS[name], "modules_to_save": ["classifier"]} | options
        return peft.get_peft_model(tiny(name), peft.LoraConfig(**given))

    return wrap


@pytest.mark.parametrize("name", list(TARGETS))
def test_features_are_what_the_saved_head_sees(wrapped, pixels, name):
    model = wrapped(name).eval()
    head_name, head = find_head(model)
    head.weight.data.normal_()
    assert ".modules_to_save.default" in head_name
    torch.testing.assert_close(head(penultimate_features(model, pixels)), model(pixel_values=pixels).logits)


def test_without_a_saved_head_the_base_models_is_found(wrapped):
    assert find_head(wrapped(modules_to_save=None))[0] == "base_model.model.classifier"


def test_the_head_with_an_adapter_of_its_own_is_one_head(wrapped, pixels):
    model = wrapped(target_modules="all-linear", modules_to_save=None).eval()
    name, head = find_head(model)
    assert name == "base_model.model.classifier.base_layer"
    assert penultimate_features(model, pixels).shape == (2, head.in_features)


def test_the_head_is_named_as_before_wrapping(wrapped):
    model = wrapped("resnet")
    assert find_head(model, "classifier")[1] is find_head(model)[1]


def test_of_two_adapters_the_active_ones_head_is_found(wrapped):
    model = wrapped()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"]))
    model.set_adapter("second")
    assert find_head(model)[0].endswith("modules_to_save.second")


def test_a_disabled_adapter_leaves_the_base_models_head(wrapped, pixels):
    model = wrapped().eval()
    with model.disable_adapter():
        assert penultimate_features(model, pixels).shape == (2, 16)


@pytest.mark.parametrize("name", list(TARGETS))
def test_the_last_stage_is_that_of_the_base_model(tiny, wrapped, name):
    def plainly(names):
        plain = {name.replace(".base_layer", "").replace(".original_module", "") for name in names}
        return {name for name in plain if "lora_" not in name and "modules_to_save" not in name}

    stage = {name.removeprefix("base_model.model.") for name in last_stage(wrapped(name))}
    assert plainly(stage) == set(last_stage(tiny(name)))


@pytest.mark.parametrize("name", list(TARGETS))
def test_only_adapter_parameters_of_the_last_stage_move(wrapped, name):
    model = wrapped(name)
    stage, adapter = set(last_stage(model)), set(adapter_parameters(model))
    moving = select_trainable(model, "last_stage")
    assert set(moving) == stage & adapter
    assert moving == [name for name, p in model.named_parameters() if p.requires_grad]


def test_all_is_what_peft_trains_also_after_a_narrower_choice(wrapped):
    model = wrapped()
    peft_trains = [name for name, p in model.named_parameters() if p.requires_grad]
    select_trainable(model, "last_stage")
    assert select_trainable(model, "all") == peft_trains


def test_biases_that_peft_trains_are_its_parameters(wrapped):
    model = wrapped(bias="all")
    assert "base_model.model.vit.layernorm.bias" in select_trainable(model, "last_stage")


def test_an_expression_is_searched_among_what_peft_trains(wrapped):
    moving = select_trainable(wrapped(), r"layers\.1\.")
    assert moving and all("layers.1." in name and "lora_" in name for name in moving)


def test_the_users_narrower_choice_is_told(wrapped, monkeypatch):
    told = []
    monkeypatch.setattr("hf_immunize.vision.scope.logger.warning", told.append)
    select_trainable(wrapped(), "last_stage")
    assert len(told) == 1 and "14" in told[0] and "6" in told[0]


def test_a_scope_without_adapters_is_refused(wrapped):
    model = wrapped(target_modules=r".*layers\.0\..*q_proj", modules_to_save=None)
    with pytest.raises(ScopeError, match=r"PEFT trains.*'base_model.model.vit.layers.0.*lora_A"):
        select_trainable(model, "last_stage")


def test_a_scope_with_the_saved_head_alone_is_refused(wrapped):
    with pytest.raises(ScopeError, match=r"the head .* alone"):
        select_trainable(wrapped(target_modules=r".*layers\.0\..*q_proj"), "last_stage")


def test_modules_without_a_moving_adapter_stay_in_eval(wrapped):
    model = wrapped(lora_dropout=0.5)
    still = modules_in_eval(model, select_trainable(model, "last_stage"))
    layers = without_wrapper(model).vit.layers
    assert layers[0].attention.q_proj.lora_dropout["default"] in still
    assert layers[2].attention.q_proj.lora_dropout["default"] not in still


def test_the_running_modules_are_those_before_wrapping(tiny, wrapped):
    assert len(list(running_modules(wrapped().base_model.model))) == len(list(tiny("vit").modules()))


def test_a_plain_model_has_no_adapter(tiny):
    assert adapter_parameters(tiny("vit")) is None
