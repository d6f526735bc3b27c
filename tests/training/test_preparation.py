"""What cannot be immunized, or not in the way that was asked for, is refused before anything runs, with the remedy."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers as hf
from accelerate import ParallelismConfig
from families import BUILDERS, TEXT, TRANSFORMER
from PIL import Image
from torch import nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.trainer_utils import HPSearchBackend

from hf_immunize.errors import (
    ArgumentError,
    DataError,
    HeadError,
    PerfectConditioningError,
    ScopeError,
)
from hf_immunize.training import checks
from hf_immunize.training.arguments import ImmunizationArguments, Method
from hf_immunize.training.record import make_record
from hf_immunize.training.step import ImmunizationStep
from hf_immunize.vision.bare import LinearHeadForImageClassification
from hf_immunize.vision.scope import select_trainable


# ---- data ----


def photos(count=8, mode="RGB", columns=("image", "label"), size=8):
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]
    features = {columns[0]: datasets.Image()} | {name: datasets.Value("int64") for name in columns[1:]}
    content = {columns[0]: [image.convert(mode) for image in images]}
    content |= {name: [i % 2 for i in range(count)] for name in columns[1:]}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


SETS = ("train_dataset", "harmful_dataset", "eval_dataset", "harmful_eval_dataset")
TEXTS = datasets.Dataset.from_dict({"text": ["a"] * 8, "label": [0, 1] * 4})
NO_LABELS = photos(columns=("image", "kind"))
ODD_LABELS = photos().remove_columns("label").add_column("label", [0] * 5 + [7, 1, 1])


@pytest.fixture
def processor():
    return hf.ViTImageProcessor(size={"height": 8, "width": 8})


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"harmful_dataset": None}, "Expected harmful_dataset=, found none"),
        *(({name: []}, f"at least one image in {name}, found none") for name in SETS),
        *(({name: TEXTS}, "'text', 'label'") for name in SETS),
        ({"train_dataset": photos().to_iterable_dataset(), "max_steps": -1, "num_train_epochs": 1.0}, "max_steps"),
        *(
            ({name: photos().to_iterable_dataset(), "dataloader_num_workers": 1}, f"workers=0 with a streamed {name}")
            for name in SETS
        ),
        ({"eval_dataset": NO_LABELS.to_iterable_dataset()}, r"In eval_dataset: .*needed for eval_loss"),
        ({"train_dataset": datasets.DatasetDict(train=photos())}, "train"),
        ({"train_dataset": NO_LABELS}, r"In train_dataset: .*none among 'image', 'kind'.*not by 'distillation'"),
        ({"eval_dataset": NO_LABELS}, r"In eval_dataset: .*none among 'image', 'kind'.*needed for eval_loss"),
        ({"eval_dataset": {"b": NO_LABELS}}, "In eval_dataset b:"),
        ({"harmful_dataset": NO_LABELS, "objective": "imma"}, r"In harmful_dataset: .*needed by objective='imma'"),
        ({"train_dataset": photos(), "label_column_name": "nope"}, "out of 'image', 'label', found 'nope'"),
        ({"train_dataset": ODD_LABELS}, r"7 in row 5 of train_dataset.*num_labels=8"),
        ({"eval_dataset": ODD_LABELS}, r"7 in row 5 of eval_dataset.*num_labels=8"),
        ({"per_device_train_batch_size": 1}, "global batches of at least 2, found 1 benign"),
        ({"train_dataset": photos(3)}, "one full batch of 4, found 3 benign images"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(options, found, trainer):
    with pytest.raises(DataError, match=found):
        trainer(**options)


def test_columns_can_be_named_and_harmful_labels_may_be_anything(trainer, processor):
    benign, harmful = (photos(mode=mode, columns=("photo", "kind", "other")) for mode in ("P", "L"))
    harmful = harmful.remove_columns("kind").add_column("kind", ["gun"] * 8)
    sets = dict(zip(SETS, (benign, harmful) * 2, strict=True))
    run = trainer(image_column_name="photo", label_column_name="kind", processing_class=processor, **sets)
    run.train()
    assert "eval_rir" in run.evaluate()


def test_accuracy_is_of_the_outputs_that_bear_the_classes_names(trainer, processor, tiny):
    names = ["a", "b", "c", "d"]
    data = photos(24).remove_columns("label")
    data = data.add_column("label", [i % 4 for i in range(24)], feature=datasets.ClassLabel(names=names))
    order = [2, 0, 3, 1]
    model = tiny()
    model.config.id2label = {i: names[j] for i, j in enumerate(order)}
    model.classifier = torch.nn.Linear(8, 4)
    model.classifier.bias.data = torch.tensor([0.0, 0.0, 100.0, 0.0])  # says "d" of every image
    sets = {"train_dataset": data, "eval_dataset": data}
    run = trainer(model, processing_class=processor, **sets, harmful_dataset=photos(8), harmful_eval_dataset=photos(8))
    labels = [run.eval_dataset[i]["labels"] for i in range(4)]
    assert [names[order[label]] for label in labels] == names
    only = data.select([3, 7, 11])
    assert run.evaluate(only)["eval_accuracy"] == 1.0


def test_degenerate_sides_are_told_before_the_first_step_and_in_the_record(trainer, images):
    run = trainer(harmful_dataset=images(16, 1))
    assert any("benign ones too" in remark for remark in run.evidence.remarks)
    run.evaluate()
    assert run.evidence.remarks == make_record(run).remarks


def test_images_that_do_not_differ_are_named_with_their_step(trainer, images):
    with pytest.raises(PerfectConditioningError, match=r"'kappa' at step 2.*two different samples"):
        trainer(train_dataset=images(5), dataloader_drop_last=False).train()
    with pytest.raises(PerfectConditioningError, match="at step 1"):
        trainer(harmful_dataset=images(1, labels=False)).train()
    # A batch larger than the data needs drop_last off.
    assert trainer(train_dataset=images(3), dataloader_drop_last=False, max_steps=1).train().global_step == 1


@pytest.mark.parametrize("column", ["label", "labels"])
def test_a_collator_of_the_user_gets_the_items_of_both_sides(column, trainer, images):
    def rows(seed):
        return [{"pixel_values": row["pixel_values"], column: row["labels"]} for row in images(8, seed)]

    def collate(items):
        labels = torch.tensor([item[column] for item in items])
        return {"pixel_values": torch.stack([item["pixel_values"] for item in items]), "labels": labels}

    run = trainer(**{name: rows(seed) for seed, name in enumerate(SETS)}, data_collator=collate)
    run.train()
    assert "eval_rir" in run.evaluate()


# ---- runs of a model from a function: each trial has its own settings and starting figures ----


def test_each_training_of_a_model_from_a_function_starts_anew(tiny, trainer):
    run = trainer(model_init=lambda: tiny(), benign_loss="distillation", objective="time")
    weights = []
    for _ in range(2):
        run.train()
        weights.append(dict(run.model.named_parameters()))
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert weights[0] is not weights[1] and "eval_rir" in run.evaluate()
    assert not run.model.vit.layers[0].layernorm_before.weight.requires_grad


def test_a_trial_has_its_own_settings_batch_sizes_and_starting_model(tiny, trainer, monkeypatch):
    """With a learning rate of zero RIR is one, whatever the model."""

    def model_init(trial):
        model = tiny()
        with torch.no_grad():
            model.vit.layers[0].mlp.fc1.weight.mul_(1.0 if trial is None else trial.params["scale"])
        return model

    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    run = trainer(model_init=model_init, benign_weight="0", harmful_batch_size=4, learning_rate=0.0)
    # In the midst of a search.
    run.hp_search_backend, run.hp_space, run.hp_name = HPSearchBackend.OPTUNA, lambda trial: trial.params, None
    collate, seen = run.data_collator, []
    run.data_collator = lambda rows: seen.append(sum(len(row.get("harmful", ())) for row in rows)) or collate(rows)
    for weight, scale in ((0.5, 2.0), (2.0, 5.0)):
        params = {"harmful_weight": weight, "harmful_batch_size": 2, "scale": scale}
        run.train(trial=SimpleNamespace(number=0, params=params))
        assert run.state.log_history[0]["harmful_weight"] == pytest.approx(weight)
        assert run.evaluate()["eval_rir"] == pytest.approx(1.0, rel=1e-6)
    assert {count for count in seen if count} == {2}


# ---- arguments ----


WHOLE = "as a whole number of at least 1 or None, found"
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(
    "option, message",
    [
        ({"remove_unused_columns": True}, "remove_unused_columns=False, found True"),
        ({"harmful_batch_size": "many"}, f"harmful_batch_size= {WHOLE} 'many'"),
        ({"distillation_batch_size": 0}, f"distillation_batch_size= {WHOLE} 0"),
        ({"cache_trunk": "int8"}, "cache_trunk="),
        ({"cache_trunk": "float32", "torch_compile": True}, "without torch_compile"),
        ({"train_sampling_strategy": "group_by_length"}, r"train_sampling_strategy=.*found 'group_by_length'"),
        # eval_loss, which the Trainer takes, is least before anything is immunized.
        ({"load_best_model_at_end": True, **EVERY_STEP}, "metric_for_best_model="),
    ],
)
def test_an_impossible_value_is_refused(option, message, arguments):
    with pytest.raises(ArgumentError, match=message):
        arguments(**option)


def test_arguments_come_from_the_command_line_and_from_files_where_numbers_may_be_text(tmp_path):
    parser = hf.HfArgumentParser(ImmunizationArguments)
    words = f"--output_dir {tmp_path} --use_cpu --harmful_weight auto --benign_weight 2.5".split()
    for loose in (["--freeze_batchnorm", "False"], ["--no_freeze_batchnorm"]):
        (args,) = parser.parse_args_into_dataclasses(words + loose)
        assert (args.harmful_weight, args.benign_weight, args.freeze_batchnorm) == ("auto", 2.5, False)
    options = {"output_dir": str(tmp_path), "use_cpu": True, "harmful_weight": 2.5, "benign_weight": "auto"}
    (tmp_path / "args.json").write_text(json.dumps(options))
    # YAML reads 3e-1 as a string, and no as False.
    more = ["auto_weight_ratio: 3e-1", "harmful_batch_size: 1e2", "benign_budget: none", "cache_trunk: no"]
    (tmp_path / "args.yaml").write_text("\n".join([f"{name}: {value}" for name, value in options.items()] + more))
    for read, name, batch in ((parser.parse_json_file, "json", None), (parser.parse_yaml_file, "yaml", 100)):
        (args,) = read(str(tmp_path / f"args.{name}"))
        assert (args.harmful_weight, args.benign_weight, args.auto_weight_ratio) == (2.5, "auto", 0.3)
        assert (args.harmful_batch_size, args.benign_budget, args.cache_trunk) == (batch, None, "no")


def test_defaults_are_those_of_the_method_and_differ_from_the_trainers(tmp_path):
    args = ImmunizationArguments(str(tmp_path), report_to="none", use_cpu=True)
    assert Method.of(args) == Method()
    assert (args.remove_unused_columns, args.logging_nan_inf_filter, args.dataloader_drop_last) == (False, False, True)


@pytest.mark.parametrize("metric", ["benign_log10_kappa", "eval_a_benign_ratio", "harmful_effective_rank", "rir"])
def test_of_some_metrics_less_is_better_and_one_that_is_not_measured_is_refused(metric, arguments, trainer):
    assert arguments(metric_for_best_model=metric).greater_is_better is (metric == "rir")
    assert arguments(metric_for_best_model=metric, greater_is_better=True).greater_is_better is True
    if "benign" not in metric:
        with pytest.raises(DataError, match=f"harmful_eval_dataset= with metric_for_best_model='{metric}'"):
            trainer(harmful_eval_dataset=None, metric_for_best_model=metric)


def test_what_to_report_to_must_be_installed(trainer, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(ArgumentError, match="report_to='wandb'"):
        trainer(report_to="wandb")


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
        checks.check_classifier(make())


@pytest.mark.parametrize(
    ("make", "options", "error", "found"),
    [
        (bare, {}, HeadError, 'bare backbone.*pooling="cls"'),
        (vit, {"pooling": "cls"}, HeadError, "ViTForImageClassification"),
        (bare, {"pooling": "max"}, ArgumentError, "pooling= out of"),
        (lambda: vit(num_labels=3), {"trainable": ".*"}, ScopeError, 'trainable="all"'),
        (
            vit,
            {"args": hf.TrainingArguments("run", report_to="none", use_cpu=True)},
            ArgumentError,
            "ImmunizationArguments, found TrainingArguments",
        ),
    ],
)
def test_the_trainer_refuses_at_once(make, options, error, found, trainer):
    with pytest.raises(error, match=found):
        trainer(make(), **options)


@pytest.mark.parametrize("options", [{}, {"benign_loss": "distillation"}, {"benign_budget": 0.03}])
def test_a_bare_backbone_gets_a_head_that_is_said_to_be_untrained(options, trainer, caplog):
    """And, unless the task's own loss trains it freely, that it stays so."""
    made = trainer(model_init=lambda: bare(num_labels=3), pooling="mean", **options)
    assert isinstance(made.model, LinearHeadForImageClassification) and made.model.classifier.out_features == 3
    said = next(record.getMessage() for record in caplog.records if "untrained" in record.getMessage())
    assert "head of 3 outputs on ViTModel" in said and ("held near it" in said) == bool(options)


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
def test_what_replaces_modules_is_refused_beside_sharded_weights(asked, sharded, arguments):
    """Asked for by an option, or by the launcher alone."""
    accelerator = sharded() if asked is None else None

    def check(**options):
        checks.check_sharding(
            SimpleNamespace(**vars(arguments(**options)) | ({asked: "full"} if asked else {})), accelerator
        )

    check(benign_loss="distillation", benign_budget=0.1)
    with pytest.raises(ArgumentError, match=r"cache_trunk='no' under FSDP.*'float32'"):
        check(cache_trunk="float32")


