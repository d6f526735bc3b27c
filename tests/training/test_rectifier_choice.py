"""The last rectifier that no shortcut bypasses is found once, and a checkpoint keeps the choice."""

import pytest
import torch
from torch import nn

from hf_immunize.errors import DataError
from hf_immunize.training import choice as rectifier_choice
from hf_immunize.training.choice import RectifierChoice


class Backwards(nn.Module):
    """Runs its parts in the reverse of the order in which they are registered."""

    def __init__(self, shortcut=False):
        super().__init__()
        torch.manual_seed(0)
        self.late, self.early = (nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
        self.shortcut = shortcut

    def forward(self, x):
        out = self.late(self.early(x))
        return out + x if self.shortcut else out


def choose(model, **options):
    choice = RectifierChoice(model, [name for name, _ in model.named_parameters()])
    return choice, choice.seek(lambda: model(torch.eye(4) + 1), torch.device("cpu"), **options)


def test_it_is_the_last_to_run():
    assert choose(Backwards())[1] == ["late.1"]


def test_with_a_shortcut_there_is_none():
    assert choose(Backwards(shortcut=True))[1] == []


@pytest.mark.parametrize("shortcut", [False, True])
def test_a_restored_choice_is_that_of_before(shortcut):
    choice, names = choose(Backwards(shortcut))
    other = RectifierChoice(Backwards(shortcut), ["late.0.weight", "early.0.weight"])
    other.load_state_dict(choice.state_dict())
    assert other.names == names


def test_before_it_was_sought_there_is_nothing_to_keep():
    assert RectifierChoice(Backwards(), ["late.0.weight"]).state_dict() == {}


def test_one_that_another_process_did_not_find_does_not_count(monkeypatch):
    # Of two processes, the other found the first to run alone.
    monkeypatch.setattr(rectifier_choice, "process_mean", lambda shares: (shares + torch.tensor([0.0, 1.0])) / 2)
    assert choose(Backwards())[1] == ["early.1"]


def test_where_another_process_failed_all_end(monkeypatch):
    monkeypatch.setattr(rectifier_choice, "any_process", lambda failed, device: True)
    with pytest.raises(DataError, match="Another process"):
        choose(Backwards())
