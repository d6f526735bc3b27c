"""Two steps of each objective on a tiny model of each family: exactly what is in scope moves."""

import copy
import shutil

import peft
import pytest
import torch
import transformers as hf
from families import BUILDERS, LABELS, TRANSFORMER
from torch.nn.modules.batchnorm import _BatchNorm

from hf_immunize.errors import ArgumentError, ScopeError
from hf_immunize.training.objectives import OBJECTIVES
from hf_immunize.vision.bare import load_with_linear_head
from hf_immunize.vision.head import adapter_parameters, find_head, penultimate_features
from hf_immunize.vision.scope import last_stage


@pytest.fixture(scope="module")
def built():
    """Classifiers whose features are of order one: each is built once, and trained from its state of then."""
    kept = {}

    def build(name):
        if name not in kept:
            torch.manual_seed(0)
            model = BUILDERS[name]()
            calibrate(model)
            kept[name] = model, {key: tensor.clone() for key, tensor in model.state_dict().items()}
        model, state = kept[name]
        model.load_state_dict(state)
        return model.requires_grad_(True)

    return build


def calibrate(model):
    """Give BatchNorm the statistics of some images, without which an untrained network's features vanish."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            model.train()(pixel_values=torch.randn(16, 3, 32, 32))
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum


EVERYWHERE = [name for name in OBJECTIVES if name != "dead_relu"]
# Their last stage has a ReLU that no shortcut bypasses.
RELU = ("resnet", "mobilenet_v2", "regnet")


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in RELU])
def test_dead_relu_is_refused_where_there_is_none(built, trainer, images, name):
    sides = {"train_dataset": images(8, 1, 32), "harmful_dataset": images(8, 2, 32)}
    options = {"objective": "dead_relu", "benign_loss": "both"}
    run = trainer(built(name), **options, eval_dataset=None, harmful_eval_dataset=None, **sides)
    with pytest.raises(ScopeError, match="objective='concentration'"):
        run.train()


@pytest.mark.parametrize(
    ("name", "objective"),
    # All objectives on a transformer and a convolutional network, one on every family.
    [*((name, objective) for name in ("vit", "resnet") for objective in EVERYWHERE)]
    + [(name, "dead_relu") for name in RELU]
    + [(name, "kappa") for name in BUILDERS if name not in ("vit", "resnet")],
)
def test_two_steps_move_what_is_in_scope(built, trainer, images, name, objective):
    model = built(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    run = trainer(
        model,
        objective=objective,
        benign_loss="both" if objective == "dead_relu" else "task",
        train_dataset=images(8, 1, 32),
        harmful_dataset=images(8, 2, 32),
        eval_dataset=None,
        harmful_eval_dataset=None,
        logging_strategy="no",
    )
    run.train()
    after = model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == set(last_stage(model))
    pixels = torch.randn(2, 3, 32, 32)
    features = penultimate_features(model.eval(), pixels)
    torch.testing.assert_close(find_head(model)[1](features), model(pixel_values=pixels).logits)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_the_default_takes_the_objective_that_the_network_allows(built, short, name):
    run = short(built(name), objective="auto", benign_loss="both")
    run.train()
    assert run.objective == ("dead_relu" if name in RELU else "concentration")


def moved_in_two_steps(run):
    before = {key: tensor.clone() for key, tensor in run.model.state_dict().items()}
    run.train()
    return {key for key, tensor in run.model.state_dict().items() if not torch.equal(before[key], tensor)}


@pytest.fixture
def short(trainer, images):
    """Make a trainer of two steps, without evaluation."""

    def make(model, **options):
        data = {"train_dataset": images(8, 1, 32), "harmful_dataset": images(8, 2, 32)}
        return trainer(model, eval_dataset=None, harmful_eval_dataset=None, **data, **options)

    return make


class TestBareBackbones:
    @pytest.mark.parametrize("pooling", ["pooler", "cls", "mean"])
    def test_two_steps_move_what_is_in_scope(self, short, pooling):
        run = short(hf.ViTModel(hf.ViTConfig(**TRANSFORMER, **LABELS)), pooling=pooling)
        assert moved_in_two_steps(run) == set(last_stage(run.model))

    def test_the_checkpoint_is_the_backbones_with_its_head_beside(self, short, tmp_path):
        run = short(hf.ViTModel(hf.ViTConfig(**TRANSFORMER, **LABELS)), pooling="cls")
        run.train()
        run.save_model(str(tmp_path / "saved"))
        pixels = torch.randn(2, 3, 32, 32)
        plain = hf.AutoModel.from_pretrained(tmp_path / "saved")
        assert type(plain) is hf.ViTModel
        run.model.eval()
        torch.testing.assert_close(plain(pixels).last_hidden_state, run.model.backbone(pixels).last_hidden_state)
        again = load_with_linear_head(tmp_path / "saved").eval()
        torch.testing.assert_close(again(pixels).logits, run.model(pixels).logits)

    def test_head_input_saves_the_familys_own_classifier(self, short, tmp_path):
        run = short(hf.Dinov2Model(hf.Dinov2Config(**TRANSFORMER, mlp_ratio=2, **LABELS)), pooling="head_input")
        run.train()
        run.save_model(str(tmp_path / "saved"))
        again = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
        pixels = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(again(pixels).logits, run.model.eval()(pixels).logits)

    def test_a_resumed_run_ends_where_the_whole_one_does(self, short, tmp_path):
        def make(folder, **options):
            torch.manual_seed(0)
            backbone = hf.ViTModel(hf.ViTConfig(**TRANSFORMER, **LABELS))
            return short(
                backbone, pooling="cls", output_dir=str(folder), save_strategy="steps", save_steps=1, **options
            )

        whole = make(tmp_path / "whole")
        whole.train()
        resumed = make(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
        states = whole.model.state_dict(), resumed.model.state_dict()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


class TestAdapters:
    @pytest.fixture
    def wrapped(self, built):
        def wrap(name="vit", **options):
            given = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]} | options
            torch.manual_seed(0)
            return peft.get_peft_model(copy.deepcopy(built(name)), peft.LoraConfig(**given))

        return wrap

    @pytest.mark.parametrize("objective", ["kappa", "concentration"])
    @pytest.mark.parametrize("name, targets", [("vit", ["q_proj", "v_proj"]), ("resnet", ["convolution"])])
    def test_two_steps_move_the_adapter_in_the_last_stage(self, short, wrapped, name, targets, objective):
        model = wrapped(name, target_modules=targets)
        expected = set(last_stage(model)) & set(adapter_parameters(model))
        assert moved_in_two_steps(short(model, objective=objective)) == expected

    def test_all_moves_what_peft_trains(self, short, wrapped):
        model = wrapped()
        expected = {name for name, p in model.named_parameters() if p.requires_grad}
        assert moved_in_two_steps(short(model, trainable="all")) == expected

    def test_what_is_saved_is_peft_s_adapter_and_loads_with_peft(self, short, wrapped, built, tmp_path):
        import peft

        run = short(wrapped())
        run.train()
        run.save_model(str(tmp_path / "saved"))
        assert {path.name for path in (tmp_path / "saved").iterdir()} >= {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        assert not (tmp_path / "saved" / "model.safetensors").exists()
        again = peft.PeftModel.from_pretrained(copy.deepcopy(built("vit")), tmp_path / "saved").eval()
        pixels = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(again(pixel_values=pixels).logits, run.model.eval()(pixel_values=pixels).logits)

    def test_a_resumed_run_ends_where_the_whole_one_does(self, short, wrapped, tmp_path):
        def make(folder):
            return short(wrapped(), output_dir=str(folder), save_strategy="steps", save_steps=1)

        whole = make(tmp_path / "whole")
        whole.train()
        resumed = make(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
        states = whole.model.state_dict(), resumed.model.state_dict()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])

    def test_the_best_checkpoint_is_loaded_at_the_end(self, trainer, images, wrapped):
        order = iter(range(9, 0, -1))  # so that the first checkpoint is the best
        run = trainer(
            wrapped(),
            train_dataset=images(8, 1, 32),
            harmful_dataset=images(8, 2, 32),
            eval_dataset=images(24, 3, 32),
            harmful_eval_dataset=images(24, 4, 32),
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_order",
            compute_metrics=lambda prediction: {"order": next(order)},
            learning_rate=0.1,
        )
        run.train()
        losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
        assert losses[0] != losses[1]
        assert run.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-6)

    def test_evaluation_measures_the_features_of_the_adapted_model(self, trainer, images, wrapped):
        data = {
            "train_dataset": images(8, 1, 32),
            "harmful_dataset": images(8, 2, 32),
            "eval_dataset": images(24, 3, 32),
            "harmful_eval_dataset": images(24, 4, 32),
        }
        run = trainer(wrapped(), **data)
        run.train()
        assert "eval_rir" in run.evaluate()


class TestGradientCheckpointing:
    # ResNet, ConvNeXt, RegNet, MobileNetV2 and EfficientNet of transformers do not support it, which they say.
    @pytest.mark.parametrize("name", ["vit", "swin", "dinov2", "clip"])
    @pytest.mark.parametrize("trainable", ["last_stage", "all"])
    def test_two_steps_are_those_without(self, short, built, name, trainable):
        ends = []
        for checkpointing in (False, True):
            run = short(copy.deepcopy(built(name)), gradient_checkpointing=checkpointing, trainable=trainable)
            run.train()
            ends.append(run.model.state_dict())
        assert all(torch.allclose(ends[0][key], ends[1][key], atol=1e-6) for key in ends[0])

    def test_the_models_own_is_kept(self, short, built):
        model = copy.deepcopy(built("vit"))
        model.gradient_checkpointing_enable()
        expected = set(last_stage(model))
        assert moved_in_two_steps(short(model)) == expected

    def test_the_reentrant_kind_is_refused_where_a_part_is_frozen(self, short, built):
        with pytest.raises(ArgumentError, match="use_reentrant=False"):
            short(built("vit"), gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})

    def test_the_reentrant_kind_of_the_models_own_is_refused_too(self, short, built):
        model = copy.deepcopy(built("vit"))
        model.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(ArgumentError, match="use_reentrant=False"):
            short(model)

    def test_the_reentrant_kind_is_taken_where_all_moves(self, short, built):
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        run = short(copy.deepcopy(built("vit")), trainable="all", **options)
        assert "vit.embeddings.cls_token" in moved_in_two_steps(run)


@pytest.mark.slow
class TestCompiled:
    """Weights "auto" ask for gradients on the features, which a graph over both outputs would not give."""

    def ends(self, short, build, **compiled):
        ends = []
        for options in ({}, {"torch_compile": True, **compiled}):
            run = short(build(), **options)
            run.train()
            ends.append(run.model.state_dict())
        return ends

    def test_two_steps_are_those_of_the_plain_model(self, short, built):
        ends = self.ends(short, lambda: copy.deepcopy(built("resnet")), torch_compile_backend="aot_eager")
        assert all(torch.allclose(ends[0][key], ends[1][key], atol=1e-6) for key in ends[0])

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("g++") is None, reason="inductor wants a C++ compiler: apt-get install g++")
    def test_two_steps_of_compiled_code_move_the_same(self, short, tmp_path, monkeypatch):
        # The common cache may hold what was compiled for another processor, or by a run beside this one.
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))

        def one_layer():
            torch.manual_seed(0)
            return hf.ViTForImageClassification(hf.ViTConfig(**TRANSFORMER | {"num_hidden_layers": 1}, **LABELS))

        ends = self.ends(short, one_layer, torch_compile_backend="inductor")
        assert all(torch.allclose(ends[0][key], ends[1][key], atol=1e-3) for key in ends[0])

    def test_an_evaluation_before_changes_nothing(self, trainer, images, built):
        data = {
            "train_dataset": images(8, 1, 32),
            "harmful_dataset": images(8, 2, 32),
            "eval_dataset": images(8, 3, 32),
            "harmful_eval_dataset": images(8, 4, 32),
        }
        run = trainer(copy.deepcopy(built("resnet")), torch_compile=True, torch_compile_backend="aot_eager", **data)
        before = run.evaluate()
        run.train()
        assert run.evaluate()["eval_benign_log10_kappa"] != before["eval_benign_log10_kappa"]
