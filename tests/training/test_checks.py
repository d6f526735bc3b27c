"""A model that cannot be immunized is refused before anything runs."""

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


def vit(**options):
    return hf.ViTForImageClassification(hf.ViTConfig(**TRANSFORMER, **options))


@pytest.mark.parametrize("name", list(BUILDERS))
def test_every_family_is_accepted(name):
    check_classifier(BUILDERS[name]())


def test_a_regression_is_refused():
    with pytest.raises(HeadError, match=r"at least two labels, found a regression .*num_labels=1.*num_labels= of"):
        check_classifier(vit(num_labels=1))


def test_a_regression_of_several_numbers_is_refused():
    with pytest.raises(HeadError, match=r"problem_type='regression'"):
        check_classifier(vit(num_labels=3, problem_type="regression"))


def test_several_labels_an_image_are_refused():
    with pytest.raises(HeadError, match=r"one label an image.*'single_label_classification'"):
        check_classifier(vit(num_labels=3, problem_type="multi_label_classification"))


def test_two_heads_for_inference_are_refused_with_the_class_to_load():
    model = hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**TRANSFORMER, num_labels=3))
    with pytest.raises(HeadError, match=r"same checkpoint as DeiTForImageClassification\."):
        check_classifier(model)


def test_images_of_any_size_are_refused_with_a_checkpoint_that_works():
    vision = {name: value for name, value in TRANSFORMER.items() if name != "image_size"} | {"num_patches": 4}
    model = hf.Siglip2ForImageClassification(hf.Siglip2Config(vision_config=vision, text_config=TEXT, num_labels=3))
    with pytest.raises(HeadError, match=r"NaFlex.*google/siglip2-base-patch16-224"):
        check_classifier(model)


def test_a_model_of_text_is_refused():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = hf.BertForSequenceClassification(hf.BertConfig(vocab_size=10, num_labels=3, **sizes))
    with pytest.raises(
        HeadError, match=r"takes pixel_values, found BertForSequenceClassification, which takes input_ids"
    ):
        check_classifier(model)


def test_a_network_of_ones_own_is_refused():
    with pytest.raises(ArgumentError, match=r"a model of transformers.*found Linear.*objectives"):
        check_classifier(nn.Linear(2, 2))


def test_adapters_without_wrapper_are_refused():
    model = vit(num_labels=3)
    # What add_adapter does, which not every version of transformers does with every one of PEFT.
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    model._hf_peft_config_loaded = True
    with pytest.raises(ArgumentError, match=r"peft.get_peft_model"):
        check_classifier(model)


def test_the_trainer_refuses_at_once(trainer):
    with pytest.raises(HeadError, match=r"regression"):
        trainer(vit(num_labels=1))


def test_a_bare_backbone_is_refused_with_what_to_do(trainer):
    with pytest.raises(HeadError, match=r'bare backbone.*pooling="cls"'):
        trainer(hf.ViTModel(hf.ViTConfig(**TRANSFORMER)))


def test_a_bare_backbone_with_pooling_gets_a_head(trainer):
    built = trainer(hf.ViTModel(hf.ViTConfig(**TRANSFORMER, num_labels=3)), pooling="cls")
    assert isinstance(built.model, LinearHeadForImageClassification)
    assert built.model.classifier.out_features == 3


def test_a_classifier_with_pooling_is_refused(trainer):
    with pytest.raises(HeadError, match="ViTForImageClassification"):
        trainer("vit", pooling="cls")


def test_an_unknown_pooling_is_refused(trainer):
    with pytest.raises(ArgumentError, match="pooling= out of"):
        trainer(hf.ViTModel(hf.ViTConfig(**TRANSFORMER)), pooling="max")


def test_model_init_gets_a_head_too(trainer):
    built = trainer(model_init=lambda: hf.ViTModel(hf.ViTConfig(**TRANSFORMER)), pooling="mean")
    assert isinstance(built.model, LinearHeadForImageClassification)


def test_an_expression_that_matches_everything_is_refused(trainer):
    with pytest.raises(ScopeError, match=r'trainable="all"'):
        trainer("vit", trainable=".*")


PAPER = {"objective": "kappa", "benign_loss": "task", "benign_budget": None}


@pytest.mark.parametrize("sharding", ["fsdp", "deepspeed"])
def test_a_starting_model_beside_a_sharded_one_is_refused(sharding, arguments):
    settings = vars(arguments(benign_loss="distillation")) | {sharding: "full_shard"}
    with pytest.raises(ArgumentError, match=r"benign_loss='task' and benign_budget=None under FSDP or DeepSpeed"):
        check_sharding(SimpleNamespace(**settings))


def test_the_papers_training_may_be_sharded(arguments):
    check_sharding(SimpleNamespace(**vars(arguments(**PAPER)) | {"fsdp": "full_shard"}))


@pytest.mark.parametrize("options", [{}, {"benign_loss": "distillation"}, {"benign_budget": 0.03}])
def test_it_is_said_that_a_new_head_is_untrained(options, trainer, caplog):
    """And, unless the task's own loss trains it freely, that it stays so."""
    trainer(hf.ViTModel(hf.ViTConfig(**TRANSFORMER, num_labels=3)), pooling="cls", **options)
    said = next(record.getMessage() for record in caplog.records if "untrained" in record.getMessage())
    assert "head of 3 outputs on ViTModel" in said and ("stays near it" in said) == bool(options)


def test_a_bare_step_refuses_what_the_trainer_refuses():
    with pytest.raises(HeadError, match=r"regression"):
        ImmunizationStep(vit(num_labels=1))


