"""Fine-tuning attackers train what they say, on a copy, and restoring gives the public model."""

import pytest
import torch
from attacked import CLASSES, pictures, tiny_resnet, tiny_vit
from families import BUILDERS, calibrate

from hf_immunize.attacks import finetune
from hf_immunize.attacks.attacker import Part, ProbeBudget, ProbeData, TuningBudget
from hf_immunize.attacks.finetune import changed_parameters, features_of, fine_tune, prepare
from hf_immunize.attacks.presets import ATTACKERS
from hf_immunize.attacks.probes import ridge_head
from hf_immunize.errors import DataError


NAMES = ["last_stage", "whole_network", "bias_only", "lora_r2"]
ADAPTIVE = ["leaky", "whitened", "every_block", "rebalanced"]
OTHERS = ["ridge_start", "reinitialized", "visual_prompt", "batchnorm_ridge", *ADAPTIVE]
SMALL = Part(*pictures(16, 0), *pictures(8, 1), CLASSES)


def budget(trial_steps=1, optimizers=None):
    return TuningBudget(steps=2, trial_steps=trial_steps, optimizers=optimizers or {"adamw": (3e-3,)}, evaluations=3)


@pytest.mark.parametrize("build", [tiny_vit, tiny_resnet])
@pytest.mark.parametrize("name", NAMES + OTHERS)
def test_the_attacked_model_stays_as_it_was(name, build):
    model, before = build(), build().state_dict()
    ATTACKERS[name].run(model, SMALL, budget(), 0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained_is_what_the_name_says_and_the_head_is_that_of_the_seed(name):
    attacked = [prepare(tiny_vit(seed), name, SMALL, 7) for seed in (0, 1)]
    assert torch.equal(attacked[0].classifier.weight, attacked[1].classifier.weight)
    trained = {key for key, p in attacked[0].named_parameters() if p.requires_grad}
    body, every = trained - {"classifier.weight", "classifier.bias"}, dict(attacked[0].named_parameters())
    assert body and trained - body == {"classifier.weight", "classifier.bias"}
    assert {
        "last_stage": all("layers.1" in key or "vit.layernorm" in key for key in body),
        "whole_network": trained == set(every),
        "bias_only": all(key.endswith("bias") for key in body),
        "lora_r2": all("lora_" in key for key in body),
    }[name]


def test_one_diverging_rate_does_not_hide_a_sound_one_and_settings_of_an_earlier_seed_are_used_untried():
    found = fine_tune("whole_network", tiny_vit(), SMALL, budget(2, {"sgd": (1e30, 1e-2)}), 0)
    assert (found.trials, found.settings["learning_rate"]) == (2, 1e-2)
    chosen = {"optimizer": "sgd", "learning_rate": 0.5, "batch_statistics": False}
    found = fine_tune("bias_only", tiny_vit(), SMALL, budget(), 0, chosen=chosen)
    assert (found.trials, found.settings["learning_rate"]) == (1, 0.5)


@pytest.mark.parametrize("build", [tiny_vit, tiny_resnet])
@pytest.mark.parametrize("name", [name for name in NAMES + OTHERS if name != "batchnorm_ridge"])
def test_the_start_is_made_once_for_all_settings_which_find_what_each_would_from_its_own(name, build, monkeypatch):
    starts, runs, train = [], [], finetune._train

    def made(*given):
        starts.append(prepare(*given))
        return starts[-1]

    def compared(model, part, *given):
        own = prepare(build(), name, part, 0)
        runs.append(train(model, part, *given))
        assert train(own, part, *given) == runs[-1]
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in own.state_dict().items())
        return runs[-1]

    monkeypatch.setattr(finetune, "prepare", made)
    monkeypatch.setattr(finetune, "_train", compared)
    fine_tune(name, build(), SMALL, budget(2, {"sgd": (1e-2, 1e-1), "adamw": (3e-3,)}), 0)
    assert (len(starts), len(runs)) == (2, 4 + (build is tiny_resnet))


# ---- where it begins, and what is put in without a step


def test_from_the_ridge_solution_the_head_names_what_ridge_names_before_the_first_step():
    part = Part(*pictures(80, 0), *pictures(40, 1), CLASSES)
    attacked = prepare(tiny_vit(), "ridge_start", part, 0)
    Z, Z_test = (features_of(tiny_vit(), pixels, "classifier") for pixels in (part.Z, part.Z_test))
    weight, bias = ridge_head(ProbeData(Z, part.y, Z_test, part.y_test, CLASSES), 0)
    with torch.no_grad():
        named = attacked(pixel_values=part.Z_test).logits.argmax(dim=1)
    assert torch.equal(named, (Z_test.double() @ weight.mT + bias).argmax(dim=1))
    found = ATTACKERS["ridge_start"].run(tiny_vit(), part, budget(), 0)
    assert found.steps == [0, 1, 2] and found.curve[0] == (named == part.y_test).double().mean() > 0.9


