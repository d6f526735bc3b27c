"""What cannot work is refused before anything runs, by an error that says what to do."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from transformers.trainer_utils import HPSearchBackend

from hf_immunize.errors import (
    ArgumentError,
    DataError,
    HeadError,
    ImageDecodeError,
    NonFiniteError,
    PerfectConditioningError,
    ShapeError,
)
from hf_immunize.training.arguments import ImmunizationArguments
from hf_immunize.training.record import make_record
from hf_immunize.training.trainer import ImmunizationTrainer


def photos(count=8, mode="RGB", columns=("image", "label"), size=8):
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]
    features = {columns[0]: datasets.Image()} | {name: datasets.Value("int64") for name in columns[1:]}
    content = {columns[0]: [image.convert(mode) for image in images]}
    content |= {name: [i % 2 for i in range(count)] for name in columns[1:]}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def damaged(count, row):
    data = photos(count).cast_column("image", datasets.Image(decode=False))
    stored = data["image"][:]
    stored[row] = {"bytes": b"no image", "path": None}
    return datasets.Dataset.from_dict({"image": stored, "label": data["label"][:]}, features=photos(1).features)


SETS = ("train_dataset", "harmful_dataset", "eval_dataset", "harmful_eval_dataset")


@pytest.fixture
def processor():
    return hf.ViTImageProcessor(size={"height": 8, "width": 8})


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"harmful_dataset": None}, "Expected harmful_dataset=, found none"),
        *(({name: []}, f"at least one image in {name}, found none") for name in SETS),
        ({"train_dataset": photos().to_iterable_dataset()}, "without streaming"),
        ({"train_dataset": datasets.DatasetDict(train=photos())}, "train"),
        *(({name: photos(columns=("image", "kind"))}, "none among 'image', 'kind'") for name in (SETS[0], SETS[2])),
        ({"train_dataset": photos(), "label_column_name": "nope"}, "out of 'image', 'label', found 'nope'"),
        ({"per_device_train_batch_size": 1}, "global batches of at least 2, found 1 benign"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(options, found, trainer):
    with pytest.raises(DataError, match=found):
        trainer(**options)


@pytest.mark.parametrize("name", SETS)
def test_no_image_column_lists_the_columns(name, trainer, processor):
    data = datasets.Dataset.from_dict({"text": ["a"] * 8, "label": [0, 1] * 4})
    with pytest.raises(DataError, match="'text', 'label'"):
        trainer(**{name: data}, processing_class=processor)


def test_columns_can_be_named(trainer, processor):
    data = photos(columns=("photo", "kind", "other"))
    sets = dict.fromkeys(SETS, data)
    run = trainer(image_column_name="photo", label_column_name="kind", processing_class=processor, **sets)
    run.train()
    assert "eval_rir" in run.evaluate()


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_a_label_out_of_range_is_named_with_its_row(name, trainer):
    data = photos().remove_columns("label").add_column("label", [0] * 5 + [7, 1, 1])
    with pytest.raises(DataError, match=f"7 in row 5 of {name}.*num_labels=8"):
        trainer(**{name: data})


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


def test_two_classes_of_eight_outputs_are_refused_unless_named(trainer, processor, tiny):
    data = photos(8).cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    model = tiny()
    model.config.id2label = {i: f"pet {i}" for i in range(8)}
    model.classifier = torch.nn.Linear(8, 8)
    with pytest.raises(DataError, match="'cat', 'dog'"):
        trainer(model, eval_dataset=data, processing_class=processor)


def test_degenerate_sides_are_told_before_the_first_step_and_in_the_record(trainer, images):
    run = trainer(harmful_dataset=images(16, 1))
    assert any("benign ones too" in remark for remark in run.evidence.remarks)
    run.evaluate()
    assert run.evidence.remarks == make_record(run).remarks


def test_harmful_labels_may_be_anything_and_are_needed_by_imma_alone(trainer, processor, images):
    data = photos().remove_columns("label").add_column("label", ["gun"] * 8)
    sets = {"harmful_dataset": data, "harmful_eval_dataset": data}
    run = trainer(train_dataset=photos(), eval_dataset=photos(), processing_class=processor, **sets)
    run.train()
    assert "eval_harmful_log10_kappa" in run.evaluate()
    with pytest.raises(DataError, match=r"In harmful_dataset: .*label.*needed by objective='imma'"):
        trainer(harmful_dataset=images(8, labels=False), objective="imma")


def test_a_batch_larger_than_the_data_needs_drop_last_off(trainer, images):
    with pytest.raises(DataError, match="one full batch of 4, found 3 benign images"):
        trainer(train_dataset=images(3))
    assert trainer(train_dataset=images(3), dataloader_drop_last=False, max_steps=1).train().global_step == 1


def test_images_that_do_not_differ_are_named_with_their_step(trainer, images):
    with pytest.raises(PerfectConditioningError, match=r"'kappa' at step 2.*two different samples"):
        trainer(train_dataset=images(5), dataloader_drop_last=False).train()
    with pytest.raises(PerfectConditioningError, match="at step 1"):
        trainer(harmful_dataset=images(1, labels=False)).train()


def test_arguments_of_another_type_and_a_model_without_a_head_are_refused(tiny, trainer, tmp_path):
    args = hf.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ArgumentError, match="ImmunizationArguments, found TrainingArguments"):
        ImmunizationTrainer(tiny(), args)
    with pytest.raises(HeadError, match="bare backbone"):
        trainer(hf.ViTModel(tiny().config))


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_images_of_several_shapes_are_refused(name, trainer, images):
    run = trainer(**{name: images(2) + images(6, size=12)}, per_device_eval_batch_size=8)
    with pytest.raises(ShapeError, match="one shape"):
        run.train()
        run.evaluate()
    with pytest.raises(ShapeError, match=r"benign and harmful.*\(3, 8, 8\) and \(3, 12, 12\)"):
        trainer(harmful_dataset=images(8, size=12), harmful_eval_dataset=None).train()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_other_modes_are_converted(mode, trainer, processor):
    names = SETS
    run = trainer(**{name: photos(mode=mode) for name in names}, processing_class=processor)
    run.train()
    assert "eval_rir" in run.evaluate()


def test_images_without_a_processor_are_refused(trainer):
    with pytest.raises(DataError, match="processing_class="):
        trainer(train_dataset=photos()).train()


@pytest.mark.parametrize("name", ["train_dataset", "harmful_dataset", "eval_dataset"])
def test_an_undecodable_image_names_its_row(name, trainer, processor):
    run = trainer(**dict.fromkeys(SETS, photos()) | {name: damaged(8, 5)}, processing_class=processor)
    with pytest.raises(ImageDecodeError, match=f"row 5 of {name}"):
        (run.evaluate if name == "eval_dataset" else run.train)()


@pytest.mark.parametrize("column", ["label", "labels"])
def test_a_collator_of_the_user_gets_the_items_of_both_sides(column, trainer, images):
    def rows(seed):
        return [{"pixel_values": row["pixel_values"], column: row["labels"]} for row in images(8, seed)]

    def collate(items):
        labels = torch.tensor([item[column] for item in items])
        return {"pixel_values": torch.stack([item["pixel_values"] for item in items]), "labels": labels}

    names = SETS
    run = trainer(**{name: rows(seed) for seed, name in enumerate(names)}, data_collator=collate)
    run.train()
    assert "eval_rir" in run.evaluate()


# ---- runs of a model from a function: each trial has its own settings and starting figures ----


def test_a_model_may_come_from_a_function(tiny, trainer):
    run = trainer(model_init=lambda: tiny())
    run.train()
    metrics = run.evaluate()
    assert "eval_rir" in metrics and not run.model.vit.layers[0].layernorm_before.weight.requires_grad


@pytest.fixture
def searched(tiny, trainer, monkeypatch):
    """Make a trainer in the midst of a search, and a function that runs a trial with some settings."""
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)

    def make(model_init=None, **options):
        run = trainer(model_init=model_init or (lambda: tiny()), **options)
        run.hp_search_backend, run.hp_space, run.hp_name = HPSearchBackend.OPTUNA, lambda trial: trial.params, None
        return run, lambda **params: run.train(trial=SimpleNamespace(number=0, params=params))

    return make


def test_a_trial_has_its_own_settings_and_batch_sizes(searched):
    run, try_with = searched(benign_weight="0", harmful_weight="auto", harmful_batch_size=4)
    collate, seen = run.data_collator, []
    run.data_collator = lambda rows: seen.append(sum(len(row.get("harmful", ())) for row in rows)) or collate(rows)
    for weight in (0.5, 2.0):
        try_with(harmful_weight=weight, harmful_batch_size=2)
        assert run.state.log_history[0]["harmful_weight"] == pytest.approx(weight)
    assert {count for count in seen if count} == {2}


def test_a_trial_has_the_rir_of_its_own_starting_model(searched, tiny):
    """With a learning rate of zero it is one, whatever the model."""

    def model_init(trial):
        model = tiny()
        with torch.no_grad():
            model.vit.layers[0].mlp.fc1.weight.mul_(1.0 if trial is None else trial.params["scale"])
        return model

    run, try_with = searched(model_init, learning_rate=0.0)
    for scale in (2.0, 5.0):
        try_with(scale=scale)
        assert run.evaluate()["eval_rir"] == pytest.approx(1.0, rel=1e-6)


def test_optuna_searches(tiny, trainer):
    pytest.importorskip("optuna", reason="pip install optuna")
    best = trainer(model_init=lambda: tiny(), eval_strategy="steps", eval_steps=1).hyperparameter_search(
        hp_space=lambda trial: {"harmful_weight": trial.suggest_float("harmful_weight", 0.1, 1.0)},
        compute_objective=lambda metrics: metrics["eval_log10_rir"],
        direction="maximize",
        backend="optuna",
        n_trials=2,
    )
    assert isinstance(best, hf.trainer_utils.BestRun)


# ---- arguments ----


WHOLE = "as a whole number of at least 1 or None, found"


@pytest.mark.parametrize(
    "option, message",
    [
        ({"remove_unused_columns": True}, "remove_unused_columns=False, found True"),
        ({"harmful_batch_size": "many"}, f"harmful_batch_size= {WHOLE} 'many'"),
        ({"distillation_batch_size": 0}, f"distillation_batch_size= {WHOLE} 0"),
    ],
)
def test_an_impossible_value_is_refused(option, message, arguments):
    with pytest.raises(ArgumentError, match=message):
        arguments(**option)


@pytest.mark.parametrize(
    "name, given, meant",
    [("harmful_weight", given, meant) for given, meant in (("auto", "auto"), ("2.5", 2.5), (3, 3.0), ("0", 0.0))]
    + [(name, "1e2", 100) for name in ("queue_size", "weight_warmup_steps", "harmful_batch_size")],
)
def test_numbers_may_be_text_as_in_yaml(name, given, meant, arguments):
    assert getattr(arguments(**{name: given}), name) == meant


def parse(tmp_path, *line):
    return hf.HfArgumentParser(ImmunizationArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", *line]
    )[0]


def test_the_command_line_sets_weights_and_turns_batchnorm_loose(tmp_path):
    args = parse(tmp_path, "--harmful_weight", "auto", "--benign_weight", "2.5", "--freeze_batchnorm", "False")
    assert (args.harmful_weight, args.benign_weight, args.freeze_batchnorm) == ("auto", 2.5, False)
    assert parse(tmp_path, "--no_freeze_batchnorm").freeze_batchnorm is False


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_files_of_arguments_are_read(kind, tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "harmful_weight": 2.5, "benign_weight": "auto"}
    file = tmp_path / f"args.{kind}"
    # YAML reads 3e-1 as a string.
    lines = [f"{name}: {value}" for name, value in options.items()] + ["auto_weight_ratio: 3e-1"]
    file.write_text(json.dumps(options) if kind == "json" else "\n".join(lines))
    parser = hf.HfArgumentParser(ImmunizationArguments)
    args = (parser.parse_json_file if kind == "json" else parser.parse_yaml_file)(str(file))[0]
    assert (args.harmful_weight, args.benign_weight, args.auto_weight_ratio) == (2.5, "auto", 0.3)


def test_defaults_that_differ_from_the_trainers(arguments):
    args = arguments(harmful_weight=2.5)
    assert (args.remove_unused_columns, args.logging_nan_inf_filter, args.dataloader_drop_last) == (False, False, True)
    assert args.to_dict()["harmful_weight"] == 2.5


def test_an_evaluation_of_features_that_are_not_finite_says_so(tiny, trainer):
    model = tiny()
    model.vit.layernorm.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="features"):
        trainer(model).evaluate()


class TestHeldOut:
    def test_a_part_of_the_benign_images_is_kept_from_training_and_the_budget_measured_on_it(self, trainer, images):
        run = trainer(train_dataset=images(100), benign_budget=0.1, benign_loss="distillation")
        sides = run.train_dataset.benign, run.train_dataset.held_out
        seen, kept = ({float(row["pixel_values"].sum()) for row in side} for side in sides)
        assert (len(seen), len(kept), len(seen & kept)) == (90, 10, 0)
        run.train()
        assert {"held_out_total_variation", "kl"} <= set(run.state.log_history[0])

    @pytest.mark.parametrize(
        ("count", "options"),
        [
            (100, {"benign_budget": None}),
            (100, {"benign_budget": 0.1, "budget_holdout": 0}),
            (79, {"benign_budget": 0.1}),
        ],
    )
    def test_nothing_is_kept_where_nothing_is_measured_or_images_are_few(self, count, options, trainer, images):
        data = trainer(train_dataset=images(count), **options).train_dataset
        assert data.held_out is None and len(data) == count

    def test_an_error_names_the_row_by_its_own_number(self, trainer, processor):
        kept = trainer(train_dataset=photos(100), benign_budget=0.1, processing_class=processor)
        number = kept.train_dataset.held_out._numbers[3]
        again = trainer(train_dataset=damaged(100, number), benign_budget=0.1, processing_class=processor)
        with pytest.raises(ImageDecodeError, match=f"row {number} of train_dataset"):
            again.train_dataset.held_out[3]
