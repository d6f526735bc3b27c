"""What a run chooses for its user: once, before the first step, whatever the batch size."""

import pytest
import torch
from torch import nn

from hf_immunize.errors import DataError
from hf_immunize.hub.record import read_record
from hf_immunize.training import choice
from hf_immunize.training.arguments import Method
from hf_immunize.training.choice import LEAST_IMAGES, MIN_SEPARABILITY, choose_objective, separability, separable
from hf_immunize.training.objectives import DeadReLU
from hf_immunize.training.step import ImmunizationStep
from hf_immunize.vision.head import find_head
from hf_immunize.vision.scope import select_trainable


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
    assert separable(benign, harmful).tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_features_of_two_distributions_are_separable_and_of_one_are_not(seed):
    benign, harmful = draws(64, 300, seed=seed), draws(64, 300, seed=100 + seed)
    assert separability(benign, harmful) < 0.75 and separability(benign, harmful + 0.5) > MIN_SEPARABILITY


@pytest.mark.parametrize("benign, harmful", [(draws(40, 3), draws(40, 3) * torch.nan), (torch.ones(40, 3),) * 2])
def test_what_cannot_be_read_is_not_separable_and_few_images_say_nothing(benign, harmful):
    assert separability(benign, harmful) == 0 and separability(benign[: LEAST_IMAGES - 1], harmful) is None


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


@pytest.mark.parametrize("shortcut, frozen, found", [(False, False, ["late.1"]), (True, False, []), (False, True, [])])
def test_the_relu_is_the_last_that_no_shortcut_bypasses_and_gradients_reach(shortcut, frozen, found):
    model = Backwards(shortcut).requires_grad_(not frozen)
    names = [name for name, _ in model.named_parameters()]
    assert DeadReLU.find(model, names, lambda: model(torch.eye(4) + 1)) == found


def sample(shift, count=LEAST_IMAGES, size=32):
    pixels = draws(2 * count, 3, size, size).float()
    return pixels[:count], pixels[count:] + shift


def choose(model, shift=0.0, count=LEAST_IMAGES, **method):
    trainable = select_trainable(model, "last_stage")
    return choose_objective(Method(**method), model, find_head(model)[1], trainable, lambda: sample(shift, count))


@pytest.mark.parametrize(
    "name, options, objective",
    [
        ("resnet", {"shift": 2.0}, "dead_relu"),
        ("resnet", {"shift": 0.0}, "concentration"),
        ("resnet", {"shift": 0.0, "count": 4}, "dead_relu"),  # too few to say
        ("resnet", {"shift": 0.0, "objective": "dead_relu"}, "dead_relu"),  # by name
        ("resnet", {"shift": 2.0, "benign_loss": "task"}, "concentration"),  # nothing to weigh it against
        ("vit", {"shift": 2.0}, "concentration"),
        ("vit", {"objective": "kappa"}, "kappa"),
    ],
)
def test_the_objective_follows_the_network_and_the_images(tiny, name, options, objective):
    found = choose(tiny(name), **options)
    assert found.objective == objective and found.reason and bool(found.reads) == (objective == "dead_relu")


def test_that_the_sides_are_hardly_separable_is_said(tiny, monkeypatch):
    said = []
    monkeypatch.setattr(choice.logger, "warning_once", said.append)
    for count in (LEAST_IMAGES, 4):
        choose(tiny("resnet"), count=count)
    assert "hardly separates" in said[0] and "unchecked" in said[1]


def test_images_that_do_not_differ_are_an_error(tiny):
    model = tiny("resnet")
    same = torch.ones(4, 3, 32, 32)
    with pytest.raises(DataError):
        choose_objective(
            Method(), model, find_head(model)[1], select_trainable(model, "last_stage"), lambda: (same, same)
        )


def test_a_restored_step_keeps_the_choice_unless_another_was_asked_for(tiny):
    model = tiny("resnet")
    made, other, asked = (ImmunizationStep(model, Method(objective=name)) for name in ("auto", "auto", "dead_relu"))
    made.choose(lambda: sample(2.0))
    for step in (other, asked):
        step.load_state_dict(made.state_dict())
    assert other.choice == made.choice and asked.choice is None


@pytest.mark.parametrize("batch", [4, 16])
def test_a_run_chooses_before_its_first_step_and_says_so_in_the_record(batch, trainer, images, tmp_path):
    benign, harmful = images(48, 1, 32), images(48, 2, 32, labels=False)
    for row in harmful:
        row["pixel_values"] += 3.0
    options = {"objective": "auto", "benign_loss": "distillation", "benign_budget": 0.05, "max_steps": 1}
    run = trainer(
        "resnet", train_dataset=benign, harmful_dataset=harmful, per_device_train_batch_size=batch, **options
    )
    seen = []
    compute = run.compute_loss
    run.compute_loss = lambda *args, **kwargs: (seen.append(run.objective), compute(*args, **kwargs))[1]
    assert run.objective == "auto"
    run.train()
    run.evaluate()
    run.save_model(str(tmp_path / "model"))
    method = read_record(tmp_path / "model").method
    assert set(seen) == {method.objective} == {"dead_relu"}
    assert "separable" in method.settings["choices"]["objective"]
    assert set(method.settings["choices"]) == {"objective", "head_module", "trainable", "harmful_batch_size"}