def test_drawn_anew_is_the_last_stage_alone():
    models = [tiny_resnet(seed) for seed in (0, 1)]
    models[0].resnet.encoder.stages[1].layers[0].layer[1].normalization.running_mean += 5
    (one, other), was = [prepare(m, "reinitialized", SMALL, 3).state_dict() for m in models], models[0].state_dict()
    same = {name for name in was if torch.equal(one[name], other[name])}
    kept = {name for name in was if torch.equal(one[name], was[name])} - same
    last = {name for name in was if "stages.1" in name or "classifier" in name}
    assert last <= same and kept and not kept & last


def test_who_draws_the_last_stage_anew_loses_nothing_by_what_was_done_to_it():
    models = [tiny_resnet(0), tiny_resnet(0)]
    with torch.no_grad():
        for name, value in models[1].named_parameters():
            value.mul_(0.1 if "stages.1" in name or "classifier" in name else 1)
    assert not torch.equal(*(features_of(model, SMALL.Z, "classifier.1") for model in models))
    found = [ATTACKERS["reinitialized"].run(model, SMALL, budget(), 0) for model in models]
    assert found[0].curve == found[1].curve and found[0].settings == found[1].settings


def test_a_prompt_is_a_few_thousand_pixels_for_every_image_and_begins_as_none():
    model = tiny_vit()
    attacked = prepare(model, "visual_prompt", SMALL, 0)
    trained = {name: p.numel() for name, p in attacked.named_parameters() if p.requires_grad}
    assert trained.keys() == {"prompt", "classifier.weight", "classifier.bias"} and trained["prompt"] <= 3072
    features = [features_of(one, SMALL.Z, "classifier") for one in (model, attacked)]
    assert torch.equal(*features)
    attacked.prompt.data += 1
    assert not torch.allclose(features[0], features_of(attacked, SMALL.Z, "classifier"))


@torch.no_grad()
def test_statistics_of_the_harmful_images_activate_what_frozen_ones_hid():
    model, part = tiny_resnet(), Part(*pictures(80, 0), *pictures(40, 1), CLASSES)
    for norm in [one for one in model.modules() if isinstance(one, torch.nn.BatchNorm2d)]:
        norm.running_mean += 1e3  # every ReLU after it is dead
    Z, Z_test = (features_of(model, pixels, "classifier.1") for pixels in (part.Z, part.Z_test))
    hidden = ATTACKERS["ridge"].run(ProbeData(Z, part.y, Z_test, part.y_test, CLASSES), ProbeBudget(), 0)
    assert hidden.accuracy == 1 / CLASSES
    assert ATTACKERS["batchnorm_ridge"].run(model, part, budget(), 0).accuracy > 0.9
    assert not ATTACKERS["batchnorm_ridge"].applies(tiny_vit())


# ---- those who know how models are immunized


def only_rounding_left(model):
    """All images get nearly the same features: what one channel knows is a ten-thousandth of what is constant."""
    last = model.resnet.encoder.stages[1].layers[0]
    last.layer[1].normalization.weight.data *= 1e-4
    last.shortcut.normalization.weight.data *= 1e-4
    last.shortcut.normalization.bias.data += 1
    return model


def dead(model):
    """The last ReLU passes nothing."""
    model.resnet.encoder.stages[1].layers[0].shortcut.normalization.bias.data -= 1e3
    return model


def constant_at_the_end(model):
    """The last block forgets the image."""
    for norm in (model.resnet.encoder.stages[1].layers[0].layer[1], model.resnet.encoder.stages[1].layers[0].shortcut):
        norm.normalization.weight.data *= 0
    return model


@pytest.mark.parametrize(
    ("name", "closed"), [("leaky", dead), ("whitened", only_rounding_left), ("every_block", constant_at_the_end)]
)
def test_an_adaptive_attacker_learns_in_a_few_steps_what_fine_tuning_does_not(name, closed):
    part = Part(*pictures(80, 0), *pictures(40, 1), CLASSES)
    model, spent = closed(tiny_resnet()), TuningBudget(steps=5, trial_steps=5, optimizers={"sgd": (1e-3,)})
    blind = ATTACKERS["whole_network"].run(model, part, spent, 0)
    found = ATTACKERS[name].run(model, part, spent, 0)
    assert found.steps[0] == 0 and found.curve[0] > 0.9 and max(blind.curve) < 0.5


