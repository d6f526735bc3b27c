"""Checkpoints are loaded back into models of every kind that a Trainer saves."""

import pytest
import torch
import transformers as hf

from hf_immunize.errors import CheckpointError
from hf_immunize.training.restoring import load_into


class Own(torch.nn.Module):
    """A model that is none of transformers'."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3 * 8 * 8, 2)

    def forward(self, pixel_values, labels):
        logits = self.linear(pixel_values.flatten(1))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def with_adapter(model):
    peft = pytest.importorskip("peft")
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
