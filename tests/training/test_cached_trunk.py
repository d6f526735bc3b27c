"""Training on stored activations is the training on images, in less time."""

import shutil

import datasets
import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from hf_immunize.errors import ArgumentError, DataError, TrunkError
from hf_immunize.features.cache import TrunkCache


def weights(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def largest_difference(one, other):
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


def doubled(rows):
    batch = {"pixel_values": torch.stack([row["pixel_values"] * 2 for row in rows])}
    return batch | ({"labels": torch.tensor([row["labels"] for row in rows])} if "labels" in rows[0] else {})


DISTILLED = {"objective": "time", "benign_loss": "both", "benign_budget": 0.1}


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_on_images_the_trunk_runs_once_for_the_model_and_its_start(name, trainer, tiny, images, at, monkeypatch):
    found, seen = [], {True: 0, False: 0}
    for once in seen:

        def count(state, control, model, once=once):
            def hook(module, inputs, output):
                seen[once] += len(output)

            next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d)).register_forward_hook(
                hook
            )

        callbacks = [at("on_train_begin", count)]
        run = trainer(tiny(name), max_steps=3, **DISTILLED, distillation_dataset=images(11, 5), callbacks=callbacks)
        if not once:
            monkeypatch.setattr(run, "_find_trunk", lambda: None)
        run.train()
        found.append(weights(run))
    assert largest_difference(*found) <= 1e-6
    sizes = run.args.batch_sizes
    assert seen[True] == 3 * (sizes.benign + sizes.harmful + sizes.distillation)
    assert seen[False] == seen[True] + 3 * (sizes.benign + sizes.distillation)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit", {}),
        ("resnet", {}),
        ("resnet", {"freeze_batchnorm": False}),
        ("mobilenet_v2", {"freeze_batchnorm": False}),
        ("resnet", {"data_collator": doubled}),
        ("vit", DISTILLED),  # the starting model runs from activations too
        ("dropout", {}),  # of the trainable part, which draws the same
    ],
)
def test_weights_logs_metrics_and_checkpoints_are_those_of_the_run_on_images(
    name, options, trainer, tiny, images, tmp_path
):
    options = options | ({"distillation_dataset": images(11, 5)} if options is DISTILLED else {})
    found = []
    for kind in ("no", "float32"):
        model = tiny("vit", hidden_dropout_prob=0.2) if name == "dropout" else tiny(name)
        saving = {"output_dir": str(tmp_path / kind), "save_strategy": "steps", "save_steps": 6}
        run = trainer(model, max_steps=6, cache_trunk=kind, **options, **saving)
        before = weights(run)
        run.train()
        assert largest_difference(weights(run), before) > 1e-4
        folder = tmp_path / kind / "checkpoint-6"
        saved = type(model).from_pretrained(folder).state_dict()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        found.append((weights(run), saved, losses, run.evaluate(), sorted(path.name for path in folder.iterdir())))
    (one, saved, losses, metrics, files), (other, other_saved, other_losses, other_metrics, other_files) = found
    assert largest_difference(one, other) < 1e-6 and largest_difference(saved, other_saved) < 1e-6
    assert len(losses) == 6 and losses == pytest.approx(other_losses, rel=1e-5)
    for metric in ("eval_loss", "eval_benign_log10_kappa", "eval_harmful_log10_kappa"):  # of images
        assert metrics[metric] == pytest.approx(other_metrics[metric], rel=1e-4)
    assert files == other_files
    assert not (tmp_path / "no" / "_trunk").exists() and (tmp_path / "float32" / "_trunk").exists()


@pytest.mark.outcome
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("method", [{}, {"objective": "time", "benign_loss": "distillation"}])
def test_float16_ends_near(trainer, seed, method):
    runs = []
    for kind in ("no", "float16"):
        run = trainer("resnet", max_steps=6, learning_rate=1e-3, cache_trunk=kind, seed=seed, **method)
        start = weights(run)
        run.train()
        runs.append(weights(run))
    # The control: no step at all ends farther away.
    assert 0 < largest_difference(*runs) < 3e-3 < largest_difference(start, runs[0])


def test_each_image_passes_the_trunk_once_also_for_a_second_run_and_under_mixed_precision(
    trainer, trunk_runs, tmp_path
):
    options = {"cache_trunk": "float32", "trunk_cache_dir": str(tmp_path / "there"), "bf16": True}
    run = trainer("resnet", max_steps=12, **options)
    norms = [module for module in run.model.modules() if isinstance(module, _BatchNorm)]
    before = [norm.running_mean.clone() for norm in norms]
    run.train()
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    first = sum(trunk_runs)
    # accelerate has put a forward under autocast in place of the model's.
    for again in (run, trainer("resnet", **options)):
        again.train()
        assert all(torch.isfinite(value).all() for value in weights(again).values())
    assert first == 32 and sum(trunk_runs) - first <= 12  # a few rows of each side are computed again, as a check
    assert {path.name for path in (tmp_path / "there").iterdir()} >= {"benign", "harmful"}


def test_a_resumed_run_is_the_straight_run_whatever_weights_it_was_made_with(trainer, tmp_path):
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 3, "cache_trunk": "float32"}
    straight = trainer("resnet", output_dir=str(tmp_path / "straight"), **options)
    straight.train()
    shutil.copytree(tmp_path / "straight" / "checkpoint-6", tmp_path / "resumed" / "checkpoint-6")
    resumed = trainer("resnet", output_dir=str(tmp_path / "resumed"), **options)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.add_(1)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 9 and largest_difference(weights(straight), weights(resumed)) == 0


@pytest.mark.parametrize("most", [2**29, 0])
def test_what_the_starting_model_makes_of_stored_rows_is_computed_once_where_it_fits(trainer, monkeypatch, most):
    monkeypatch.setattr("hf_immunize.training.trainer._MOST_VALUES", most)
    run = trainer("resnet", max_steps=6, cache_trunk="float32", **DISTILLED)
    asked = []
    plain = run._step.run_start
    monkeypatch.setattr(run._step, "run_start", lambda rows: asked.append(len(rows)) or plain(rows))
    run.train()
    assert sum(asked) == (16 if most else 6 * 4)


# ---- what is refused ----


STREAM = datasets.Dataset.from_dict({"pixel_values": torch.zeros(8, 3, 8, 8).tolist()}).to_iterable_dataset()


class Random(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"pixel_values": torch.randn(3, 8, 8), "labels": index % 2}


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"trainable": "all"}, TrunkError, "nothing frozen"),
        ({"train_dataset": Random()}, DataError, r"benign images.*freeze one draw"),
        ({"harmful_dataset": STREAM}, ArgumentError, "with streamed harmful images"),
    ],
)
def test_what_cannot_be_stored_is_refused(options, error, named, trainer):
    with pytest.raises(error, match=named):
        trainer("resnet", **({"cache_trunk": "float32"} | options)).train()
