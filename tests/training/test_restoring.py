"""Checkpoints are loaded back into models of every kind that a Trainer saves."""

import peft
import pytest
import torch
import transformers as hf

from hf_immunize.errors import ArgumentError, CheckpointError
from hf_immunize.training import checkpoints as restoring
from hf_immunize.training.checkpoints import check_restorable, load_into


class Own(torch.nn.Module):
    """A model that is none of transformers'."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3 * 8 * 8, 2)

    def forward(self, pixel_values, labels):
        logits = self.linear(pixel_values.flatten(1))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def with_adapter(model):
    targets = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][:2]
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, modules_to_save=["classifier"]))


KINDS = {
    "transformers": lambda tiny: tiny("vit"),
    "peft": lambda tiny: with_adapter(tiny("vit")),
    "own": lambda tiny: Own(),
}


def saved(model, images, folder):
    """Train two steps, each with a checkpoint; the weights after each."""
    kept = []

    class Keep(hf.TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            kept.append({name: value.clone() for name, value in model.state_dict().items()})

    args = hf.TrainingArguments(
        str(folder), max_steps=2, save_steps=1, learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    hf.Trainer(model, args, train_dataset=images(16, 1), callbacks=[Keep()]).train()
    return kept


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_weights_of_an_earlier_checkpoint_come_back(kind, tiny, images, tmp_path):
    model = KINDS[kind](tiny)
    first, second = saved(model, images, tmp_path)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    load_into(model, str(tmp_path / "checkpoint-1"))
    torch.testing.assert_close(dict(model.state_dict()), first, rtol=0, atol=0)


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_moves_moves_still(kind, tiny, images, tmp_path):
    model = KINDS[kind](tiny)
    before = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    saved(model, images, tmp_path)
    load_into(model, str(tmp_path / "checkpoint-1"))
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == before


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_folder_without_weights_is_refused(kind, tiny, tmp_path):
    with pytest.raises(CheckpointError, match="Expected the weights of this"):
        load_into(KINDS[kind](tiny), str(tmp_path))


def settings(tmp_path, **options):
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}
    args = hf.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **(steps | options))
    return args, hf.TrainerState(save_steps=args.save_steps, eval_steps=args.eval_steps)


@pytest.mark.parametrize(
    ("options", "said"),
    [({}, 0), ({"save_steps": 3}, 1), ({"save_strategy": "epoch"}, 1), ({"save_strategy": "best"}, 0)],
)
def test_it_is_said_when_checkpoints_will_not_be_evaluated(options, said, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(restoring.logger, "warning_once", warnings.append)
    check_restorable(*settings(tmp_path, **options))
    assert len(warnings) == said


def test_sharded_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(restoring, "sharded_weights", lambda: True)
    with pytest.raises(ArgumentError, match=r"sharded by FSDP or DeepSpeed\. .*or use 'stop'"):
        check_restorable(*settings(tmp_path))


def test_a_search_for_hyperparameters_is_refused(tmp_path):
    args, state = settings(tmp_path)
    state.is_hyper_param_search = True
    with pytest.raises(ArgumentError, match="folders of their own"):
        check_restorable(args, state)
