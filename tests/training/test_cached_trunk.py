"""Training on stored activations is the training on images, in less time."""

import shutil

import datasets
import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.utils import logging

from hf_immunize.errors import ArgumentError, DataError, DiskSpaceError, TrunkError
from hf_immunize.features.cache import TrunkCache


def weights(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


@pytest.fixture
def trunk_runs(monkeypatch):
    """Count the images that the trunk sees."""
    seen, compute = [], TrunkCache._activations

    def counted(self, batch, *args, **kwargs):
        seen.append(len(batch["pixel_values"]))
        return compute(self, batch, *args, **kwargs)

    monkeypatch.setattr(TrunkCache, "_activations", counted)
    return seen


@pytest.mark.parametrize(
    ("name", "freeze_batchnorm"), [("vit", True), ("resnet", True), ("resnet", False), ("mobilenet_v2", False)]
)
def test_final_weights_and_logs_are_those_of_the_run_on_images(name, freeze_batchnorm, trainer, tmp_path):
    runs, logs = [], []
    for kind in ("no", "float32"):
        run = trainer(name, max_steps=6, cache_trunk=kind, freeze_batchnorm=freeze_batchnorm)
        before = weights(run)
        run.train()
        assert largest_difference(weights(run), before) > 1e-4
        runs.append(weights(run))
        logs.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert largest_difference(*runs) < 1e-6
    assert len(logs[0]) == 6 and logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_live_dropout_in_the_trainable_part_draws_the_same(trainer, tiny):
    runs = []
    for kind in ("no", "float32"):
        run = trainer(tiny("vit", hidden_dropout_prob=0.2), max_steps=6, cache_trunk=kind)
        run.train()
        runs.append(weights(run))
    assert largest_difference(*runs) < 1e-6


@pytest.mark.outcome
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_float16_ends_near(trainer, seed):
    runs = []
    for kind in ("no", "float16"):
        run = trainer("resnet", max_steps=6, learning_rate=1e-3, cache_trunk=kind, seed=seed)
        start = weights(run)
        run.train()
        runs.append(weights(run))
    # The control: no step at all ends farther away.
    assert 0 < largest_difference(*runs) < 3e-3 < largest_difference(start, runs[0])


def test_evaluation_sees_images(trainer):
    runs = [trainer("resnet", cache_trunk=kind) for kind in ("no", "float32")]
    metrics = []
    for run in runs:
        run.train()
        metrics.append(run.evaluate())
    for name in ("eval_loss", "eval_benign_log10_kappa", "eval_harmful_log10_kappa"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-4)


def test_checkpoints_have_the_same_files_and_tensors(trainer, tmp_path):
    folders = []
    for kind in ("no", "float32"):
        folder = tmp_path / kind
        trainer("resnet", cache_trunk=kind, output_dir=str(folder), save_strategy="steps", save_steps=2).train()
        folders.append(folder / "checkpoint-2")
    files = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert files[0] == files[1]
    states = [type(trainer("resnet").model).from_pretrained(folder).state_dict() for folder in folders]
    assert largest_difference(*states) < 1e-6


def test_each_image_passes_the_trunk_once(trainer, trunk_runs):
    trainer("resnet", max_steps=12, cache_trunk="float32").train()
    assert sum(trunk_runs) == 32


def test_a_resumed_run_is_the_straight_run(trainer, tmp_path):
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 3, "cache_trunk": "float32"}
    straight = trainer("resnet", output_dir=str(tmp_path / "straight"), **options)
    straight.train()
    shutil.copytree(tmp_path / "straight" / "checkpoint-6", tmp_path / "resumed" / "checkpoint-6")
    resumed = trainer("resnet", output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 9 and largest_difference(weights(straight), weights(resumed)) == 0


def test_a_resumed_run_stores_the_trunk_of_its_checkpoint(trainer, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "cache_trunk": "float32"}
    straight = trainer("resnet", **options)
    straight.train()
    resumed = trainer("resnet", **options)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.add_(1)  # the weights a user happens to start from do not matter
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert largest_difference(weights(straight), weights(resumed)) == 0


def test_a_second_run_finds_the_trunk_of_the_first(trainer, trunk_runs):
    trainer("resnet", cache_trunk="float32").train()
    first = sum(trunk_runs)
    trainer("resnet", cache_trunk="float32").train()
    assert first == 32 and sum(trunk_runs) - first <= 6  # a few rows of each side are computed again, as a check


def test_a_collator_of_ones_own_is_taken(trainer):
    def collate(rows):
        batch = {"pixel_values": torch.stack([row["pixel_values"] * 2 for row in rows])}
        return batch | ({"labels": torch.tensor([row["labels"] for row in rows])} if "labels" in rows[0] else {})

    runs = []
    for kind in ("no", "float32"):
        run = trainer("resnet", data_collator=collate, cache_trunk=kind)
        run.train()
        runs.append(weights(run))
    assert largest_difference(*runs) < 1e-6


def test_a_second_training_under_mixed_precision_finds_the_trunk(trainer, trunk_runs):
    run = trainer("resnet", cache_trunk="float32", bf16=True)
    run.train()  # accelerate has put a forward under autocast in place of the model's
    first = sum(trunk_runs)
    run.train()
    assert first == 32 and sum(trunk_runs) - first <= 6
    assert all(torch.isfinite(value).all() for value in weights(run).values())


def test_the_no_of_yaml_is_no(arguments):
    assert arguments(cache_trunk=False).cache_trunk == "no"


def test_frozen_statistics_stay(trainer):
    run = trainer("resnet", cache_trunk="float32")
    norms = [module for module in run.model.modules() if isinstance(module, _BatchNorm)]
    before = [norm.running_mean.clone() for norm in norms]
    run.train()
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))


