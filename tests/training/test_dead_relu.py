"""A network whose last ReLU is dead on harmful images, set so by hand: what is made of it; and the way there."""

import copy

import pytest
import torch
from families import calibrate
from transformers import ResNetConfig, ResNetForImageClassification

from hf_immunize.hub.record import read_record
from hf_immunize.vision.head import penultimate_features


def pixels(count, seed, level):
    return 0.5 * torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) + level


def rows(*given):
    return [{"pixel_values": image, "labels": index % 2} for index, image in enumerate(pixels(*given))]


BENIGN, HARMFUL = (24, 3, -1.0), (24, 4, 1.0)
SIDES = {"train_dataset": rows(40, 1, -1.0), "harmful_dataset": rows(40, 2, 1.0)}
SIDES |= {"eval_dataset": rows(*BENIGN), "harmful_eval_dataset": rows(*HARMFUL)}


def resnet(seed=0):
    """An untrained ResNet whose BatchNorm knows both sides."""
    torch.manual_seed(seed)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)
    return calibrate(ResNetForImageClassification(config), pixels(32, 5, -1.0), pixels(32, 5, 1.0))


def last_block(model):
    return model.resnet.encoder.stages[-1].layers[-1]


@torch.no_grad()
def entering(model, side):
    """What enters the last ReLU, ``(N, C, H, W)``."""
    seen = []
    hook = last_block(model).activation.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].clone())
    )
    model.eval()(pixel_values=pixels(*side))
    hook.remove()
    return seen[0]


@torch.no_grad()
def deactivate(model):
    """Lower the last ReLU's biases until harmful images, and no benign one, enter below zero, with room."""
    harmful, benign = (entering(model, side) for side in (HARMFUL, BENIGN))
    room = 0.1 * harmful.std()
    last_block(model).layer[-1].normalization.bias -= harmful.amax((0, 2, 3)) + room
    harmful, benign = (entering(model, side) for side in (HARMFUL, BENIGN))
    assert harmful.max() < -0.9 * room and (benign.amax((1, 2, 3)) > room).all()


@pytest.fixture(scope="module")
def trainer_of(trainer_in, tmp_path_factory):
    def make(seed=0, **options):
        options |= {"objective": "dead_relu", "benign_loss": "distillation", "per_device_train_batch_size": 16}
        return trainer_in(tmp_path_factory.mktemp("dead"), resnet(seed), seed=seed, **SIDES, **options)

    return make


@pytest.fixture(scope="module")
def dead(trainer_of):
    # A step of no length, after which evaluations are of what came of the training.
    trainer = trainer_of(max_steps=1, learning_rate=1e-12)
    trainer.train()
    deactivate(trainer.model)
    return trainer


def test_evaluation_reports_a_bound_and_the_record_holds_it(dead, tmp_path):
    metrics = dead.evaluate()
    assert metrics["eval_harmful_rank"] == 0 and metrics["eval_rir_is_lower_bound"] == 1.0
    assert metrics["eval_benign_rank"] > 0
    dead.save_model(str(tmp_path))
    assert read_record(tmp_path).harmful_features.after.rank == 0


def test_no_gradient_of_the_harmful_task_passes_it_but_statistics_of_the_batch_bring_it_back(dead):
    images, moved = pixels(*HARMFUL), []
    for model in (dead.model, resnet()):
        model = copy.deepcopy(model).eval().requires_grad_()
        torch.nn.functional.cross_entropy(model(pixel_values=images).logits, torch.arange(len(images)) % 2).backward()
        moved.append({name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()})
    assert moved[0] == {"classifier.1.bias"} and len(moved[1]) > 10
    # What an attacker does who fine-tunes with BatchNorm in training mode; the documentation says so.
    assert not penultimate_features(dead.model.eval(), images).any()
    assert penultimate_features(copy.deepcopy(dead.model).train(), images).any()


@pytest.mark.outcome
@pytest.mark.parametrize("seed", range(3))
def test_training_deactivates_it_on_harmful_images_and_not_on_benign_ones(seed, trainer_of):
    left = {}
    for rate in (1e-12, 1e-2):
        trainer = trainer_of(seed, max_steps=60, learning_rate=rate)
        trainer.train()
        # The share of entries that pass the last ReLU.
        passing = [(entering(trainer.model, side) > 0).double().mean().item() for side in (HARMFUL, BENIGN)]
        left[rate] = dict(zip(("harmful", "benign"), passing, strict=True))
    assert left[1e-2]["harmful"] < 0.1 < 0.2 < left[1e-12]["harmful"]
    assert left[1e-2]["benign"] > 0.2
