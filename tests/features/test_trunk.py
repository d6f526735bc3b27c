"""The trainable part, run from stored activations, is the whole model; what is not is refused."""

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from hf_immunize.errors import ShapeError, TrunkError
from hf_immunize.features.trunk import split_trunk
from hf_immunize.vision.scope import select_trainable


SHAPE = (3, 32, 32)
IMAGES = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(3))


def split(model, trainable="last_stage", **options):
    return split_trunk(model, select_trainable(model, trainable), SHAPE, **options)


def gradients(model, output):
    model.zero_grad()
    output.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def both(model, found):
    """Gradients of the whole model and of the trainable part."""
    activations = found.activations(model, IMAGES)
    whole = gradients(model, model(pixel_values=IMAGES).logits)
    with found.replayed(model):
        logits = model(pixel_values=activations).logits
    return whole, gradients(model, logits)


class Small(hf.PreTrainedModel):
    """Two convolutions; the trunk's activation may be changed on its way, used again, or its module run again."""

    config_class = hf.ResNetConfig

    def __init__(self, leaks=None):
        super().__init__(hf.ResNetConfig(num_labels=3))
        self.leaks = leaks
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU()
        self.classifier = nn.Linear(4, 3)

    def forward(self, pixel_values=None):
        convolved = self.first(pixel_values)
        early = self.act(convolved)
        hidden = self.second(early * 1 if self.leaks == "unnamed" else early)
        hidden = {"early": lambda each: each + convolved, "again": self.act}.get(self.leaks, torch.relu)(hidden)
        return hf.modeling_outputs.ImageClassifierOutput(logits=self.classifier(hidden.mean((2, 3))))


def test_logits_and_gradients_from_activations_are_the_models(family, tiny):
    model = tiny(family)
    found = split(model)
    activations = found.activations(model, IMAGES)
    with found.replayed(model):
        logits = model(pixel_values=activations).logits
    torch.testing.assert_close(logits, model(pixel_values=IMAGES).logits, rtol=1e-5, atol=1e-7)
    whole, part = both(model, found)
    assert whole and whole.keys() == part.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(part[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_trunk_ends_at_the_first_trainable_block(tiny):
    # Inside the block, the residual branch carries a second activation.
    assert split(tiny("vit"), r"layers\.1\.mlp|classifier").entry == split(tiny("vit")).entry == "vit.layers.1"


def test_each_part_runs_alone(tiny):
    model = tiny("vit")
    found = split(model)
    hook = model.classifier.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    activations = found.activations(model, IMAGES)
    assert activations.shape == (5, *found.activation_shape)
    hook.remove()
    model.vit.layers[0].mlp.fc1.weight.data.fill_(float("nan"))
    with found.replayed(model):
        assert torch.isfinite(model(pixel_values=activations).logits).all()


def test_the_model_is_as_before(tiny):
    model = tiny("swin").train()
    model.swin.layernorm.training = False
    modes = [module.training for module in model.modules()]
    before = model.state_dict().keys(), torch.get_rng_state()
    found = split(model)
    with found.replayed(model):
        pass
    assert modes == [module.training for module in model.modules()]
    assert before[0] == model.state_dict().keys() and torch.equal(before[1], torch.get_rng_state())
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # A forward put in place by others is put back.
    block = model.swin.encoder.layers[0]
    block.forward = other = block.forward
    with found.replayed(model):
        assert block.forward is not other
    assert block.forward is other


def test_gradients_are_the_same_under_gradient_checkpointing(tiny):
    model = tiny("vit").train()
    found = split(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    whole, part = both(model, found)
    assert whole.keys() == part.keys() and all(torch.allclose(part[name], whole[name]) for name in whole)


def test_a_peft_model_splits_at_its_first_adapter(tiny):
    config = peft.LoraConfig(target_modules=r".*layers\.2\..*q_proj", modules_to_save=["classifier"])
    model = peft.get_peft_model(tiny("vit"), config).eval()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = split_trunk(model, names, SHAPE, head_module="base_model.model.classifier.modules_to_save.default")
    assert found.entry == "base_model.model.vit.layers.2"


@pytest.mark.parametrize(
    ("leaks", "trainable", "reason"),
    [
        (None, "all", "nothing frozen runs before them"),
        ("early", "second|classifier", "uses more of it than one activation"),
        ("unnamed", "second|classifier", "0 of its outputs enter 'second'"),
        ("again", "second|classifier", "'act' in it runs more than once"),
    ],
)
def test_a_trunk_that_gives_more_or_less_than_one_activation_is_refused(leaks, trainable, reason):
    with pytest.raises(TrunkError, match=reason):
        split(Small(leaks), trainable)


def test_dropout_in_the_trunk_is_refused_unless_it_stays_in_eval_mode():
    config = hf.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    config.image_size, config.hidden_dropout_prob = 32, 0.1
    model = hf.ViTForImageClassification(config)
    assert split(model).entry == "vit.layers.1"
    with pytest.raises(TrunkError, match="drops at random"):
        split(model, eval_modules=[])


def test_images_of_another_size_and_where_activations_belong_are_refused(tiny):
    model = tiny("resnet")
    found = split(model)
    with pytest.raises(ShapeError, match="resizes and crops"):
        found.activations(model, torch.zeros(2, 3, 64, 64))
    with found.replayed(model), pytest.raises(ShapeError, match="stored activations"):
        model(pixel_values=IMAGES)
