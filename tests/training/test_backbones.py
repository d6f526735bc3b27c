"""Two steps of each objective on a tiny model of each family: exactly what is in scope moves."""

import copy
import shutil
from functools import partial

import peft
import pytest
import torch
import transformers as hf
from families import BUILDERS, LABELS, TINY, TRANSFORMER, calibrate

from hf_immunize.errors import ArgumentError, ScopeError
from hf_immunize.training.arguments import ImmunizationArguments
from hf_immunize.training.objectives import OBJECTIVES
from hf_immunize.vision.head import adapter_parameters, find_head, penultimate_features
from hf_immunize.vision.scope import last_stage


@pytest.fixture(scope="module")
def built():
    """Classifiers whose features are of order one: each is built once, and trained from its state of then."""
    kept = {}

    def build(name):
        if name not in kept:
            torch.manual_seed(0)
            model = calibrate(BUILDERS[name]())
            kept[name] = model, {key: tensor.clone() for key, tensor in model.state_dict().items()}
        model, state = kept[name]
        model.load_state_dict(state)
        return model.requires_grad_(True)

    return build


EVERYWHERE = [name for name in OBJECTIVES if name != "dead_relu"]
# Their last stage has a ReLU that no shortcut bypasses.
RELU = [name for name, family in TINY.items() if family.choke_points]


@pytest.fixture
def data(images):
    """Images of all sides, of 32 pixels."""
    names = ("train_dataset", "harmful_dataset", "eval_dataset", "harmful_eval_dataset")
    return {name: images(24 if "eval" in name else 8, seed, 32) for seed, name in enumerate(names, 1)}


@pytest.fixture
def short(trainer, data):
    """Make a trainer of two steps, without evaluation."""
    return partial(trainer, **data | {"eval_dataset": None, "harmful_eval_dataset": None}, logging_strategy="no")


def moved_in_two_steps(run):
    before = {key: tensor.clone() for key, tensor in run.model.state_dict().items()}
    run.train()
    return {key for key, tensor in run.model.state_dict().items() if not torch.equal(before[key], tensor)}


def same(model, other, atol=0.0):
    states = model.state_dict(), other.state_dict()
    return all(
        torch.allclose(states[0][key], states[1][key], rtol=1e-5 if atol else 0, atol=atol) for key in states[0]
    )


def assert_resumes(make, tmp_path):
    """A run resumed after its first step ends where the whole one does."""
    whole, resumed = (
        make(output_dir=str(tmp_path / name), save_strategy="steps", save_steps=1) for name in ("whole", "resumed")
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert same(whole.model, resumed.model)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in RELU])
def test_without_a_relu_that_no_shortcut_bypasses_none_is_deactivated(built, short, name):
    with pytest.raises(ScopeError, match="objective='concentration'"):
        short(built(name), objective="dead_relu").train()


@pytest.mark.parametrize(
    ("name", "objective"),
    # All objectives on a transformer and a convolutional network, the default on every family.
    [*((name, objective) for name in ("vit", "resnet") for objective in EVERYWHERE)]
    + [(name, "dead_relu") for name in RELU]
    + [(name, "time") for name in BUILDERS if name not in ("vit", "resnet")],
)
def test_two_steps_move_what_is_in_scope(built, short, name, objective):
    model = built(name)
    benign_loss = "both" if objective == "dead_relu" else "task"
    assert moved_in_two_steps(short(model, objective=objective, benign_loss=benign_loss)) == set(last_stage(model))
    pixels = torch.randn(2, 3, 32, 32)
    features = penultimate_features(model.eval(), pixels)
    torch.testing.assert_close(find_head(model)[1](features), model(pixel_values=pixels).logits)


class TestBareBackbones:
    @pytest.mark.parametrize("pooling", ["pooler", "cls", "mean", "head_input"])
    def test_two_steps_move_what_is_in_scope(self, short, pooling):
        run = short(hf.ViTModel(hf.ViTConfig(**TRANSFORMER, **LABELS)), pooling=pooling)
        assert moved_in_two_steps(run) == set(last_stage(run.model))

    def test_a_resumed_run_ends_where_the_whole_one_does(self, short, tmp_path):
        def make(**options):
            torch.manual_seed(0)
            return short(hf.ViTModel(hf.ViTConfig(**TRANSFORMER, **LABELS)), pooling="cls", **options)

        assert_resumes(make, tmp_path)