def test_nothing_is_written_by_default(trainer, tmp_path):
    trainer("resnet").train()
    assert not (tmp_path / "run" / "_trunk").exists()


def test_another_folder_may_be_named(trainer, tmp_path):
    trainer("resnet", cache_trunk="float32", trunk_cache_dir=str(tmp_path / "there")).train()
    assert {path.name for path in (tmp_path / "there").iterdir()} >= {"benign", "harmful"}


def test_a_full_disk_is_said_before_training(trainer, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(DiskSpaceError, match="free"):
        trainer("resnet", cache_trunk="float32").train()


def test_a_model_without_a_trunk_is_refused(trainer):
    with pytest.raises(TrunkError, match="nothing frozen"):
        trainer("resnet", trainable="all", cache_trunk="float32").train()


def test_random_images_are_refused(trainer):
    class Random(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, index):
            return {"pixel_values": torch.randn(3, 8, 8), "labels": index % 2}

    with pytest.raises(DataError, match=r"benign images.*freeze one draw"):
        trainer("resnet", train_dataset=Random(), cache_trunk="float32").train()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cache_trunk": "int8"}, "cache_trunk="),
        ({"cache_trunk": "float32", "torch_compile": True}, "without torch_compile"),
    ],
)
def test_impossible_options_are_refused(options, named, arguments):
    with pytest.raises(ArgumentError, match=named):
        arguments(**options)


@pytest.fixture
def suggestions(monkeypatch):
    """What is suggested in the log."""
    found = []
    logger = logging.get_logger("hf_immunize.training.trainer")
    monkeypatch.setattr(logger, "warning_once", found.append, raising=False)
    return found


def test_it_is_suggested_where_it_would_pay(trainer, suggestions):
    trainer("resnet", max_steps=12).train()
    assert len(suggestions) == 1 and "of 3 epochs" in suggestions[0] and "cache_trunk=" in suggestions[0]


@pytest.mark.parametrize("options", [{"max_steps": 4}, {"trainable": "all"}, {"cache_trunk": "float32"}])
def test_it_is_not_suggested_where_it_would_not(options, trainer, suggestions):
    trainer("resnet", **({"max_steps": 12} | options)).train()
    assert suggestions == []


def test_the_starting_model_runs_from_activations_too(trainer, images):
    runs = []
    method = {"objective": "concentration", "benign_loss": "both", "benign_budget": 0.05, "queue_size": 16}
    for kind in ("no", "float32"):
        run = trainer("vit", max_steps=6, cache_trunk=kind, distillation_dataset=images(11, 5), **method)
        run.train()
        runs.append(weights(run))
    assert largest_difference(*runs) < 1e-6


def test_streamed_images_are_refused(trainer):
    stream = datasets.IterableDataset.from_generator(
        lambda: ({"pixel_values": torch.zeros(3, 8, 8).tolist()} for _ in range(8))
    )
    with pytest.raises(ArgumentError, match="with streamed harmful images"):
        trainer("resnet", harmful_dataset=stream, cache_trunk="float32").train()
