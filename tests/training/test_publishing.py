"""The Trainer's card and pushes, against a Hub on loopback."""

from pathlib import Path

import pytest
from hub_server import TOKEN, USER
from huggingface_hub import ModelCard
from transformers import TrainerCallback, ViTImageProcessorPil

from hf_immunize.errors import ArgumentError
from hf_immunize.hub.card import eval_results
from hf_immunize.hub.load import changed_weights
from hf_immunize.hub.record import ImmunizationRecord, read_record
from hf_immunize.training.checkpoints import last_whole_checkpoint


REPO = f"{USER}/run"
ALLOWED = {".gitattributes", "README.md", "config.json", "immunization.json", "model.safetensors"}
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}


def card_of(run):
    return ModelCard.load(Path(run.args.output_dir) / "README.md")


@pytest.fixture
def pushing(trainer, online):
    """A trainer that pushes to the Hub on loopback."""

    def make(**options):
        defaults = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": TOKEN}
        return trainer(**(defaults | options))

    return make


@pytest.mark.parametrize("best", [False, True])
def test_card_has_the_figures_of_the_model_also_of_the_best(best, trainer):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_log10_rir", "greater_is_better": False}
    run = trainer(**CHECKPOINTS | options) if best else trainer()
    run.train()
    expected = run.state.best_metric if best else run.evaluate()["eval_log10_rir"]
    run.create_model_card()
    results = {
        (r.dataset_config, r.metric_type, (r.metric_args or {}).get("protocol")): r.metric_value
        for r in card_of(run).data.eval_results
    }
    assert results["harmful", "log10_rir", "exact"] == pytest.approx(expected, rel=1e-6)
    assert results["harmful", "log10_rir", "intercept"] != results["harmful", "log10_rir", "exact"]
    assert 0 <= results["benign", "accuracy", None] <= 1


def test_card_takes_the_trainers_arguments(trainer):
    run = trainer()
    run.create_model_card(
        language="en", license="mit", tags="mine", finetuned_from="user/base", dataset_tags="user/pets"
    )
    data = card_of(run).data
    assert (data.language, data.license, data.base_model, data.datasets) == (["en"], "mit", "user/base", ["user/pets"])
    assert "mine" in data.tags


@pytest.mark.hub
def test_push_holds_what_is_allowed_and_true_once(pushing, online, tmp_path):
    run = pushing()
    run.train()
    run.evaluate()
    result = run.push_to_hub(tags=["mine"])
    assert (result.repo_id, result.changed) == (REPO, True)
    assert not run.push_to_hub(tags=["mine"]).changed
    assert set(online.files(REPO)) == ALLOWED
    for name, content in online.files(REPO).items():
        (tmp_path / name).write_bytes(content)
    record, card = read_record(tmp_path), ModelCard.load(tmp_path / "README.md")
    assert changed_weights(tmp_path, record.weights) == []
    assert card.data.eval_results == eval_results(record)
    assert {"mine", "model-immunization"} <= set(card.data.tags)
    assert f'from_pretrained("{REPO}")' in card.text


@pytest.mark.hub
def test_push_in_the_background_of_a_private_model_and_its_processor(pushing, online):
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    run = pushing(processing_class=processor, hub_private_repo=True)
    assert run.push_to_hub(blocking=False).result().repo_id == REPO
    assert set(online.files(REPO)) == (ALLOWED - {"immunization.json"}) | {"preprocessor_config.json"}
    assert online.repos[REPO].private


class PutsThere(TrainerCallback):
    """Puts into each checkpoint what is not for others, before it is pushed."""

    def __init__(self, put):
        self.put = put

    def on_push_begin(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            self.put(folder)


def strangers(folder):
    for name in ("id_rsa", "notes.txt", "private.png", "dataset.safetensors", "training_args.bin"):
        (folder / name).write_bytes(b"not for others")
    for name in ("_unfinished-x", "wandb"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"half")
    (folder / "secrets.json").symlink_to(folder.parent.parent / "elsewhere")


@pytest.mark.hub
def test_of_a_checkpoint_only_the_model_is_pushed(pushing, online, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy"}
    run = pushing(**CHECKPOINTS, **best, hub_always_push=True, callbacks=[PutsThere(strangers)])
    run.train()
    run._finish_current_push()
    for name, content in online.files(REPO).items():
        assert TOKEN.encode() not in content and str(tmp_path).encode() not in content, name
    assert {"model.safetensors", "config.json"} <= set(online.files(REPO)) <= ALLOWED
    record = ImmunizationRecord.from_json(online.files(REPO)["immunization.json"].decode())
    assert record.ratios["exact"].log10_rir is not None
    for strategy in ("checkpoint", "all_checkpoints"):
        with pytest.raises(ArgumentError, match=strategy):
            pushing(hub_strategy=strategy)


@pytest.mark.hub
@pytest.mark.parametrize("action", [403, 500, "cut", "broken card"])
def test_failed_push_of_a_checkpoint_is_said_and_training_goes_on(action, pushing, online, warnings):
    run = pushing(**CHECKPOINTS, hub_strategy="every_save", hub_always_push=True)
    if action == "broken card":
        (Path(run.args.output_dir) / "README.md").write_text("---\nx: [\n---\n")
    else:
        online.fail("POST", "/commit/", action, times=1000)
    run.train()
    run._finish_current_push()
    assert run.state.global_step == 2
    assert last_whole_checkpoint(run.args.output_dir) == (str(Path(run.args.output_dir) / "checkpoint-2"), {})
    assert any("checkpoint-2 is saved, but was not pushed" in line for line in warnings)