@torch.no_grad()
def test_behind_a_whitening_all_directions_have_one_variance_and_the_head_is_that_of_ridge():
    part = Part(*pictures(80, 0), *pictures(40, 1), CLASSES)
    attacked = prepare(tiny_vit(), "whitened", part, 0)
    white = features_of(attacked, part.Z, "classifier.2").double()
    values = torch.linalg.eigvalsh(white.T.cov()) * 79 / 80
    assert float(values.max()) <= 1 + 1e-6 and float(values[-4:].min()) > 0.9
    weight, bias = ridge_head(ProbeData(white, part.y, white, part.y, CLASSES), 0)
    assert torch.equal((white @ weight.mT + bias).argmax(dim=1), attacked(pixel_values=part.Z).logits.argmax(dim=1))


@torch.no_grad()
def biased(model):
    """No bias is nothing."""
    draw = torch.Generator().manual_seed(4)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            value += 0.1 * torch.randn(value.shape, generator=draw)
    return model


@torch.no_grad()
def disguised(model):
    """The same function by other weights: every channel of a layer times a factor that the next one takes back."""
    draw = torch.Generator().manual_seed(5)
    modules = list(model.modules())
    for module, before in zip(modules[1:], modules, strict=False):
        if isinstance(module, torch.nn.BatchNorm2d):
            factor = 10 ** (3 * torch.rand(len(module.weight), generator=draw))
            before.weight *= factor[:, None, None, None]
            module.running_mean *= factor
            module.running_var.copy_((module.running_var + module.eps) * factor**2 - module.eps)
    for layer in getattr(getattr(model, "vit", None), "layers", ()):
        one = layer.attention
        for norm, following in (
            (layer.layernorm_before, [one.q_proj, one.k_proj, one.v_proj]),
            (layer.layernorm_after, [layer.mlp.fc1]),
        ):
            factor = 10 ** (3 * torch.rand(16, generator=draw))
            norm.weight /= factor
            norm.bias /= factor
            for matrix in following:
                matrix.weight *= factor
        factor = 10 ** (3 * torch.rand(16, generator=draw))
        one.v_proj.weight *= factor[:, None]
        one.v_proj.bias *= factor
        one.o_proj.weight /= factor
    return model


@pytest.fixture
def unwhitened(monkeypatch):
    """Rebalanced without the whitening, which rounding turns where two directions have one variance."""

    def leave(model, name, *given):
        finetune._put(model, name, torch.nn.Sequential(*[torch.nn.Identity()] * 2, model.get_submodule(name)))

    monkeypatch.setattr(finetune, "_whiten", leave)


@pytest.mark.parametrize("family", BUILDERS)
def test_rebalanced_weights_compute_what_they_did_and_are_all_trained(family, unwhitened):
    torch.manual_seed(0)
    model, pixels = calibrate(BUILDERS[family]()), torch.randn(8, 3, 32, 32)
    part = Part(pixels, torch.arange(8) % CLASSES, pixels, torch.arange(8) % CLASSES, CLASSES)
    plain, attacked = (prepare(model, name, part, 0) for name in ("whole_network", "rebalanced"))
    logits = [one(pixel_values=pixels).logits for one in (plain, attacked)]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-5)
    sizes = [sum(p.numel() for p in one.parameters() if p.requires_grad) for one in (plain, attacked)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("build", [tiny_vit, tiny_resnet])
def test_rebalanced_weights_are_trained_alike_whatever_factors_of_channels_hide_them(build, unwhitened):
    part = Part(*pictures(80, 0), *pictures(40, 1), CLASSES)
    models = biased(build()), disguised(biased(build()))
    found = {}
    for name in ("whole_network", "rebalanced"):
        attacked = [prepare(model, name, part, 0) for model in models]
        before = [model(pixel_values=part.Z).logits for model in attacked]
        for model in attacked:
            finetune._train(model, part, finetune.Setting("sgd", 0.1), [10], 32, 0)
        found[name] = before, [model(pixel_values=part.Z).logits for model in attacked]
    for before, _ in found.values():  # the function is what it was
        for logits in before:
            torch.testing.assert_close(logits, found["whole_network"][0][0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(*found["rebalanced"][1], rtol=1e-2, atol=1e-3)
    assert not torch.allclose(*found["whole_network"][1], rtol=0.1, atol=0.01)


def test_leaky_is_for_models_with_relus():
    assert [ATTACKERS["leaky"].applies(model) for model in (tiny_resnet(), tiny_vit())] == [True, False]


# ---- public weights


def test_tensors_that_differ_are_named_and_another_architecture_is_refused():
    model = tiny_vit()
    model.vit.layernorm.bias.data += 1
    assert changed_parameters(model, tiny_vit()) == ["vit.layernorm.bias"]
    assert changed_parameters(tiny_vit(1), tiny_vit(1)) == []
    with pytest.raises(DataError):
        changed_parameters(tiny_vit(), tiny_resnet())
