"""What cannot be immunized, or not in the way that was asked for, is refused before anything runs."""

from types import SimpleNamespace

import peft
import pytest
import transformers as hf
from families import BUILDERS, TEXT, TRANSFORMER
from torch import nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from hf_immunize.errors import ArgumentError, HeadError, ScopeError
from hf_immunize.training import checks
from hf_immunize.training.checks import (
    check_batches,
    check_classifier,
    check_prepared,
    check_shardable,
    check_sharding,
)
from hf_immunize.training.step import ImmunizationStep
from hf_immunize.vision.bare import LinearHeadForImageClassification
from hf_immunize.vision.scope import select_trainable


# ---- models ----


def vit(**options):
    return hf.ViTForImageClassification(hf.ViTConfig(**TRANSFORMER, **options))


def bare(**options):
    return hf.ViTModel(hf.ViTConfig(**TRANSFORMER, **options))


def naflex():
    vision = {name: value for name, value in TRANSFORMER.items() if name != "image_size"} | {"num_patches": 4}
    return hf.Siglip2ForImageClassification(hf.Siglip2Config(vision_config=vision, text_config=TEXT, num_labels=3))


def of_text():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return hf.BertForSequenceClassification(hf.BertConfig(vocab_size=10, num_labels=3, **sizes))


def with_adapters():
    model = vit(num_labels=3)
    # What add_adapter does, which not every version of transformers does with every one of PEFT.
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    model._hf_peft_config_loaded = True
    return model


@pytest.mark.parametrize("name", list(BUILDERS))
def test_every_family_is_accepted(name):
    check_classifier(BUILDERS[name]())


@pytest.mark.parametrize(
    ("make", "error", "found"),
    [
        (lambda: vit(num_labels=1), HeadError, "regression .*num_labels=1"),
        (lambda: vit(num_labels=3, problem_type="regression"), HeadError, "problem_type='regression'"),
        (lambda: vit(num_labels=3, problem_type="multi_label_classification"), HeadError, "'single_label_"),
        (
            lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**TRANSFORMER, num_labels=3)),
            HeadError,
            r"DeiTForImageClassification\.",
        ),
        (naflex, HeadError, "NaFlex.*google/siglip2-base-patch16-224"),
        (of_text, HeadError, "BertForSequenceClassification, which takes input_ids"),
        (lambda: nn.Linear(2, 2), ArgumentError, "found Linear.*objectives"),
        (with_adapters, ArgumentError, "peft.get_peft_model"),
    ],
)
def test_a_model_that_does_not_choose_one_label_for_an_image_is_refused(make, error, found):
    with pytest.raises(error, match=found):
        check_classifier(make())


@pytest.mark.parametrize(
    ("make", "options", "error", "found"),
    [
        (lambda: vit(num_labels=1), {}, HeadError, "regression"),
        (bare, {}, HeadError, 'bare backbone.*pooling="cls"'),
        (vit, {"pooling": "cls"}, HeadError, "ViTForImageClassification"),
        (bare, {"pooling": "max"}, ArgumentError, "pooling= out of"),
        (lambda: vit(num_labels=3), {"trainable": ".*"}, ScopeError, 'trainable="all"'),
    ],
)
def test_the_trainer_refuses_at_once(make, options, error, found, trainer):
    with pytest.raises(error, match=found):
        trainer(make(), **options)


@pytest.mark.parametrize("options", [{}, {"benign_loss": "distillation"}, {"benign_budget": 0.03}])
def test_a_bare_backbone_gets_a_head_that_is_said_to_be_untrained(options, trainer, caplog):
    """And, unless the task's own loss trains it freely, that it stays so."""
    built = trainer(bare(num_labels=3), pooling="cls", **options)
    assert isinstance(built.model, LinearHeadForImageClassification) and built.model.classifier.out_features == 3
    said = next(record.getMessage() for record in caplog.records if "untrained" in record.getMessage())
    assert "head of 3 outputs on ViTModel" in said and ("held near it" in said) == bool(options)
    made = trainer(model_init=lambda: bare(), pooling="mean", **options)
    assert isinstance(made.model, LinearHeadForImageClassification)


def moving_alone(*names):
    model = vit(num_labels=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return model


def reentrant():
    model = vit(num_labels=3)
    select_trainable(model, "last_stage")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return model


@pytest.mark.parametrize(
    ("make", "error", "found"),
    [
        (lambda: vit(num_labels=1), HeadError, "regression"),
        (reentrant, ArgumentError, "use_reentrant=False"),
        (moving_alone, ScopeError, "found none: no feature could move"),
        (lambda: moving_alone("classifier.weight"), ScopeError, "found classifier.weight: no feature could move"),
    ],
)
def test_a_bare_step_refuses_what_the_trainer_refuses(make, error, found):
    with pytest.raises(error, match=found):
        ImmunizationStep(make())


# ---- weights in parts ----


@pytest.fixture
def sharded(monkeypatch):
    """Make an accelerator under which weights are sharded."""

    def make(mixed_precision="no", **plugin):
        monkeypatch.setattr(checks, "sharded_weights", lambda: True)
        state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**plugin))
        return SimpleNamespace(mixed_precision=mixed_precision, state=state)

    return make


