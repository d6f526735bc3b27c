"""Where features do not tell harmful from benign images, rectifiers cannot be off on the harmful ones alone."""

import pytest
import torch
from torch import nn

from hf_immunize.training import choice as telling_apart
from hf_immunize.training.arguments import Method
from hf_immunize.training.choice import LEAST_IMAGES, OFTEN, RectifierChoice, share_told_apart, told_apart
from hf_immunize.training.step import ImmunizationStep
from hf_immunize.vision.scope import select_trainable


CPU = torch.device("cpu")


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_each_row_is_predicted_by_all_others():
    benign, harmful = draws(9, 5), draws(9, 5, seed=1) + 0.5
    rows = torch.cat([benign, harmful])
    rows = rows - rows.mean(0)
    # Ridge regression with a constant feature whose square is the rows' mean one.
    size = rows.square().sum(1).mean()
    design = torch.cat([rows / size.sqrt(), torch.ones(18, 1, dtype=torch.float64)], dim=1)
    sides = torch.tensor([1.0] * 9 + [-1.0] * 9, dtype=torch.float64)
    expected = []
    for index in range(18):
        others = [other for other in range(18) if other != index]
        normal = design[others].mT @ design[others] + 1e-2 * torch.eye(6, dtype=torch.float64)
        weight = torch.linalg.solve(normal, design[others].mT @ sides[others])
        expected.append(bool(design[index] @ weight * sides[index] > 0))
    assert told_apart(benign, harmful).tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_features_of_one_distribution_are_not_told_apart(seed):
    share = share_told_apart(draws(64, 300, seed=seed), draws(64, 300, seed=100 + seed))
    assert share < 0.75


def test_features_of_two_are():
    assert share_told_apart(draws(64, 300), draws(64, 300, seed=1) + 0.5) > OFTEN


@pytest.mark.parametrize("benign, harmful", [(draws(40, 3), draws(40, 3) * torch.nan), (torch.ones(40, 3),) * 2])
def test_what_cannot_be_read_is_not_told_apart(benign, harmful):
    assert share_told_apart(benign, harmful) == 0


def test_few_images_tell_nothing():
    assert share_told_apart(draws(LEAST_IMAGES - 1, 3), draws(99, 3)) is None


def test_all_processes_images_count_together(monkeypatch):
    few, others = LEAST_IMAGES // 2, iter([draws(20, 3, seed=2), draws(20, 3, seed=3) + 9])
    monkeypatch.setattr(telling_apart, "gather_features", lambda rows: torch.cat([rows, next(others)]))
    assert share_told_apart(draws(few, 3), draws(few, 3, seed=1) + 9) == 1.0


def objective_of(model, shift, count=LEAST_IMAGES, **method):
    moving = select_trainable(model, "last_stage")
    step = ImmunizationStep(model, Method(**method), moving=moving)
    pixels = draws(2 * count, 3, 32, 32).float()
    batch = {"benign": {"pixel_values": pixels[:count]}, "harmful": {"pixel_values": pixels[count:] + shift}}
    step(model, batch, step=0)
    return step.objective


def test_that_it_was_not_checked_is_said(tiny, monkeypatch):
    said = []
    monkeypatch.setattr("hf_immunize.training.choice.logger.warning_once", said.append)
    objective_of(tiny("resnet"), 0.0, count=4)
    assert "takes 'silence' unchecked" in said[0]


def test_a_choice_of_none_is_kept_by_a_checkpoint():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    choice, other = (RectifierChoice(model, ["0.weight"]) for _ in range(2))
    choice.seek(lambda: model(torch.eye(2)), CPU, lambda: (draws(40, 300), draws(40, 300, seed=1)))
    other.load_state_dict(choice.state_dict())
    assert other.names == []


@pytest.mark.parametrize("shift, objective", [(0.0, "concentration"), (2.0, "silence")])
def test_auto_switches_rectifiers_off_where_images_are_told_apart(tiny, shift, objective):
    assert objective_of(tiny("resnet"), shift) == objective


def test_rectifiers_off_by_name_are_not_refused(tiny):
    assert objective_of(tiny("resnet"), 0.0, objective="silence") == "silence"


def test_of_a_small_batch_auto_trusts_the_rectifiers(tiny):
    assert objective_of(tiny("resnet"), 0.0, count=4) == "silence"


def test_that_they_are_not_told_apart_is_said(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    choice, said = RectifierChoice(model, ["0.weight"]), []
    monkeypatch.setattr("hf_immunize.training.choice.logger.warning_once", said.append)
    sides = draws(40, 300), draws(40, 300, seed=1)
    assert choice.seek(lambda: model(torch.eye(2)), CPU, lambda: sides) == []
    assert "hardly tells harmful from benign images" in said[0] and "takes 'concentration'" in said[0]
