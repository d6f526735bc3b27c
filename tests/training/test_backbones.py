"""Two steps of each objective on a tiny model of each family: exactly what is in scope moves."""

import pytest
import torch
from families import BUILDERS
from torch.nn.modules.batchnorm import _BatchNorm

from hf_immunize.training.objectives import OBJECTIVES
from hf_immunize.vision.features import find_head, penultimate_features
from hf_immunize.vision.scope import last_stage


@pytest.fixture(scope="module")
def built():
    """Classifiers whose features are of order one: each is built once, and trained from its state of then."""
    kept = {}

    def build(name):
        if name not in kept:
            torch.manual_seed(0)
            model = BUILDERS[name]()
            calibrate(model)
            kept[name] = model, {key: tensor.clone() for key, tensor in model.state_dict().items()}
        model, state = kept[name]
        model.load_state_dict(state)
        return model.requires_grad_(True)

    return build


def calibrate(model):
    """Give BatchNorm the statistics of some images, without which an untrained network's features vanish."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            model.train()(pixel_values=torch.randn(16, 3, 32, 32))
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("name", list(BUILDERS))
def test_two_steps_move_what_is_in_scope(built, trainer, images, name, objective):
    model = built(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    run = trainer(
        model,
        objective=objective,
        train_dataset=images(8, 1, 32),
        harmful_dataset=images(8, 2, 32),
        eval_dataset=None,
        harmful_eval_dataset=None,
        logging_strategy="no",
    )
    run.train()
    after = model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == set(last_stage(model))
    pixels = torch.randn(2, 3, 32, 32)
    features = penultimate_features(model.eval(), pixels)
    torch.testing.assert_close(find_head(model)[1](features), model(pixel_values=pixels).logits)