class TestAdapters:
    @pytest.fixture
    def wrapped(self, built):
        def wrap(name="vit", **options):
            given = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]} | options
            torch.manual_seed(0)
            return peft.get_peft_model(copy.deepcopy(built(name)), peft.LoraConfig(**given))

        return wrap

    @pytest.mark.parametrize(
        "name, trainable, targets",
        [
            ("vit", "last_stage", ["q_proj", "v_proj"]),
            ("resnet", "last_stage", ["convolution"]),
            ("vit", "all", ["q_proj"]),
        ],
    )
    def test_two_steps_move_the_adapter_in_scope(self, short, wrapped, name, trainable, targets):
        model = wrapped(name, target_modules=targets)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        expected = trained if trainable == "all" else set(last_stage(model)) & set(adapter_parameters(model))
        assert moved_in_two_steps(short(model, trainable=trainable)) == expected

    def test_a_resumed_run_ends_where_the_whole_one_does(self, short, wrapped, tmp_path):
        assert_resumes(lambda **options: short(wrapped(), **options), tmp_path)

    def test_the_best_checkpoint_is_loaded_at_the_end_and_the_adapted_model_measured(self, trainer, data, wrapped):
        order = iter(range(9, 0, -1))  # so that the first checkpoint is the best
        every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_order", "learning_rate": 0.1}
        run = trainer(
            wrapped(), **data, **every_step, **best, compute_metrics=lambda prediction: {"order": next(order)}
        )
        run.train()
        losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
        metrics = run.evaluate()
        assert losses[0] != losses[1] and metrics["eval_loss"] == pytest.approx(losses[0], rel=1e-6)
        assert "eval_rir" in metrics


# As of transformers 5.2x the second name is to replace the first.
CHECKPOINTING = [
    name
    for name in ("gradient_checkpointing", "activation_checkpointing")
    if name in ImmunizationArguments.__dataclass_fields__
]


class TestGradientCheckpointing:
    # ResNet, ConvNeXt, RegNet, MobileNetV2 and EfficientNet of transformers do not support it, which they say.
    @pytest.mark.parametrize("name", ["vit", "swin", "dinov2", "clip"])
    @pytest.mark.parametrize("trainable", ["last_stage", "all"])
    @pytest.mark.parametrize("option", CHECKPOINTING)
    def test_two_steps_are_those_without(self, short, built, name, trainable, option):
        ends = []
        for checkpointing in (False, True):  # one after the other: making a trainer seeds what is dropped
            run = short(copy.deepcopy(built(name)), **{option: checkpointing}, trainable=trainable)
            run.train()
            ends.append(run.model)
        assert same(*ends, atol=1e-6)
        assert any(getattr(module, "gradient_checkpointing", False) for module in run.model.modules())

    def test_the_reentrant_kind_is_taken_where_all_is_trainable_alone(self, short, built):
        model = copy.deepcopy(built("vit"))
        model.gradient_checkpointing_enable()  # the model's own is kept
        assert moved_in_two_steps(short(model)) == set(last_stage(model))
        model.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(ArgumentError, match="use_reentrant=False"):
            short(model)
        for option in CHECKPOINTING:
            options = {option: True, f"{option}_kwargs": {"use_reentrant": True}}
            with pytest.raises(ArgumentError, match="use_reentrant=False"):
                short(built("vit"), **options)
        run = short(copy.deepcopy(built("vit")), trainable="all", **options)
        assert "vit.embeddings.cls_token" in moved_in_two_steps(run)


@pytest.mark.slow
class TestCompiled:
    """Weights "auto" ask for gradients on the features, which a graph over both outputs would not give."""

    def pair(self, short, build, backend):
        ends = []
        for options in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
            run = short(build(), **options)
            run.train()
            ends.append(run.model)
        return ends

    def test_two_steps_are_those_of_the_plain_model_also_after_an_evaluation(self, short, trainer, data, built):
        assert same(*self.pair(short, lambda: copy.deepcopy(built("resnet")), "aot_eager"), atol=1e-6)
        run = trainer(copy.deepcopy(built("resnet")), torch_compile=True, torch_compile_backend="aot_eager", **data)
        before = run.evaluate()
        run.train()
        assert run.evaluate()["eval_benign_log10_kappa"] != before["eval_benign_log10_kappa"]

    @pytest.mark.skipif(shutil.which("g++") is None, reason="inductor wants a C++ compiler: apt-get install g++")
    def test_two_steps_of_compiled_code_move_the_same(self, short, tmp_path, monkeypatch):
        # The common cache may hold what was compiled for another processor, or by a run beside this one.
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))

        def one_layer():
            torch.manual_seed(0)
            return hf.ViTForImageClassification(hf.ViTConfig(**TRANSFORMER | {"num_hidden_layers": 1}, **LABELS))

        assert same(*self.pair(short, one_layer, "inductor"), atol=1e-3)