def test_what_accelerate_would_do_otherwise_with_shards_is_refused(sharded, arguments, monkeypatch):
    said = []
    monkeypatch.setattr(checks.logger, "warning", said.append)
    settings = SimpleNamespace(**vars(arguments()) | {"fsdp": True, "device": "cpu"})
    with pytest.raises(ArgumentError, match="accelerators for fsdp or deepspeed, found the device cpu"):
        checks.check_sharding(settings, SimpleNamespace())
    for plugin in (
        {"cpu_ram_efficient_loading": True},
        {"fsdp_version": 1},
        {"state_dict_type": "SHARDED_STATE_DICT"},
    ):
        with pytest.raises(ArgumentError, match=f"{next(iter(plugin.values()))}"):
            checks.check_sharding(arguments(), sharded(**plugin))
    # In half precision they may be trained but not measured.
    checks.check_sharding(arguments(), sharded("bf16"))
    assert len(said) == 1 and "no κ" in said[0]
    with pytest.raises(ArgumentError, match=r"full precision .* found bf16"):
        checks.check_sharding(arguments(), sharded("bf16"), harmful_eval=[1])


@pytest.mark.parametrize("dimension", ["tp", "cp", "sp"])
def test_what_takes_images_or_modules_apart_is_refused_by_option_and_by_launcher(dimension, arguments):
    found = ParallelismConfig(**{f"{dimension}_size": 2})
    for settings, accelerator in (
        ({"parallelism_config": found}, None),
        ({}, SimpleNamespace(parallelism_config=found)),
    ):
        with pytest.raises(ArgumentError, match=f"'{dimension}'"):
            checks.check_sharding(SimpleNamespace(**vars(arguments()) | settings), accelerator)
    checks.check_sharding(arguments(), SimpleNamespace(parallelism_config=ParallelismConfig(dp_replicate_size=2)))


