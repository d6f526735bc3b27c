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
    **{name: ["q_proj", "v_proj"] for name in ("vit", "dinov2", "clip", "swin")},
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
def test_features_are_what_the_saved_head_reads(wrapped, pixels, name):
    model = wrapped(name).eval()
    head_name, head = find_head(model)
    head.weight.data.normal_()
    assert ".modules_to_save.default" in head_name and find_head(model, "classifier")[1] is head
    torch.testing.assert_close(head(penultimate_features(model, pixels)), model(pixel_values=pixels).logits)


def test_the_head_is_the_one_that_runs(wrapped, pixels):
    assert find_head(wrapped(modules_to_save=None))[0] == "base_model.model.classifier"
    model = wrapped().eval()
    with model.disable_adapter():
        assert penultimate_features(model, pixels).shape == (2, 16)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"]))
    model.set_adapter("second")
    assert find_head(model)[0].endswith("modules_to_save.second")
    model = wrapped(target_modules="all-linear", modules_to_save=None).eval()
    name, head = find_head(model)  # with an adapter of its own
    assert name == "base_model.model.classifier.base_layer"
    assert penultimate_features(model, pixels).shape == (2, head.in_features)


@pytest.mark.parametrize("name", list(TARGETS))
def test_the_last_stage_is_that_of_the_base_model_and_its_adapters_alone_are_trainable(tiny, wrapped, name):
    model = wrapped(name)
    stage, adapter = last_stage(model), adapter_parameters(model)
    plain = {name.replace(".base_layer", "").replace(".original_module", "") for name in stage}
    plain = {name.removeprefix("base_model.model.") for name in plain}
    plain = {name for name in plain if "lora_" not in name and "modules_to_save" not in name}
    assert plain == set(last_stage(tiny(name)))
    trainable = select_trainable(model, "last_stage")
    assert set(trainable) == set(stage) & set(adapter)
    assert trainable == [name for name, p in model.named_parameters() if p.requires_grad]


def test_all_is_what_peft_trains_also_after_a_narrower_choice(wrapped):
    model = wrapped()
    peft_trains = [name for name, p in model.named_parameters() if p.requires_grad]
    select_trainable(model, "last_stage")
    assert select_trainable(model, "all") == peft_trains
    chosen = select_trainable(model, r"layers\.1\.")
    assert chosen and all("layers.1." in name and "lora_" in name for name in chosen)
    biases = select_trainable(wrapped(bias="all"), "last_stage")
    assert "base_model.model.vit.layernorm.bias" in biases


@pytest.mark.parametrize(
    ("saved", "found"),
    [(None, r"PEFT trains.*'base_model.model.vit.layers.0.*lora_A"), (["classifier"], r"the head .* alone")],
)
def test_a_scope_without_adapters_is_refused(wrapped, saved, found):
    with pytest.raises(ScopeError, match=found):
        select_trainable(wrapped(target_modules=r".*layers\.0\..*q_proj", modules_to_save=saved), "last_stage")


def test_modules_without_a_trainable_adapter_stay_in_eval(wrapped):
    model = wrapped(lora_dropout=0.5)
    in_eval = modules_in_eval(model, select_trainable(model, "last_stage"))
    layers = without_wrapper(model).vit.layers
    drops = [layers[index].attention.q_proj.lora_dropout["default"] in in_eval for index in (0, 2)]
    assert drops == [True, False]


def test_the_running_modules_are_those_before_wrapping_and_a_plain_model_has_no_adapter(tiny, wrapped):
    assert len(list(running_modules(wrapped().base_model.model))) == len(list(tiny("vit").modules()))
    assert adapter_parameters(tiny("vit")) is None