@pytest.mark.parametrize("asked", ["fsdp", "deepspeed", None])
def test_what_runs_the_starting_model_or_replaces_modules_is_refused_beside_sharded_weights(asked, sharded, arguments):
    """Asked for by an option, or by the launcher alone."""
    accelerator = sharded() if asked is None else None

    def check(**options):
        check_sharding(SimpleNamespace(**vars(arguments(**options)) | ({asked: "full"} if asked else {})), accelerator)

    check()
    for options, found in (
        ({"benign_loss": "distillation"}, "benign_budget=None under FSDP.*'distillation'"),
        ({"benign_budget": 0.1}, "benign_budget=None under FSDP.*0.1"),
        ({"cache_trunk": "float32"}, "cache_trunk='no' under FSDP.*'float32'"),
    ):
        with pytest.raises(ArgumentError, match=found):
            check(**options)


def test_sharding_that_accelerate_leaves_out_is_refused(arguments):
    settings = SimpleNamespace(**vars(arguments()) | {"fsdp": True, "device": "cpu"})
    with pytest.raises(ArgumentError, match="accelerators for fsdp or deepspeed, found the device cpu"):
        check_sharding(settings, SimpleNamespace())


def test_sharded_weights_in_half_precision_may_be_trained_but_not_measured(sharded, arguments, monkeypatch):
    said = []
    monkeypatch.setattr(checks.logger, "warning", said.append)
    check_sharding(arguments(), sharded("bf16"))
    assert len(said) == 1 and "no κ" in said[0]
    with pytest.raises(ArgumentError, match=r"full precision .* found bf16"):
        check_sharding(arguments(), sharded("bf16"), harmful_eval=[1])


def test_starting_weights_that_one_process_alone_has_are_refused(sharded, arguments):
    with pytest.raises(ArgumentError, match="cpu_ram_efficient_loading=False"):
        check_sharding(arguments(), sharded(cpu_ram_efficient_loading=True))


def fsdp2(*names, models=()):
    """An accelerator that shards modules of these classes; by default those that a model names itself."""
    plugin = SimpleNamespace(auto_wrap_policy=transformer_auto_wrap_policy, transformer_cls_names_to_wrap=list(names))
    return SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin), _models=list(models))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        # Embeddings that would be sharded twice, with what to set.
        ("vit", r"'transformer_layer_cls_to_wrap': \['ViTLayer'\]"),
        ("dinov2", r"'transformer_layer_cls_to_wrap': \['Dinov2Layer'\]"),
        ("siglip", r"to_wrap': \['SiglipEncoderLayer', 'SiglipMultiheadAttentionPoolingHead'\]"),
        *((name, "input embeddings .* Train it with DDP") for name in ("resnet", "mobilenet_v2", "convnext", "clip")),
    ],
)
def test_a_model_that_fsdp_cannot_shard_is_refused(name, found):
    with pytest.raises(ArgumentError, match=found):
        check_shardable(BUILDERS[name](), fsdp2())


@pytest.mark.parametrize(("name", "layers"), [("vit", ["ViTLayer"]), ("beit", []), ("swin", []), ("resnet", None)])
def test_models_that_fsdp_can_shard_are_accepted(name, layers):
    """And without FSDP, any."""
    check_shardable(BUILDERS[name](), SimpleNamespace(is_fsdp2=False) if layers is None else fsdp2(*layers))


def test_an_evaluation_before_the_weights_are_sharded_is_refused():
    with pytest.raises(ArgumentError, match="eval_on_start=True"):
        check_prepared(fsdp2())
    check_prepared(fsdp2(models=["prepared"]))


# ---- batches ----


@pytest.mark.parametrize(
    ("processes", "options", "found"),
    [
        (1, {"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
        (2, {"accelerator_config": {"split_batches": True}}, "split_batches=True"),
        (2, {"accelerator_config": {"even_batches": False}}, "even_batches=False"),
        (2, {"dataloader_drop_last": False}, "dataloader_drop_last=True on 2 processes"),
        (1, {}, None),
        (2, {}, None),
        (1, {"dataloader_drop_last": False}, None),
        (1, {"accelerator_config": {"split_batches": True}}, None),
    ],
)
def test_batches_that_take_the_sides_apart_are_refused(processes, options, found, arguments):
    if found is None:
        check_batches(arguments(**options), processes)
        return
    with pytest.raises(ArgumentError, match=found):
        check_batches(arguments(**options), processes)