def test_a_model_that_was_loaded_in_parts_is_refused(arguments):
    model = BUILDERS["vit"]()
    model.classifier.bias.ds_id = 3  # as ZeRO 3 marks them
    with pytest.raises(ArgumentError, match="ViTForImageClassification with whole weights"):
        checks.as_classifier(model, arguments())


def fsdp2(*names):
    """An accelerator that shards modules of these classes; by default those that a model names itself."""
    plugin = SimpleNamespace(auto_wrap_policy=transformer_auto_wrap_policy, transformer_cls_names_to_wrap=list(names))
    return SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin))


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "convnext", "clip"])
def test_a_model_that_fsdp_cannot_shard_is_refused(name):
    with pytest.raises(ArgumentError, match=r"input embeddings .* Train it with DDP"):
        checks.check_shardable(BUILDERS[name](), fsdp2())


def test_embeddings_that_would_be_sharded_twice_are_refused():
    with pytest.raises(ArgumentError, match="'s ViTEmbeddings"):
        checks.check_shardable(BUILDERS["vit"](), fsdp2("ViTEmbeddings", "ViTLayer"))


@pytest.mark.parametrize(
    ("name", "wrapped"),
    [
        ("vit", ["ViTLayer"]),
        ("dinov2", ["Dinov2Layer"]),
        ("siglip", ["SiglipEncoderLayer", "SiglipMultiheadAttentionPoolingHead"]),
        ("beit", []),
        ("swin", []),
    ],
)
def test_embeddings_are_left_out_of_what_fsdp_wraps_by_default(name, wrapped):
    accelerator = fsdp2()
    checks.check_shardable(BUILDERS[name](), accelerator)
    assert accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap == wrapped


# ---- batches ----


@pytest.mark.parametrize(
    ("processes", "options", "found"),
    [
        (1, {"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
        (2, {"accelerator_config": {"split_batches": True}}, "split_batches=True"),
        (2, {"accelerator_config": {"even_batches": False}}, "even_batches=False"),
        (2, {"dataloader_drop_last": False}, "dataloader_drop_last=True on 2 processes"),
    ],
)
def test_batches_that_take_the_sides_apart_are_refused(processes, options, found, arguments):
    with pytest.raises(ArgumentError, match=found):
        checks.check_batches(arguments(**options), processes)
    checks.check_batches(arguments(), processes)
    checks.check_batches(arguments(dataloader_drop_last=False, accelerator_config={"split_batches": True}), 1)