def test_a_bare_step_refuses_the_reentrant_kind_of_checkpointing():
    model = vit(num_labels=3)
    select_trainable(model, "last_stage")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ArgumentError, match="use_reentrant=False"):
        ImmunizationStep(model)


@pytest.mark.parametrize("moving", [[], ["classifier.weight"]])
def test_a_bare_step_refuses_a_scope_in_which_no_feature_moves(moving):
    model = vit(num_labels=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in moving)
    with pytest.raises(ScopeError, match=f"found {'classifier.weight' if moving else 'none'}: no feature could move"):
        ImmunizationStep(model)


def test_a_cached_trunk_beside_sharded_weights_is_refused(arguments):
    settings = vars(arguments(**PAPER, cache_trunk="float32")) | {"fsdp": True}
    with pytest.raises(ArgumentError, match=r"cache_trunk='no' under FSDP or DeepSpeed, found 'float32'"):
        check_sharding(SimpleNamespace(**settings))


@pytest.fixture
def sharded(monkeypatch):
    """Make an accelerator under which weights are sharded."""

    def make(mixed_precision="no", **plugin):
        monkeypatch.setattr(checks, "sharded_weights", lambda: True)
        state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**plugin))
        return SimpleNamespace(mixed_precision=mixed_precision, state=state)

    return make


def test_sharding_by_the_launcher_alone_is_seen(sharded, arguments):
    with pytest.raises(ArgumentError, match=r"benign_loss='task'"):
        check_sharding(arguments(benign_loss="distillation"), sharded())


def test_sharding_that_accelerate_leaves_out_is_refused(arguments):
    settings = SimpleNamespace(**vars(arguments(**PAPER)) | {"fsdp": True, "device": "cpu"})
    with pytest.raises(ArgumentError, match=r"accelerators for fsdp or deepspeed, found the device cpu"):
        check_sharding(settings, SimpleNamespace())


def test_kappa_of_half_precision_in_sharded_weights_is_refused(sharded, arguments):
    with pytest.raises(ArgumentError, match=r"full precision .* found bf16"):
        check_sharding(arguments(**PAPER), sharded("bf16"), harmful_eval=[1])


def test_sharded_weights_in_half_precision_may_be_trained_without_kappa(sharded, arguments, monkeypatch):
    said = []
    monkeypatch.setattr(checks.logger, "warning", said.append)
    check_sharding(arguments(**PAPER), sharded("bf16"))
    assert len(said) == 1 and "will report no κ" in said[0]


def test_starting_weights_that_one_process_alone_has_are_refused(sharded, arguments):
    with pytest.raises(ArgumentError, match=r"cpu_ram_efficient_loading=False"):
        check_sharding(arguments(**PAPER), sharded(cpu_ram_efficient_loading=True))


@pytest.mark.parametrize(
    ("processes", "config", "message"),
    [
        (1, {"dispatch_batches": True}, "dispatch_batches=True"),
        (2, {"split_batches": True}, "split_batches=True"),
        (2, {"even_batches": False}, "even_batches=False"),
    ],
)
def test_batches_that_take_the_sides_apart_are_refused(processes, config, message, arguments):
    with pytest.raises(ArgumentError, match=rf"accelerator_config without {message}"):
        check_batches(arguments(accelerator_config=config), processes)


def test_a_filled_up_last_batch_of_several_processes_is_refused(arguments):
    with pytest.raises(ArgumentError, match=r"dataloader_drop_last=True on 2 processes"):
        check_batches(arguments(dataloader_drop_last=False), 2)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_defaults_deal_out_batches_as_they_should(processes, arguments):
    check_batches(arguments(), processes)


@pytest.mark.parametrize("option", [{"dataloader_drop_last": False}, {"accelerator_config": {"split_batches": True}}])
def test_one_process_may_do_as_it_likes(option, arguments):
    check_batches(arguments(**option), 1)


def fsdp2(*names, models=()):
    """An accelerator that shards modules of these classes; by default those that a model names itself."""
    plugin = SimpleNamespace(auto_wrap_policy=transformer_auto_wrap_policy, transformer_cls_names_to_wrap=list(names))
    return SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin), _models=list(models))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("vit", "'ViTLayer'"),
        ("dinov2", "'Dinov2Layer'"),
        ("siglip", "'SiglipEncoderLayer', 'SiglipMultiheadAttentionPoolingHead'"),
    ],
)
def test_embeddings_that_would_be_sharded_twice_are_refused_with_what_to_set(name, layers):
    with pytest.raises(ArgumentError, match=rf"'transformer_layer_cls_to_wrap': \[{layers}\]"):
        check_shardable(BUILDERS[name](), fsdp2())


@pytest.mark.parametrize(("name", "layers"), [("vit", ["ViTLayer"]), ("beit", []), ("swin", [])])
def test_models_that_fsdp_can_shard_are_accepted(name, layers):
    check_shardable(BUILDERS[name](), fsdp2(*layers))


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "convnext", "clip"])
def test_models_that_do_not_name_their_embeddings_are_refused_under_fsdp(name):
    with pytest.raises(ArgumentError, match=r"input embeddings accelerate can find, found .* Train it with DDP"):
        check_shardable(BUILDERS[name](), fsdp2())


def test_without_fsdp_any_model_will_do():
    check_shardable(BUILDERS["resnet"](), SimpleNamespace(is_fsdp2=False))


def test_an_evaluation_before_the_weights_are_sharded_is_refused():
    with pytest.raises(ArgumentError, match=r"train\(\) before evaluate\(\) under FSDP.*eval_on_start=True"):
        check_prepared(fsdp2())
    check_prepared(fsdp2(models=["prepared"]))
